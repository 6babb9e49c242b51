"""One way to hold an attention backend against the fp32 reference, shared by the CPU and the GPU tests.

The tolerance is derived, not tuned: the same formula in plain low-precision PyTorch is computed beside it, and a backend's
error may be at most twice (out) or three times (gradients) that one's, plus fp32 rounding.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch

from axo_flash import flash_attn_func, flash_attn_varlen_func
from axo_flash.kernels.spec import AttentionSpec


@dataclass(frozen=True)
class Case:
    """A dense call, or, where `lengths` is given, a varlen one over (seqlen_q, seqlen_k) pairs with `tail` rows behind."""

    head_dim: int = 64
    dtype: torch.dtype = torch.float16
    heads: tuple[int, int] = (2, 1)
    batch: int = 1
    seqlen: tuple[int, int] = (97, 97)
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    lengths: tuple[tuple[int, int], ...] = ()
    tail: tuple[int, int] = (0, 0)
    scale: float | None = None

    def __str__(self):
        kind = f"B{self.batch}-{self.seqlen[0]}x{self.seqlen[1]}"
        if self.lengths:
            kind = (
                "varlen-"
                + "_".join(f"{a}x{b}" for a, b in self.lengths[:6])
                + f"-n{len(self.lengths)}-tail{self.tail[0]}"
            )
        mask = ("causal" if self.causal else "full") + (f"-window{self.window}" if self.window != (-1, -1) else "")
        return f"D{self.head_dim}-{str(self.dtype)[6:]}-H{self.heads[0]}_{self.heads[1]}-{kind}-{mask}".replace(" ", "")

    def spec(self) -> AttentionSpec:
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        dtype = str(self.dtype).removeprefix("torch.")
        return AttentionSpec(*self.heads, self.head_dim, dtype, scale, self.causal, self.window, bool(self.lengths))


def strided(shape, dtype, device, generator):
    """Random values with NaN between them in memory, as a projection's output may be laid out: unit last stride only."""
    *rest, heads, head_dim = shape
    buffer = torch.full((*rest, heads + 1, head_dim + 8), torch.nan, dtype=dtype, device=device)
    buffer[..., :heads, :head_dim] = torch.randn(shape, generator=generator, device=device).to(dtype)
    return buffer[..., :heads, :head_dim]


@contextmanager
def poisoned():
    """Fresh memory is NaN: what a kernel does not write, or reads before it does, shows."""
    empty, empty_like = torch.empty, torch.empty_like

    def fill(x):
        return x.fill_(torch.nan) if x.is_floating_point() else x

    with (
        mock.patch.object(torch, "empty", lambda *a, **k: fill(empty(*a, **k))),
        mock.patch.object(torch, "empty_like", lambda *a, **k: fill(empty_like(*a, **k))),
    ):
        yield


class Inputs:
    """q, k, v, dout of a case; rows past the last sequence of a varlen case are NaN."""

    def __init__(self, case: Case, device, seed=0):
        generator = torch.Generator(device).manual_seed(seed)
        if case.lengths:
            totals = [sum(pair[i] for pair in case.lengths) + case.tail[i] for i in (0, 1)]
            shape_q, shape_k = (totals[0],), (totals[1],)
            cu = [[sum(pair[i] for pair in case.lengths[:n]) for n in range(len(case.lengths) + 1)] for i in (0, 1)]
            self.cu = tuple(torch.tensor(c, dtype=torch.int32, device=device) for c in cu)
        else:
            shape_q, shape_k = (case.batch, case.seqlen[0]), (case.batch, case.seqlen[1])
        heads, kv_heads = case.heads
        self.q, self.dout = (strided((*shape_q, heads, case.head_dim), case.dtype, device, generator) for _ in range(2))
        self.k, self.v = (strided((*shape_k, kv_heads, case.head_dim), case.dtype, device, generator) for _ in range(2))
        if case.lengths:
            for x, cu in ((self.q, self.cu[0]), (self.dout, self.cu[0]), (self.k, self.cu[1]), (self.v, self.cu[1])):
                x[int(cu[-1]) :] = torch.nan

    def leaves(self):
        return [x.detach().requires_grad_() for x in (self.q, self.k, self.v)]


