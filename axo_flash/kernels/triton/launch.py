"""From tensors to a launch: the integers that the kernels take, and which tile sizes they run with."""

from __future__ import annotations

import os
from functools import cache

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from axo_flash.kernels.dropout import threshold
from axo_flash.kernels.spec import AttentionSpec
from axo_flash.kernels.triton.tiles import INTERPRETED, LOG2E
from axo_flash.kernels.triton.tuning import INTERPRETER, Config, architecture, candidates, default


class Call:
    """The launch arguments that q, k, v and their companions share.

    Attributes:
        batch, seqlen_q, seqlen_k: of a dense call; batch and the totals of a varlen one.
        left, right: the band; constants["HAS_LEFT"], ["HAS_RIGHT"] say whether it hides anything at these lengths.
        cap: softmax_scale / softcap, and softcap for scores in base 2; None without it.
        strides: (batch, row, head) of each tensor in turn, divided by constants["UNIT"].
    """

    def __init__(self, spec: AttentionSpec, cu_seqlens, q, k, *others):
        self.varlen = spec.varlen
        self.batch = cu_seqlens.numel() - 1 if spec.varlen else q.shape[0]
        self.seqlen_q, self.seqlen_k = (q.shape[0], k.shape[0]) if spec.varlen else (q.shape[1], k.shape[1])
        self.lse_shape = (spec.num_heads, q.shape[0]) if spec.varlen else (q.shape[0], spec.num_heads, q.shape[1])
        self.left, self.right = spec.band
        self.cap = (spec.softmax_scale / spec.softcap, spec.softcap * LOG2E.value) if spec.softcap else (None, None)
        self.dropout_p = spec.dropout_p
        strides = [s for x in (q, k, *others) for s in ((0, *x.stride()[:2]) if spec.varlen else x.stride()[:3])]
        unit = stride_unit(strides)
        self.strides = [s // unit for s in strides]
        self.constants = dict(
            GROUP=spec.group_size,
            HEAD_DIM=spec.head_dim,
            BLOCK_D=block_d(spec.head_dim),
            UNIT=unit,
            VARLEN=spec.varlen,
            HAS_LEFT=0 <= self.left < self.seqlen_k - 1,
            HAS_RIGHT=0 <= self.right < self.seqlen_q - 1,
        )

    def alibi(self, extras: dict) -> tuple:
        """The slopes, and from one sequence's to the next one's."""
        slopes = extras.get("alibi_slopes")
        return (None, None) if slopes is None else (slopes, slopes.shape[-1] if slopes.ndim == 2 else 0)

    def dropout(self, extras: dict) -> tuple:
        """The seed, the bound below which a random number drops its entry, and what the others are multiplied by."""
        if not self.dropout_p:
            return None, None, None
        return extras["dropout_seed"], threshold(self.dropout_p), 1 / (1 - self.dropout_p)

    def tiles(self, x: torch.Tensor, block: int) -> int:
        """Tiles of `block` rows: of one sequence of a dense x, of all sequences and the tail of a varlen one."""
        if self.varlen:
            return x.shape[0] // block + self.batch + 1
        return triton.cdiv(x.shape[1], block)

    def grid(self, x: torch.Tensor, block: int) -> tuple[int]:
        """One program a tile, head and (dense) sequence."""
        heads = x.shape[-2]
        return (self.tiles(x, block) * heads * (1 if self.varlen else self.batch),)

    def can_describe(self, *tensors: torch.Tensor) -> bool:
        """Whether the copy engine can read these: 16-byte aligned, 16-byte strides, nothing expanded or empty."""
        return self.constants["UNIT"] == 8 and all(
            x.numel() and x.data_ptr() % 16 == 0 and min(x.stride()) > 0 for x in tensors
        )

    def describe(self, x: torch.Tensor, block: int) -> TensorDescriptor:
        """Blocks [1, block, 1, BLOCK_D] of (batch, seqlen, heads, head_dim); a varlen x is one long sequence."""
        x = x[None] if self.varlen else x
        return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, block, 1, self.constants["BLOCK_D"]])


def block_d(head_dim: int) -> int:
    """Columns of a tile in registers: matrix units want a power of two, at least 16."""
    return max(16, triton.next_power_of_2(head_dim))


def stride_unit(strides: list[int]) -> int:
    """8 (16 bytes) where every stride is a multiple of it, else 1."""
    return 1 if any(stride % 8 for stride in strides) else 8


def run_tuned(kernel: str, spec: AttentionSpec, device: torch.device, run) -> None:
    """Call run(config) with the tile sizes for this kernel: the table's, or, with AXO_FLASH_AUTOTUNE=1, the fastest of the
    table's candidates, timed at the first call of each (kernel, architecture, head_dim, band)."""
    if INTERPRETED:
        return run(INTERPRETER[kernel])
    if device.index != torch.cuda.current_device():  # Triton launches on the current device, wherever the tensors are
        with torch.cuda.device(device):
            return run_tuned(kernel, spec, device, run)
    key = kernel, _architecture(device), block_d(spec.head_dim)
    if os.environ.get("AXO_FLASH_AUTOTUNE") != "1":
        return run(default(*key))
    problem = (*key, spec.band != (-1, -1))
    if problem not in _autotuned:
        _autotuned[problem] = _fastest(candidates(*key), run)
    return run(_autotuned[problem])


_autotuned: dict[tuple, Config] = {}


def _fastest(configs: list[Config], run) -> Config:
    times = {}
    for config in configs:
        try:
            times[config] = triton.testing.do_bench(lambda c=config: run(c), warmup=10, rep=50, return_mode="median")
        except triton.runtime.errors.OutOfResources:  # a candidate that this GPU has no shared memory for is no candidate
            continue
    return min(times, key=times.get)


@cache
def _architecture(device: torch.device) -> str:
    if torch.version.hip:
        return "amd"
    return architecture(*torch.cuda.get_device_capability(device))
