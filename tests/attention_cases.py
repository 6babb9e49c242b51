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
    softcap: float = 0.0
    dropout: float = 0.0
    alibi: str = ""  # "heads" or "batch": slopes (heads,) or (batch, heads)
    sinks: bool = False

    def __str__(self):
        kind = f"B{self.batch}-{self.seqlen[0]}x{self.seqlen[1]}"
        if self.lengths:
            kind = (
                "varlen-"
                + "_".join(f"{a}x{b}" for a, b in self.lengths[:6])
                + f"-n{len(self.lengths)}-tail{self.tail[0]}"
            )
        mask = ("causal" if self.causal else "full") + (f"-window{self.window}" if self.window != (-1, -1) else "")
        extras = (f"cap{self.softcap}", self.softcap), (f"drop{self.dropout}", self.dropout)
        extras += (f"alibi_{self.alibi}", self.alibi), ("sinks", self.sinks)
        mask = "-".join([mask, *(name for name, on in extras if on)])
        return f"D{self.head_dim}-{str(self.dtype)[6:]}-H{self.heads[0]}_{self.heads[1]}-{kind}-{mask}".replace(" ", "")

    def spec(self) -> AttentionSpec:
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        dtype = str(self.dtype).removeprefix("torch.")
        extras = dict(softcap=self.softcap, dropout_p=self.dropout, alibi=bool(self.alibi), sinks=self.sinks)
        return AttentionSpec(
            *self.heads, self.head_dim, dtype, scale, self.causal, self.window, bool(self.lengths), **extras
        )


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
    """q, k, v, dout, and slopes (batch, heads) and sinks, or None, of a case; rows past the last sequence of a varlen case
    are NaN."""

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

        batch = len(case.lengths) or case.batch
        self.slopes = torch.rand(batch, heads, generator=generator, device=device) * 0.3 if case.alibi else None
        if case.alibi == "heads":
            self.slopes = self.slopes[:1].expand(batch, heads)
        self.sinks = torch.randn(heads, generator=generator, device=device) if case.sinks else None

    def leaves(self):
        return [x.detach().requires_grad_() for x in (self.q, self.k, self.v, self.sinks) if x is not None]


def run_backend(case: Case, inputs: Inputs, backend: str, deterministic: bool = False):
    """out, lse, dq, dk, dv and, where there are sinks, dsinks. With dropout the seed is always the same."""
    return _run(case, inputs, backend, deterministic)[0]


def dropped(case: Case, inputs: Inputs):
    """What `run_backend` keeps: bool (batch, heads, longest seqlen_q, longest seqlen_k), or None without dropout."""
    signed = _run(case, inputs, "reference")[1]
    return None if signed is None else ~signed.signbit()


def _run(case, inputs, backend, deterministic=False):
    q, k, v, *sinks = leaves = inputs.leaves()
    options = dict(
        dropout_p=case.dropout,
        softmax_scale=case.scale,
        causal=case.causal,
        window_size=case.window,
        softcap=case.softcap,
        alibi_slopes=inputs.slopes[0] if case.alibi == "heads" else inputs.slopes,
        deterministic=deterministic,
        return_attn_probs=True,
        sinks=sinks[0] if sinks else None,
        backend=backend,
    )
    torch.manual_seed(1)
    if case.lengths:
        longest = (max(pair[i] for pair in case.lengths) for i in (0, 1))
        out, lse, signed = flash_attn_varlen_func(q, k, v, *inputs.cu, *longest, **options)
    else:
        out, lse, signed = flash_attn_func(q, k, v, **options)
    return (out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, inputs.dout)), signed


def plain_attention(q, k, v, spec: AttentionSpec, sinks=None, slopes=None, keep=None):
    """(batch, seqlen, heads, head_dim): the formula in the inputs' own precision, by PyTorch's own operators."""
    k, v = (x.repeat_interleave(spec.group_size, 2) for x in (k, v))
    s = torch.einsum("bqhd,bkhd->bhqk", q, k) * spec.softmax_scale
    rows, cols = (torch.arange(x.shape[1], device=q.device) for x in (q, k))
    if spec.softcap:
        s = (s / spec.softcap).tanh() * spec.softcap
    if slopes is not None:
        distance = (rows[:, None] + k.shape[1] - q.shape[1] - cols[None, :]).abs()
        s = s - (slopes[:, :, None, None] * distance).to(s.dtype)
    seen = spec.visible(rows[:, None], cols[None, :], q.shape[1], k.shape[1])
    s = s.masked_fill(~seen, -torch.inf)
    if sinks is None:
        p = s.softmax(-1).masked_fill(~seen.any(-1, keepdim=True), 0)
    else:
        column = sinks.to(s.dtype)[:, None, None].expand(s.shape[0], -1, s.shape[2], 1)
        p = torch.cat([s, column], -1).softmax(-1)[..., :-1]
    if keep is not None:
        p = p.masked_fill(~keep[..., : p.shape[-2], : p.shape[-1]], 0) / (1 - spec.dropout_p)
    return torch.einsum("bhqk,bkhd->bqhd", p, v)


