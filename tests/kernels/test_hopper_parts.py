"""The plain Triton kernels around the Hopper ones: which tile comes when, and what the backward one works in.

On a CPU they run in Triton's interpreter, as Gluon cannot.
"""

import math
import re
import types

import pytest
import torch

from axo_flash.kernels.hopper import fragments, launch, tiles
from axo_flash.kernels.hopper.schedule import schedule_kernel
from axo_flash.kernels.hopper.workspace import finish_kernel, prepare_kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = [[300, 1, 0, 128, 129, 64], [0, 0], [7], [5] * 200]


def as_fragments(acc):
    """(heads, rows, head_dim) as backward_kernel adds it up: 64 x 64 numbers at a time, in the order of the registers that
    hold the accumulator of a warpgroup's matrix product (PTX ISA, wgmma, the layout of D)."""
    heads, rows, head_dim = acc.shape
    r, c = torch.arange(64)[:, None], torch.arange(head_dim)[None, :]
    warp, lane = r // 16, r % 8 * 4 + c % 8 // 2
    register = r % 16 // 8 * 2 + c % 2
    place = c // 64 * 4096 + c % 64 // 8 * 512 + warp * 128 + lane * 4 + register
    out = torch.empty(heads, rows // 64, 64 * head_dim, device=acc.device)
    out[..., place.flatten()] = acc.reshape(heads, rows // 64, 64 * head_dim)
    return out


def cumulative(lengths):
    return torch.tensor([0, *lengths], dtype=torch.int32, device=DEVICE).cumsum(0, dtype=torch.int32)


@pytest.mark.parametrize("last_first", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda x: f"{len(x)}-documents")
@pytest.mark.parametrize("tail", [0, 70])
def test_schedule_holds_every_tile_once_document_by_document(lengths, last_first, tail):
    block = 64
    others = [n // 2 for n in lengths]
    total, total_other = sum(lengths) + tail, sum(others) + 3
    schedule = torch.full((total // block + len(lengths) + 2, 8), -1, dtype=torch.int32, device=DEVICE)
    schedule_kernel[(len(lengths) + 1,)](
        cumulative(lengths), cumulative(others), schedule, len(lengths), total, total_other,
        BLOCK=block, LAST_FIRST=last_first,
    )  # fmt: skip
    count, *_ = schedule[0].tolist()
    rows = [tuple(row[:6]) for row in schedule[1 : count + 1].tolist()]
    starts, starts_other = cumulative(lengths).tolist(), cumulative(others).tolist()
    want = {
        (i, b, starts[i], n, starts_other[i], m)
        for i, (n, m) in enumerate(zip([*lengths, tail], [*others, 0], strict=True))
        for b in range(math.ceil(n / block))
    }
    assert len(rows) == len(want) and set(rows) == want
    order = [(-math.ceil(n / block), i, -b if last_first else b) for i, b, _, n, _, _ in rows]
    assert order == sorted(order)  # the longest document first; of it, where causal tiles are long


def tiles_met(first, seqlen, seqlen_k, left, right, keys):
    """By how many tiles of `keys` keys any of the rows first ... first + 63 is seen, key by key."""
    offset = seqlen_k - seqlen
    seen = {
        col // keys
        for row in range(first, min(first + 64, seqlen))
        for col in range(seqlen_k)
        if (left < 0 or col >= row + offset - left) and (right < 0 or col <= row + offset + right)
    }
    return len(seen)


@pytest.mark.parametrize(("left", "right"), [(-1, -1), (-1, 0), (40, 5)])
@pytest.mark.parametrize("varlen", [False, True])
def test_workspace_before_and_after(varlen, left, right):
    """Every row at its place: lse in base 2 and -delta. Where several tiles meet a block of rows, or none, zeros to add to,
    and back, rounded; where one does, nothing is touched. The rows of nobody are zeros."""
    torch.manual_seed(0)
    tail, heads, head_dim, keys, scale = 5, 2, 64, 128, 0.25
    if varlen:
        lengths, lengths_k = [70, 0, 64, 300, 20, 200], [10, 3, 129, 300, 0, 7]
        total, batch = sum(lengths) + tail, len(lengths)
        cu, cu_k, shape, stats = cumulative(lengths), cumulative(lengths_k), (total, heads, head_dim), (heads, total)
        places = [
            ((start // 64 + i) * 64, start, n) for i, (start, n) in enumerate(zip(cu.tolist(), lengths, strict=False))
        ]
        rows, seqlen, seqlen_k = (total // 64 + batch + 1) * 64, total, sum(lengths_k)
    else:
        batch, seqlen, seqlen_k, cu, cu_k = 3, 150, 140, None, None
        lengths, lengths_k = [seqlen] * batch, [seqlen_k] * batch
        shape, stats = (batch, seqlen, heads, head_dim), (batch, heads, seqlen)
        places = [(i * 192, i, seqlen) for i in range(batch)]
        rows = batch * 192
    out, dout = (torch.randn(shape, device=DEVICE, dtype=torch.float16) for _ in range(2))
    lse, dlse = (torch.randn(stats, device=DEVICE) for _ in range(2))
    lse[..., 3] = -torch.inf  # a row that sees nothing
    lse_log2, dp_start = torch.full((2, heads, rows), torch.nan, device=DEVICE)
    acc = torch.full((heads, rows, head_dim), torch.nan, device=DEVICE)
    strides = [s // 8 for s in (out.stride()[:3] if not varlen else (0, *out.stride()[:2]))]
    mask = dict(KEYS=keys, VARLEN=varlen, HAS_LEFT=left >= 0, HAS_RIGHT=right >= 0)
    grid = (rows // 64, heads)
    prepare_kernel[grid](
        out, dout, lse, dlse, lse_log2, dp_start, acc, cu, cu_k, *strides, *strides, heads, batch, seqlen, seqlen_k, left,
        right, rows, HEAD_DIM=head_dim, BLOCK=64, **mask, HAS_DLSE=True,
    )  # fmt: skip
    real, summed = torch.zeros(2, rows, dtype=torch.bool, device=DEVICE)
    for (place, where, n), n_k in zip(places, lengths_k, strict=True):
        own = (slice(None), slice(where, where + n)) if varlen else (where,)
        o, do = (x[where : where + n] if varlen else x[where] for x in (out, dout))
        delta = (o.float() * do.float()).sum(-1).T - dlse[own]
        torch.testing.assert_close(dp_start[:, place : place + n], -delta)
        torch.testing.assert_close(
            lse_log2[:, place : place + n], torch.where(lse[own].isinf(), torch.inf, lse[own] / math.log(2))
        )
        real[place : place + n] = True
        for first in range(0, n, 64):
            several = tiles_met(first, n, n_k, left, right, keys) != 1
            summed[place + first : place + min(first + 64, n)] = several
            sums = acc[:, place + first : place + first + 64]
            assert (sums == 0).all() if several else sums.isnan().all()
    assert real.sum() >= summed.sum() > 0
    assert (lse_log2[:, ~real] == torch.inf).all() and (dp_start[:, ~real] == 0).all()

    acc[:, real] = torch.randn(heads, int(real.sum()), head_dim, device=DEVICE)
    dq = torch.full(shape, torch.nan, device=DEVICE, dtype=torch.float16)
    finish_kernel[grid](
        as_fragments(acc), dq, cu, cu_k, *strides, batch, seqlen, seqlen_k, left, right, rows, scale,
        HEAD_DIM=head_dim, BLOCK=64, **mask,
    )  # fmt: skip
    for place, where, n in places:
        got = (dq[where : where + n] if varlen else dq[where]).transpose(0, 1)
        own = summed[place : place + n]
        torch.testing.assert_close(got[:, own], (acc[:, place : place + n] * scale).half()[:, own])
        assert got[:, ~own].isnan().all()
    if varlen:
        assert (dq[-tail:].nan_to_num(1) == 0).all()


@pytest.mark.parametrize(
    ("seqlen", "heads", "group", "unequal", "varlen", "expected"),
    [
        (4096, 64, 1, False, False, (4, 16)),  # 2 MB of K and V a head: 8 MB of them
        (4096, 66, 1, False, False, (4, 16)),  # the last time six
        (4096, 64, 1, True, False, (8, 7)),  # 16 MB of them, at last 32
        (16384, 16, 1, True, False, (2, 7)),
        (16384, 16, 1, True, True, (2, 5)),  # at last 64 MB
        (8192, 64, 4, True, False, (16, 3)),  # four query heads read the same 4 MB
        (1 << 20, 32, 4, True, False, (4, 8)),  # more than the cache holds: one kv head
        (4096, 3, 1, True, False, (3, 1)),
    ],
)
def test_forward_sections(seqlen, heads, group, unequal, varlen, expected):
    assert launch.forward_sections(heads, seqlen * 128 * 4, group, unequal, varlen) == expected


@pytest.mark.parametrize(
    ("seqlen", "heads", "unequal", "expected"),
    [
        (4096, 64, False, (2, 32)),  # 4 MB of Q, dO and dQ a head
        (4096, 64, True, (8, 8)),
        (1024, 256, True, (32, 8)),
        (16384, 16, True, (4, 4)),
        (16384, 14, True, (4, 4)),
        (16384, 5, True, (3, 2)),  # 3 and 2, not 4 and 1
        (16384, 2, True, (2, 1)),
    ],
)
def test_backward_sections(seqlen, heads, unequal, expected):
    assert launch.backward_sections(heads, seqlen * 128 * 8, unequal) == expected


@pytest.mark.parametrize(("heads", "section", "sections"), [(16, 2, 7), (6, 4, 1), (10, 3, 3), (8, 8, 1)])
def test_every_tile_of_every_section_is_found(heads, section, sections):
    on_numbers = types.SimpleNamespace(minimum=min, where=lambda condition, x, y: x if condition else y)
    locate = types.FunctionType(tiles.locate.fn.__code__, {"gl": on_numbers})  # without the GPU that Gluon wants
    blocks, found = 3, []
    for tile in range(blocks * heads):
        block, sequence, head, *_ = locate(
            tile, None, heads // 2, 300, 300, 2, section, sections, None, 128, False, True
        )
        found.append((min((sequence * (heads // 2) + head) // section, sections - 1), -block, sequence, head))
    assert found == sorted(found) and len(set(found)) == blocks * heads  # section by section, long tiles first


def run_warp(text, operands):
    """32 threads of a warp through the few PTX instructions of `text`; operands: lists of 32 by number, which are written to.

    Returns what was stored: {address: value}, in units of 4 bytes.
    """
    memory, registers = {}, {f"${i}": list(values) for i, values in operands.items()}
    registers["%laneid"] = list(range(32))
    for line in filter(str.strip, text.strip("{} ").split(";")):
        condition, name, rest = re.fullmatch(r"\s*(?:@(\w+) )?([\w.]+)\s*(.*?)\s*", line, re.DOTALL).groups()
        if name == ".reg":
            continue
        if name == "st.global.v4.b32":
            address, *values = re.findall(r"[\w$]+", rest)
            for lane in range(32):
                if registers[condition][lane]:
                    for i, value in enumerate(values):
                        place = registers[address][lane] // 4 + i
                        assert registers[address][lane] % 16 == 0 and place not in memory
                        memory[place] = registers[value][lane]
            continue
        target, *sources = [word.strip() for word in rest.split(",")]
        columns = [registers[s] if s in registers else [int(s)] * 32 for s in sources]
        if name.startswith("shfl.sync.bfly"):
            registers[target] = [columns[0][lane ^ columns[1][lane]] for lane in range(32)]
            continue
        operation = {
            "mov": lambda a: a, "shr": lambda a, b: a >> b, "and": lambda a, b: a & b, "add": lambda a, b: a + b,
            "mad": lambda a, b, c: a * b + c, "selp": lambda a, b, p: a if p else b, "setp.lt": lambda a, b: a < b,
            "setp.ne": lambda a, b: a != b, "setp.gt": lambda a, b: a > b,
        }[re.match(r"setp\.\w+|\w+", name)[0]]  # fmt: skip
        registers[target] = [operation(*row) for row in zip(*columns, strict=True)]
    return memory


@pytest.mark.parametrize("rows", [16, 11, 8, 5, 0])
def test_rows_leave_registers_in_order(rows):
    """The assembly that four threads exchange and store a row by: 16 rows of a warp, as an accumulator holds them."""
    pitch, start = 1024, 4096
    scratch = {i: [None] * 32 for i in range(8)}
    # of thread t, rows t // 4 and 8 behind it, pairs t % 4, 4 on, 8 on and 12 on
    held = {
        8 + 2 * i + lower: [(t // 4 + 8 * lower, t % 4 + 4 * i) for t in range(32)]
        for i in range(4)
        for lower in (0, 1)
    }
    memory = run_warp(
        fragments.STORE_TRANSPOSED.value, scratch | held | {16: [start] * 32, 24: [pitch] * 32, 32: [rows] * 32}
    )
    assert memory == {(start + row * pitch) // 4 + pair: (row, pair) for row in range(rows) for pair in range(16)}