def run_backend(case: Case, inputs: Inputs, backend: str, deterministic: bool = False):
    """out, lse, dq, dk, dv."""
    q, k, v = inputs.leaves()
    options = dict(
        softmax_scale=case.scale,
        causal=case.causal,
        window_size=case.window,
        deterministic=deterministic,
        return_attn_probs=True,
        backend=backend,
    )
    if case.lengths:
        out, lse, _ = flash_attn_varlen_func(q, k, v, *inputs.cu, **options)
    else:
        out, lse, _ = flash_attn_func(q, k, v, **options)
    return out.detach(), lse.detach(), *torch.autograd.grad(out, (q, k, v), inputs.dout)


def plain_attention(q, k, v, spec: AttentionSpec):
    """(batch, seqlen, heads, head_dim): the formula in the inputs' own precision, by PyTorch's own operators."""
    k, v = (x.repeat_interleave(spec.group_size, 2) for x in (k, v))
    s = torch.einsum("bqhd,bkhd->bhqk", q, k) * spec.softmax_scale
    rows, cols = (torch.arange(x.shape[1], device=q.device) for x in (q, k))
    seen = spec.visible(rows[:, None], cols[None, :], q.shape[1], k.shape[1])
    p = s.masked_fill(~seen, -torch.inf).softmax(-1).masked_fill(~seen.any(-1, keepdim=True), 0)
    return torch.einsum("bhqk,bkhd->bqhd", p, v)


def run_plain(case: Case, inputs: Inputs, dtype: torch.dtype):
    """out, dq, dk, dv of plain_attention in `dtype`; zeros for the rows past the last sequence."""
    spec = case.spec()
    parts = [(slice(None),) * 2]
    if case.lengths:
        cu_q, cu_k = (c.tolist() for c in inputs.cu)
        parts = [(slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])) for i in range(len(case.lengths))]
    results = [torch.zeros_like(x, dtype=dtype) for x in (inputs.q, inputs.q, inputs.k, inputs.v)]
    for rows, cols in parts:
        leaves = [
            x[part].to(dtype).detach()
            for x, part in zip((inputs.q, inputs.k, inputs.v), (rows, cols, cols), strict=True)
        ]
        if not leaves[0].numel() or not leaves[1].numel():
            continue
        dout = inputs.dout[rows].to(dtype)
        if case.lengths:
            leaves, dout = [x[None] for x in leaves], dout[None]
        leaves = [x.requires_grad_() for x in leaves]
        out = plain_attention(*leaves, spec)
        for result, part, value in zip(
            results, (rows, rows, cols, cols), (out, *torch.autograd.grad(out, leaves, dout)), strict=True
        ):
            result[part] = value.detach()[0] if case.lengths else value.detach()
    return results


def check(case: Case, backend: str, device, seed=0):
    """Hold out, lse and all gradients of `backend` against the reference, in poisoned memory."""
    inputs = Inputs(case, device, seed)
    with poisoned():
        out, lse, *grads = run_backend(case, inputs, backend)
    exact = run_plain(case, inputs, torch.float64)
    low = run_plain(case, inputs, case.dtype)
    rows, cols = inputs.q.shape[-3] * case.heads[0] // case.heads[1], inputs.k.shape[-3]
    for name, got, want, plain, factor, summed in zip(
        ("out", "dq", "dk", "dv"), (out, *grads), exact, low, (2, 3, 3, 3), (cols, cols, rows, rows), strict=True
    ):
        assert got.dtype == case.dtype and got.shape == want.shape
        if not want.numel():
            continue
        error, allowed = (got - want).abs().max().item(), (plain - want).abs().max().item()
        # fp32 rounding, where low precision happens to be exact; it grows with the root of the number of terms
        floor = 1e-5 * max(1.0, want.abs().max().item()) * max(1.0, math.sqrt(summed / 256))
        assert error <= factor * allowed + floor, f"{name}: error {error:.2e}, plain low precision {allowed:.2e}"
    _, lse_exact, *_ = run_backend(case, inputs, "reference")
    torch.testing.assert_close(lse, lse_exact.to(lse.dtype), atol=1e-4, rtol=1e-5)