def run_plain(case: Case, inputs: Inputs, dtype: torch.dtype, keep=None):
    """out, dq, dk, dv, and dsinks if there are sinks, of plain_attention in `dtype`; zeros for the rows past the last
    sequence."""
    spec = case.spec()
    parts = [(slice(None),) * 3]
    if case.lengths:
        cu_q, cu_k = (c.tolist() for c in inputs.cu)
        parts = [
            (slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1]), slice(i, i + 1))
            for i in range(len(case.lengths))
        ]
    results = [torch.zeros_like(x, dtype=dtype) for x in (inputs.q, inputs.q, inputs.k, inputs.v)]
    dsinks = [] if inputs.sinks is None else [torch.zeros_like(inputs.sinks, dtype=dtype)]
    for rows, cols, sequence in parts:
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
        sinks = [x.to(dtype).detach().requires_grad_() for x in (inputs.sinks,) if x is not None]
        slopes, kept = (None if x is None else x[sequence] for x in (inputs.slopes, keep))
        out = plain_attention(*leaves, spec, *(sinks or [None]), slopes, kept)
        grads = torch.autograd.grad(out, leaves + sinks, dout)
        for result, part, value in zip(results, (rows, rows, cols, cols), (out, *grads[:3]), strict=True):
            result[part] = value.detach()[0] if case.lengths else value.detach()
        for total, new in zip(dsinks, grads[3:], strict=True):
            total += new
    return results + dsinks


def _rounding_of_dsinks(inputs: Inputs, out, lse) -> float:
    """What the rounding of out to its precision makes of a sink's gradient, the sum of exp(sink - lse) dout . out over all
    rows, if the errors are independent: plain PyTorch, whose error in so few numbers may be none, does not go by out."""
    p_sink = (inputs.sinks[:, None] - lse).exp().masked_fill(lse == -torch.inf, 0)
    rounded = torch.finfo(out.dtype).eps / 2 * (inputs.dout.nan_to_num() * out).float() * p_sink.mT[..., None]
    return rounded.square().flatten(0, -3).sum((0, 2)).sqrt().max().item()


def check(case: Case, backend: str, device, seed=0):
    """Hold out, lse and all gradients of `backend` against the reference, in poisoned memory."""
    inputs = Inputs(case, device, seed)
    with poisoned():
        out, lse, *grads = run_backend(case, inputs, backend)
    keep = dropped(case, inputs)
    exact = run_plain(case, inputs, torch.float64, keep)
    low = run_plain(case, inputs, case.dtype, keep)
    queries = inputs.q.shape[-3]
    rows, cols = queries * case.heads[0] // case.heads[1], inputs.k.shape[-3]
    names, summed_over = ("out", "dq", "dk", "dv", "dsinks"), (cols, cols, rows, rows, queries * case.batch)
    for name, got, want, plain, factor, summed in zip(
        names, (out, *grads), exact, low, (2, 3, 3, 3, 3), summed_over, strict=False
    ):
        assert got.dtype == (torch.float32 if name == "dsinks" else case.dtype) and got.shape == want.shape
        if not want.numel():
            continue
        error, allowed = (got - want).abs().max().item(), (plain - want).abs().max().item()
        if name == "dsinks":
            allowed = max(allowed, _rounding_of_dsinks(inputs, out, lse))
        # fp32 rounding, where low precision happens to be exact (as with one key, where dP - delta is 0). It grows with the
        # root of the number of terms, of the sum itself and of the products over head_dim in it; dq and dk with the scale.
        terms = max(1.0, summed / 256) * max(1.0, case.head_dim / 64)
        steep = max(1.0, case.spec().softmax_scale * math.sqrt(case.head_dim)) if name in ("dq", "dk") else 1.0
        floor = 1e-5 * steep * max(1.0, want.abs().max().item()) * math.sqrt(terms)
        assert error <= factor * allowed + floor, f"{name}: error {error:.2e}, plain low precision {allowed:.2e}"
    _, lse_exact, *_ = run_backend(case, inputs, "reference")
    torch.testing.assert_close(lse, lse_exact.to(lse.dtype), atol=1e-4, rtol=1e-5)
