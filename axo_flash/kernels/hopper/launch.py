"""From tensors to launches: descriptors for the copy engine, workspaces, and what a program runs with."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.experimental.gluon.language as gl
from triton import knobs
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import driver

from axo_flash.kernels.hopper.backward_kernel import backward_kernel
from axo_flash.kernels.hopper.dq_kernel import dq_kernel
from axo_flash.kernels.hopper.forward_kernel import forward_kernel
from axo_flash.kernels.hopper.schedule import schedule_kernel
from axo_flash.kernels.hopper.workspace import finish_kernel, prepare_kernel
from axo_flash.kernels.spec import AttentionSpec

# By head_dim; chosen on an H100, see scripts/bench/NOTES.md.
FORWARD = {
    64: dict(NUM_WG=3, BLOCK_N=128, STAGES=3, SCORES_FIRST=False, REGS=160),
    128: dict(NUM_WG=2, BLOCK_N=128, STAGES=2, SCORES_FIRST=True, REGS=240),
}
# ptxas 12.9, which triton 3.8 brings, serialises all products (C7514) where dS is computed beside the next scores.
EARLY = not triton.__version__.startswith("3.8.")
BACKWARD = {
    64: dict(BLOCK_M=64, BLOCK_N=128, STAGES=4, EARLY=EARLY, WITH_DQ=True, REGS=208, DQ_REGS=72),
    128: dict(BLOCK_M=64, BLOCK_N=128, STAGES=4, EARLY=False, WITH_DQ=True, REGS=208, DQ_REGS=72),
}
# The backward in two kernels: see `in_two`.
DQ = {
    64: dict(BLOCK_M=128, BLOCK_N=64, STAGES=4, REGS=240),
    128: dict(BLOCK_M=128, BLOCK_N=64, STAGES=3, REGS=240),
}
DK_DV = {
    64: dict(BLOCK_M=64, BLOCK_N=128, STAGES=4, EARLY=EARLY, WITH_DQ=False, REGS=240, DQ_REGS=0),
    128: dict(BLOCK_M=64, BLOCK_N=128, STAGES=4, EARLY=EARLY, WITH_DQ=False, REGS=240, DQ_REGS=0),
}
FEW_KEYS = {64: 512, 128: 1536}  # that a query sees, on average, up to which two kernels are faster than one
# What the heads that are worked on together may take of the cache.
L2_BYTES = 8 << 20
L2_BYTES_UNEQUAL = 16 << 20  # where tiles differ in length
LAST_BYTES = 32 << 20  # the last ones there; backward, all of them
LAST_BYTES_VARLEN = 64 << 20
FEWEST_HEADS = 4  # at once, backward, where tiles differ in length
LONG = 2048  # keys, from which on the forward issues the scores first
RAGGED_ROWS = 1 << 30
COUNTERS = 4096
LOG2E = math.log2(math.e)


def forward(q, k, v, *, spec: AttentionSpec, cu_seqlens_q=None, cu_seqlens_k=None):
    """out (as q), lse (fp32): shapes as in axo_flash.ops."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse_shape = (spec.num_heads, q.shape[0]) if spec.varlen else (q.shape[0], spec.num_heads, q.shape[1])
    lse = torch.empty(lse_shape, dtype=torch.float32, device=q.device)
    if not q.numel() or not k.numel():
        return out.zero_(), lse.fill_(-math.inf)
    if q.device.index != torch.cuda.current_device():  # Triton launches on the current device
        with torch.cuda.device(q.device):
            return forward(q, k, v, spec=spec, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    config = FORWARD[spec.head_dim]
    q, k, v = copyable(q), copyable(k), copyable(v)
    tiles = Tiles(spec, q, k, cu_seqlens_q, cu_seqlens_k, 64 * config["NUM_WG"], queries=True)
    launch(
        forward_kernel,
        tiles.programs,
        q.dtype,
        (
            describe(q, 64),
            describe(k, config["BLOCK_N"]),
            describe(v, config["BLOCK_N"]),
            describe(out, 64),
            lse,
            *tiles.arguments,
            spec.softmax_scale * LOG2E,
            spec.group_size,
        ),
        dict(
            D=spec.head_dim,
            NUM_WG=config["NUM_WG"],
            BLOCK_N=config["BLOCK_N"],
            STAGES=config["STAGES"],
            SCORES_FIRST=config["SCORES_FIRST"] and tiles.keys >= LONG,
            **tiles.constants,
            REGS=config["REGS"],
        ),
    )
    return out, lse


def backward(dout, q, k, v, out, lse, *, spec: AttentionSpec, cu_seqlens_q=None, cu_seqlens_k=None, dlse=None):
    """dq, dk, dv, in q's, k's and v's shape and dtype."""
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    if not q.numel() or not k.numel():
        return dq.zero_(), dk.zero_(), dv.zero_()
    if q.device.index != torch.cuda.current_device():
        with torch.cuda.device(q.device):
            cu_seqlens = dict(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
            return backward(dout, q, k, v, out, lse, spec=spec, dlse=dlse, **cu_seqlens)
    q, k, v, dout, out = (copyable(x) for x in (q, k, v, dout, out))
    lse, dlse = lse.contiguous(), None if dlse is None else dlse.contiguous()
    seqlens = cu_seqlens_q, cu_seqlens_k
    if in_two(spec, q, k, cu_seqlens_k):
        config = DK_DV[spec.head_dim]
        space = Workspace.of(spec, q, seqlens, config)
        _dq(space, q, k, v, dout, out, lse, dlse, dq)
        tiles = Tiles(spec, k, q, *reversed(seqlens), config["BLOCK_N"], queries=False, group=spec.group_size)
        _dk_dv(space, tiles, config, 1, q, k, v, dout, None, dk, dv)
        return dq, dk, dv
    config = BACKWARD[spec.head_dim]
    tiles = Tiles(spec, k, q, *reversed(seqlens), config["BLOCK_N"], queries=False)
    space = Workspace.of(spec, q, seqlens, config)
    mask = tiles.seqlen_k, *spec.band
    constants = dict(HEAD_DIM=spec.head_dim, BLOCK=space.block, KEYS=config["BLOCK_N"], **tiles.constants)
    share = spec.group_size // tiles.group
    if share > 1:  # what each query head owes, to be added up
        dk, dv = torch.empty((2, *k.shape[:-2], spec.num_heads, spec.head_dim), dtype=k.dtype, device=k.device)
    _prepare(space, mask, constants, out, dout, lse, dlse)
    _dk_dv(space, tiles, config, share, q, k, v, dout, dq, dk, dv)
    _finish(space, mask, constants, dq)
    if share > 1:
        dk, dv = (x.unflatten(-2, (-1, share)).sum(-2) for x in (dk, dv))
    return dq, dk, dv


def in_two(spec: AttentionSpec, q, k, cu_seqlens_k) -> bool:
    """Whether dq has a kernel of its own: seven matrix products instead of five, but no sums in memory. That is faster where
    a query sees few keys, and where these sums would have to come in one order."""
    rows, keys = (q.shape[0], k.shape[0]) if spec.varlen else (q.shape[1], k.shape[1])
    if spec.varlen:
        batch = max(cu_seqlens_k.numel() - 1, 1)
        rows, keys = rows // batch, keys // batch
    left, right = spec.band
    seen = keys if right < 0 else max(keys - rows // 2, keys // 2)
    if left >= 0 and right >= 0:
        seen = min(seen, left + right + 1)
    return spec.deterministic or seen <= FEW_KEYS[spec.head_dim]


class Workspace(NamedTuple):
    """What the kernels of a backward hand to one another, each sequence's rows beginning on a multiple of `block`.

    Attributes:
        cu_seqlens: of the queries and of the keys.
        lse_log2, dp_start: (heads, rows) fp32: lse in base 2; what dP starts at, -delta (+ dlse).
        dq_acc: (heads, rows, head_dim) fp32, in the order of accumulators in registers; None where nothing is added up.
    """

    spec: AttentionSpec
    cu_seqlens: tuple[torch.Tensor | None, torch.Tensor | None]
    block: int
    batch: int
    seqlen: int
    rows: int
    lse_log2: torch.Tensor
    dp_start: torch.Tensor
    dq_acc: torch.Tensor | None

    @classmethod
    def of(cls, spec: AttentionSpec, q: torch.Tensor, cu_seqlens, config: dict) -> Workspace:
        block = config["BLOCK_M"]
        batch, seqlen = (cu_seqlens[0].numel() - 1, q.shape[0]) if spec.varlen else q.shape[:2]
        rows = padded_rows(batch, seqlen, block, spec.varlen)
        float32 = dict(dtype=torch.float32, device=q.device)
        lse_log2, dp_start = torch.empty((2, spec.num_heads, rows), **float32)
        dq_acc = torch.empty((spec.num_heads, rows, spec.head_dim), **float32) if config["WITH_DQ"] else None
        return cls(spec, cu_seqlens, block, batch, seqlen, rows, lse_log2, dp_start, dq_acc)

    @property
    def programs(self) -> tuple[int, int]:
        """Of the kernels before and after."""
        return self.rows // self.block, self.spec.num_heads

    def describe_rows(self, x: torch.Tensor) -> Descriptor:
        return Descriptor(x, [self.spec.num_heads, self.rows], [self.rows, 1], [1, self.block])


def _prepare(space: Workspace, mask: tuple[int, int, int], constants: dict, out, dout, lse, dlse) -> None:
    launch(
        prepare_kernel,
        space.programs,
        out.dtype,
        (out, dout, lse, dlse, space.lse_log2, space.dp_start, space.dq_acc, *space.cu_seqlens, *strides(out),
         *strides(dout), space.spec.num_heads, space.batch, space.seqlen, *mask, space.rows),
        dict(**constants, HAS_DLSE=dlse is not None),
    )  # fmt: skip


def _dq(space: Workspace, q, k, v, dout, out, lse, dlse, dq) -> None:
    """dq; and lse_log2 and dp_start."""
    spec, config = space.spec, DQ[space.spec.head_dim]
    tiles = Tiles(spec, q, k, *space.cu_seqlens, config["BLOCK_M"], queries=True)
    rows = config["BLOCK_M"] // 2
    launch(
        dq_kernel,
        tiles.programs,
        q.dtype,
        (
            describe(q, rows),
            describe(k, config["BLOCK_N"]),
            describe(v, config["BLOCK_N"]),
            describe(dout, rows),
            describe(out, rows),
            describe(dq, rows),
            lse,
            dlse,
            space.lse_log2,
            space.dp_start,
            *tiles.arguments,
            space.rows,
            spec.softmax_scale,
            spec.softmax_scale * LOG2E,
            spec.group_size,
        ),
        dict(
            D=spec.head_dim,
            BLOCK_M=config["BLOCK_M"],
            BLOCK_N=config["BLOCK_N"],
            STAGES=config["STAGES"],
            **tiles.constants,
            HAS_DLSE=dlse is not None,
            REGS=config["REGS"],
        ),
    )


def _dk_dv(space: Workspace, tiles: Tiles, config: dict, share: int, q, k, v, dout, dq, dk, dv) -> None:
    """dk and dv; WITH_DQ: also dq, or dq_acc."""
    block, keys, spec = space.block, config["BLOCK_N"] // 2, space.spec
    launch(
        backward_kernel,
        tiles.programs,
        q.dtype,
        (
            describe(q, block),
            describe(k, keys),
            describe(v, keys),
            describe(dout, block),
            space.describe_rows(space.lse_log2),
            space.describe_rows(space.dp_start),
            space.dq_acc,
            dq,
            dk,
            dv,
            *tiles.arguments,
            space.rows,
            *(strides(dq) if config["WITH_DQ"] else (0, 0, 0)),
            spec.softmax_scale,
            spec.softmax_scale * LOG2E,
            tiles.group,
            share,
        ),
        dict(
            D=spec.head_dim,
            BLOCK_M=block,
            BLOCK_N=config["BLOCK_N"],
            STAGES=config["STAGES"],
            EARLY=config["EARLY"],
            **tiles.constants,
            WITH_DQ=config["WITH_DQ"],
            REGS=config["REGS"],
            DQ_REGS=config["DQ_REGS"],
        ),
    )


def _finish(space: Workspace, mask: tuple[int, int, int], constants: dict, dq) -> None:
    launch(
        finish_kernel,
        space.programs,
        dq.dtype,
        (space.dq_acc, dq, *space.cu_seqlens, *strides(dq), space.batch, space.seqlen, *mask, space.rows,
         space.spec.softmax_scale),
        constants,
    )  # fmt: skip


def padded_rows(batch: int, seqlen: int, block: int, varlen: bool) -> int:
    """Rows of the workspaces, in which each sequence begins on a multiple of `block` (varlen: `seqlen` of them in all)."""
    return (seqlen // block + batch + 1) * block if varlen else batch * -(-seqlen // block) * block


class Tiles:
    """The tiles of one launch: of queries forward, of keys backward.

    Attributes:
        programs: one a multiprocessor, or fewer.
        arguments: schedule, counter, num_tiles, heads, the seqlens of q and of k, batch, section, sections, left, right.
        constants: VARLEN, HAS_LEFT, HAS_RIGHT.
        keys: of a sequence (varlen: on average) on the other side.
        seqlen_k: as in `arguments`.
        group: query heads of one tile.
    """

    def __init__(self, spec, x, other, cu_seqlens, cu_seqlens_other, block, queries, group=None):
        left, right = spec.band
        counter = tile_counter(x.device)
        length, length_other = (x.shape[0], other.shape[0]) if spec.varlen else (x.shape[1], other.shape[1])
        seqlen_q, seqlen_k = (length, length_other) if queries else (length_other, length)
        has_left, has_right = 0 <= left < seqlen_k - 1, 0 <= right < seqlen_q - 1
        unequal = spec.varlen or (has_right and not (queries and has_left))
        batch = cu_seqlens.numel() - 1 if spec.varlen else x.shape[0]
        self.keys = length_other // max(batch, 1) if spec.varlen else length_other
        # a tile of queries is of a query head; one of keys of a kv head, or, with dq added up in memory, of a query head
        # where tiles differ much in length
        self.group = group or (1 if queries or unequal else spec.group_size)
        heads = spec.num_heads // self.group
        if spec.varlen:
            tiles = length // block + batch + 1  # at most: the kernel reads the number from the schedule
            schedule = torch.empty((tiles + 1, 8), dtype=torch.int32, device=x.device)
            launch(
                schedule_kernel,
                batch + 1,
                torch.int32,
                (cu_seqlens, cu_seqlens_other, schedule, batch, length, length_other),
                dict(BLOCK=block, LAST_FIRST=queries),
            )
            num_tiles, most = tiles * heads, heads
        else:
            schedule = counter
            num_tiles, most = batch * heads * -(-length // block), batch * heads
        # of the other side: K and V; Q, dO and, added up in memory, dQ in fp32
        bytes_of_head = length_other * spec.head_dim * (4 if queries or group else 8) * (1 if queries else self.group)
        if queries:
            section, sections = forward_sections(most, bytes_of_head, spec.group_size, unequal, spec.varlen)
        elif group and spec.varlen:
            section, sections = most, 1
        else:
            section, sections = backward_sections(most, bytes_of_head, unequal)
        self.programs = min(multiprocessors(x.device), num_tiles)
        self.seqlen_k = seqlen_k
        self.arguments = (
            schedule, counter, num_tiles, heads, seqlen_q, seqlen_k, batch, section, sections, left, right,
        )  # fmt: skip
        self.constants = dict(VARLEN=spec.varlen, HAS_LEFT=has_left, HAS_RIGHT=has_right)


def forward_sections(heads: int, bytes_of_head: int, group: int, unequal: bool, varlen: bool) -> tuple[int, int]:
    """How many of `heads` are worked on together, and how often; the last time those that are left.

    bytes_of_head: K and V, which `group` heads share. unequal: tiles differ in length. The longest of a section come first,
    and the last section is larger, so that its short ones fill the gaps at the end.
    """
    section = max(1, (L2_BYTES_UNEQUAL if unequal else L2_BYTES) // bytes_of_head) * group
    last = max(1, (LAST_BYTES_VARLEN if varlen else LAST_BYTES) // bytes_of_head) * group if unequal else section
    return (section, (heads - last) // section + 1) if heads > last else (heads, 1)


def backward_sections(heads: int, bytes_of_head: int, unequal: bool) -> tuple[int, int]:
    """The same of a backward. bytes_of_head: Q, dO and dQ. More heads at once where tiles differ in length, as they balance
    better, in sections of about one size."""
    section = max(1, (LAST_BYTES if unequal else L2_BYTES) // bytes_of_head)
    if unequal:
        section = math.ceil(heads / math.ceil(heads / max(section, FEWEST_HEADS)))
    return (section, math.ceil(heads / section)) if heads > section else (heads, 1)


# --- launches -------------------------------------------------------------------------------------------------------


class Descriptor(NamedTuple):
    """What the driver needs of a TensorDescriptor; Triton's own checks itself at every construction, this one once."""

    base: torch.Tensor
    shape: list[int]
    strides: list[int]
    block_shape: list[int]
    padding: str = "zero"
    round_f32_to_tf32: bool = False  # of triton 3.7 and later

    @property
    def layout(self) -> gl.NVMMASharedLayout:
        return shared_layout(tuple(self.block_shape), self.base.dtype)

    def checked(self) -> TensorDescriptor:
        return TensorDescriptor(self.base, self.shape, self.strides, self.block_shape, self.layout)


_compiled: dict[tuple, Any] = {}


def launch(kernel, programs: int | tuple[int, int], dtype: torch.dtype, arguments: tuple, constants: dict) -> None:
    """Run a kernel whose code depends on dtype and constants, which also tell what arguments are None, and on nothing else:
    it was told not to specialize on the others. So from the second launch on, Triton need not look at each of them."""
    grid = (programs, 1, 1) if isinstance(programs, int) else (*programs, 1)
    device = torch.cuda.current_device()
    key = (kernel, device, dtype, *constants.values())
    compiled = _compiled.get(key)
    if compiled is None:
        checked = (x.checked() if isinstance(x, Descriptor) else x for x in arguments)
        _compiled[key] = kernel[grid](*checked, **constants, num_warps=4, enable_fp_fusion=True)
    elif _observed():
        compiled[grid](*arguments, *constants.values())
    else:
        stream = driver.active.get_current_stream(device)
        compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments,
                     *constants.values())  # fmt: skip


def _observed() -> bool:
    """Whether a profiler of Triton's wants to know of launches."""
    runtime = knobs.runtime
    return getattr(runtime.launch_enter_hook, "calls", True) or getattr(runtime.launch_exit_hook, "calls", True)


def describe(x: torch.Tensor, block: int) -> Descriptor:
    """Blocks of `block` rows of one head of x, (batch, seqlen, heads, head_dim) or (total, heads, head_dim).

    The latter with hardware bounds at every document's end: of two more dimensions, the first's stride is 2**34 less that
    of a row, the second's that of a row. At (2**30, end, head, 2**30 - length + row) addresses, which wrap at 2**64, come
    out at the row, and rows past the end lie past the fourth dimension's size of 2**30, where reads are zeros and writes
    are dropped (the scheme of triton.tools.ragged_tma).
    """
    if x.ndim == 4:
        batch, seqlen, heads, head_dim = x.shape
        stride_b, stride_m, stride_h, _ = x.stride()
        return Descriptor(
            x, [batch, heads, seqlen, head_dim], [stride_b, stride_h, stride_m, 1], [1, 1, block, head_dim]
        )
    _, heads, head_dim = x.shape
    stride_m, stride_h, _ = x.stride()
    shape = [0x7FFF0000, 0x7FFF0000, heads, RAGGED_ROWS, head_dim]
    return Descriptor(x, shape, [2**34 - stride_m, stride_m, stride_h, stride_m, 1], [1, 1, 1, block, head_dim])


@cache
def shared_layout(box: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    names = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, torch.float32: gl.float32}
    return gl.NVMMASharedLayout.get_default_for(list(box), names[dtype])


def copyable(x: torch.Tensor) -> torch.Tensor:
    """x, or a contiguous copy if the copy engine cannot read it: it wants 16-byte addresses and strides, nothing expanded."""
    *outer, last = x.stride()
    if last == 1 and x.data_ptr() % 16 == 0:
        for stride in outer:  # a loop, as this is asked of every argument of every call
            if stride <= 0 or stride % 8:
                break
        else:
            return x
    return x.clone(memory_format=torch.contiguous_format)


def strides(x: torch.Tensor) -> tuple[int, int, int]:
    """Of batch (0 in a varlen tensor), row and head, in units of 8 elements."""
    outer = x.stride()[:-1] if x.ndim == 4 else (0, *x.stride()[:-1])
    return tuple(s // 8 for s in outer)


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


_counters: dict[torch.device, tuple[list[torch.Tensor], list[int]]] = {}


def tile_counter(device: torch.device) -> torch.Tensor:
    """An int32 that is zero, and that its kernel leaves at zero: one of many in turn, for kernels that run side by side.
    A CUDA graph gets one of its own."""
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    if device not in _counters:
        counters = torch.zeros((COUNTERS, 4), dtype=torch.int32, device=device)
        torch.cuda.synchronize(device)  # whatever stream uses them first
        _counters[device] = list(counters.unbind()), [0]
    counters, used = _counters[device]
    used[0] = (used[0] + 1) % COUNTERS
    return counters[used[0]]
