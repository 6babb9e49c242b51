"""Attention in plain PyTorch, fp32, short enough to teach with: the oracle of every backend.

    s[i, j]  = softmax_scale * q[i] . k[j]        where visible(i, j), else -inf
    lse[i]   = log sum_j exp(s[i, j])             -inf for a row that sees nothing
    p[i, j]  = exp(s[i, j] - lse[i])              0 there
    out[i]   = sum_j p[i, j] v[j]

    dv[j]    = sum_i p[i, j] dout[i]
    dp[i, j] = dout[i] . v[j]
    delta[i] = sum_j p[i, j] dp[i, j] = dout[i] . out[i]
    ds[i, j] = p[i, j] (dp[i, j] - delta[i] + dlse[i])
    dq[i]    = softmax_scale * sum_j ds[i, j] k[j],    dk[j] = softmax_scale * sum_i ds[i, j] q[i]

Everything is computed in fp32 (fp64 for fp64 inputs) and needs O(seqlen_q * seqlen_k) memory a head.
"""

from __future__ import annotations

import torch

from axo_flash.kernels.spec import AttentionSpec

DTYPES = ("float16", "bfloat16", "float32", "float64")


def supports(spec: AttentionSpec, device: torch.device) -> str | None:
    """None if this backend computes `spec` on `device`, else the reason why not."""
    if spec.dtype not in DTYPES:
        return f"dtype {spec.dtype} is none of {', '.join(DTYPES)}"
    return None


def forward(q, k, v, *, spec: AttentionSpec, cu_seqlens_q=None, cu_seqlens_k=None):
    """q (batch, seqlen_q, heads, head_dim), k and v (batch, seqlen_k, kv_heads, head_dim), or (total, heads, head_dim)
    with int32 cu_seqlens (batch + 1,). Returns out like q, contiguous, and lse (batch, heads, seqlen_q) or (heads, total_q).
    """
    acc = _accumulator(q)
    out = q.new_zeros(q.shape)
    if not spec.varlen:
        p, lse = _probabilities(q, k, spec)
        out.copy_(torch.einsum("bhgqk,bkhd->bqhgd", p, v.to(acc)).flatten(2, 3))
        return out, lse
    lse = torch.full((spec.num_heads, q.shape[0]), -torch.inf, dtype=acc, device=q.device)
    for rows, cols in _documents(cu_seqlens_q, cu_seqlens_k):
        p, lse_doc = _probabilities(q[None, rows], k[None, cols], spec)
        out[rows] = torch.einsum("bhgqk,bkhd->bqhgd", p, v[None, cols].to(acc)).flatten(2, 3)[0].to(out.dtype)
        lse[:, rows] = lse_doc[0]
    return out, lse


def backward(dout, q, k, v, out, lse, *, spec: AttentionSpec, cu_seqlens_q=None, cu_seqlens_k=None, dlse=None):
    """Gradients (dq, dk, dv) of `forward` for dout like out and, optionally, dlse like lse. Probabilities are recomputed
    from q, k and lse, as in every backend, so `out` and `lse` may come from another one.
    """
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    if not spec.varlen:
        grads = _gradients(dout, q, k, v, out, lse, dlse, spec)
        return tuple(g.copy_(new) for g, new in zip((dq, dk, dv), grads, strict=True))
    for rows, cols in _documents(cu_seqlens_q, cu_seqlens_k):
        dlse_doc = None if dlse is None else dlse[None, :, rows]
        grads = _gradients(
            dout[None, rows],
            q[None, rows],
            k[None, cols],
            v[None, cols],
            out[None, rows],
            lse[None, :, rows],
            dlse_doc,
            spec,
        )
        for grad, part, new in zip((dq, dk, dv), (rows, cols, cols), grads, strict=True):
            grad[part] = new[0].to(grad.dtype)
    return dq, dk, dv


def _accumulator(x) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _documents(cu_seqlens_q, cu_seqlens_k):
    """Slices (rows of q, rows of k) of each sequence."""
    q, k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    return [(slice(q[i], q[i + 1]), slice(k[i], k[i + 1])) for i in range(len(q) - 1)]


def _probabilities(q, k, spec: AttentionSpec, lse=None):
    """p (batch, kv_heads, group, seqlen_q, seqlen_k) and lse (batch, heads, seqlen_q); p from a given lse if there is one."""
    acc = _accumulator(q)
    q = q.to(acc).unflatten(2, (spec.num_kv_heads, spec.group_size))
    s = torch.einsum("bqhgd,bkhd->bhgqk", q, k.to(acc)) * spec.softmax_scale
    rows = torch.arange(q.shape[1], device=q.device)[:, None]
    cols = torch.arange(k.shape[1], device=q.device)[None, :]
    s = s.masked_fill(~spec.visible(rows, cols, q.shape[1], k.shape[1]), -torch.inf)
    if lse is None:
        lse = s.logsumexp(-1).flatten(1, 2)
    finite = lse.masked_fill(lse == -torch.inf, 0).unflatten(1, (spec.num_kv_heads, spec.group_size))
    return (s - finite[..., None]).exp(), lse


def _gradients(dout, q, k, v, out, lse, dlse, spec: AttentionSpec):
    acc = _accumulator(q)
    heads = (spec.num_kv_heads, spec.group_size)
    p, _ = _probabilities(q, k, spec, lse.to(acc))
    do = dout.to(acc).unflatten(2, heads)  # (batch, seqlen_q, kv_heads, group, head_dim)
    delta = (do * out.to(acc).unflatten(2, heads)).sum(-1).permute(0, 2, 3, 1)  # (batch, kv_heads, group, seqlen_q)
    if dlse is not None:
        delta = delta - dlse.to(acc).unflatten(1, heads)
    dv = torch.einsum("bhgqk,bqhgd->bkhd", p, do)
    ds = p * (torch.einsum("bqhgd,bkhd->bhgqk", do, v.to(acc)) - delta[..., None]) * spec.softmax_scale
    dq = torch.einsum("bhgqk,bkhd->bqhgd", ds, k.to(acc)).flatten(2, 3)
    dk = torch.einsum("bhgqk,bqhgd->bkhd", ds, q.to(acc).unflatten(2, heads))
    return dq, dk, dv
