"""Attention in plain PyTorch, fp32, short enough to teach with: the oracle of every backend.

    x[i, j]  = softmax_scale * q[i] . k[j]
    s[i, j]  = cap(x[i, j]) + bias[i, j]          where visible(i, j), else -inf
    lse[i]   = log(e^sink + sum_j exp(s[i, j]))   -inf for a row that sees nothing, and no sink
    p[i, j]  = exp(s[i, j] - lse[i])              0 there
    out[i]   = sum_j drop(p)[i, j] v[j]

    dv[j]    = sum_i drop(p)[i, j] dout[i]
    dp[i, j] = drop(dout[i] . v[j])
    delta[i] = sum_j p[i, j] dp[i, j] - dlse[i] = dout[i] . out[i] - dlse[i]
    ds[i, j] = p[i, j] (dp[i, j] - delta[i])
    dx[i, j] = ds[i, j] cap'(x[i, j])
    dq[i]    = softmax_scale * sum_j dx[i, j] k[j],    dk[j] = softmax_scale * sum_i dx[i, j] q[i]
    dsink    = -sum_i exp(sink - lse[i]) delta[i]

cap(x) = softcap * tanh(x / softcap), or x; bias is ALiBi's, or 0; drop divides what it keeps by 1 - dropout_p; without
sinks e^sink is 0. Everything is computed in fp32 (fp64 for fp64 inputs) and needs O(seqlen_q * seqlen_k) memory a head.
"""

from __future__ import annotations

import torch

from axo_flash.kernels.dropout import kept
from axo_flash.kernels.spec import AttentionSpec

DTYPES = ("float16", "bfloat16", "float32", "float64")


def supports(spec: AttentionSpec, device: torch.device) -> str | None:
    """None if this backend computes `spec` on `device`, else the reason why not."""
    if spec.dtype not in DTYPES:
        return f"dtype {spec.dtype} is none of {', '.join(DTYPES)}"
    return None


def forward(q, k, v, *, spec: AttentionSpec, cu_seqlens_q=None, cu_seqlens_k=None, **extras):
    """q (batch, seqlen_q, heads, head_dim), k and v (batch, seqlen_k, kv_heads, head_dim), or (total, heads, head_dim)
    with int32 cu_seqlens (batch + 1,). Returns out like q, contiguous, and lse (batch, heads, seqlen_q) or (heads, total_q).

    extras: what the spec asks for: alibi_slopes (heads,) or (batch, heads), sinks (heads,), dropout_seed int64 (1,).
    """
    acc = _accumulator(q)
    out = q.new_zeros(q.shape)
    if not spec.varlen:
        p, lse = _probabilities(q, k, spec, extras)
        out.copy_(torch.einsum("bhgqk,bkhd->bqhgd", _drop(p, spec, extras), v.to(acc)).flatten(2, 3))
        return out, lse
    lse = torch.full((spec.num_heads, q.shape[0]), -torch.inf, dtype=acc, device=q.device)
    for i, (rows, cols) in enumerate(_documents(cu_seqlens_q, cu_seqlens_k)):
        p, lse_doc = _probabilities(q[None, rows], k[None, cols], spec, extras, i)
        p = _drop(p, spec, extras, i)
        out[rows] = torch.einsum("bhgqk,bkhd->bqhgd", p, v[None, cols].to(acc)).flatten(2, 3)[0].to(out.dtype)
        lse[:, rows] = lse_doc[0]
    return out, lse


def backward(
    dout, q, k, v, out, lse, *, spec: AttentionSpec, cu_seqlens_q=None, cu_seqlens_k=None, dlse=None, **extras
):
    """Gradients (dq, dk, dv), and dsinks if the spec has sinks, of `forward` for dout like out and, optionally, dlse like
    lse. Probabilities are recomputed from q, k and lse, as in every backend, so `out` and `lse` may come from another one.
    """
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    dsinks = [torch.zeros_like(extras["sinks"])] if spec.sinks else []
    if not spec.varlen:
        grads = _gradients(dout, q, k, v, out, lse, dlse, spec, extras)
        return tuple(g.copy_(new) for g, new in zip((dq, dk, dv, *dsinks), grads, strict=True))
    for i, (rows, cols) in enumerate(_documents(cu_seqlens_q, cu_seqlens_k)):
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
            extras,
            i,
        )
        for grad, part, new in zip((dq, dk, dv), (rows, cols, cols), grads[:3], strict=True):
            grad[part] = new[0].to(grad.dtype)
        for total, new in zip(dsinks, grads[3:], strict=True):
            total += new
    return dq, dk, dv, *dsinks


def signed_softmax(q, k, lengths, *, spec: AttentionSpec, cu_seqlens_q=None, cu_seqlens_k=None, **extras):
    """What dropout did to every entry of the softmax, for tests, in the way of flash-attn's S_dmask.

    Returns (batch, heads, *lengths) in q's dtype, lengths at least those of the sequences: exp(s - the row's maximum),
    negative where the entry was dropped; 0 where nothing is visible.
    """
    if spec.varlen:
        documents = [(q[None, rows], k[None, cols]) for rows, cols in _documents(cu_seqlens_q, cu_seqlens_k)]
    else:
        documents = list(zip(q.split(1), k.split(1), strict=True))
    result = q.new_zeros((len(documents), spec.num_heads, *lengths))
    for i, (q_doc, k_doc) in enumerate(documents):
        if not q_doc.numel() or not k_doc.numel():
            continue
        slopes = extras.get("alibi_slopes")
        if slopes is not None and slopes.ndim == 2:
            slopes = slopes[i]
        s, visible, _ = _scores(q_doc, k_doc, spec, {"alibi_slopes": slopes}, i)
        s = s.masked_fill(~visible, -torch.inf)
        p = (s - s.amax(-1, keepdim=True).clamp_min(torch.finfo(s.dtype).min)).exp()
        p = torch.where(_kept(p.shape, spec, extras, i), p, -p)
        result[i, :, : p.shape[3], : p.shape[4]] = p[0].flatten(0, 1)
    return result


def _accumulator(x) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _documents(cu_seqlens_q, cu_seqlens_k):
    """Slices (rows of q, rows of k) of each sequence."""
    q, k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    return [(slice(q[i], q[i + 1]), slice(k[i], k[i + 1])) for i in range(len(q) - 1)]


def _scores(q, k, spec: AttentionSpec, extras, sequence=None):
    """s (batch, kv_heads, group, seqlen_q, seqlen_k) before the mask, what of it is visible, and cap' (None without
    softcap). sequence: the number of a document; without it the rows of the batch are numbered."""
    acc = _accumulator(q)
    q = q.to(acc).unflatten(2, (spec.num_kv_heads, spec.group_size))
    s = torch.einsum("bqhgd,bkhd->bhgqk", q, k.to(acc)) * spec.softmax_scale
    rows = torch.arange(q.shape[1], device=q.device)[:, None]
    cols = torch.arange(k.shape[1], device=q.device)[None, :]
    slope = None
    if spec.softcap:
        capped = (s / spec.softcap).tanh()
        s, slope = spec.softcap * capped, 1 - capped**2
    if spec.alibi:
        slopes = extras["alibi_slopes"].to(acc)
        if slopes.ndim == 2 and sequence is not None:
            slopes = slopes[sequence]
        slopes = slopes.unflatten(-1, (spec.num_kv_heads, spec.group_size))[..., None, None]
        s = s + slopes * spec.alibi_bias(rows, cols, q.shape[1], k.shape[1])
    return s, spec.visible(rows, cols, q.shape[1], k.shape[1]), slope


def _probabilities(q, k, spec: AttentionSpec, extras, sequence=None, lse=None):
    """p (batch, kv_heads, group, seqlen_q, seqlen_k) and lse (batch, heads, seqlen_q); p from a given lse if there is one."""
    s, visible, _ = _scores(q, k, spec, extras, sequence)
    s = s.masked_fill(~visible, -torch.inf)
    if lse is None:
        lse = s.logsumexp(-1).flatten(1, 2)
        if spec.sinks:
            lse = torch.logaddexp(lse, extras["sinks"].to(lse.dtype)[:, None])
    finite = lse.masked_fill(lse == -torch.inf, 0).unflatten(1, (spec.num_kv_heads, spec.group_size))
    return (s - finite[..., None]).exp(), lse


def _drop(x, spec: AttentionSpec, extras, sequence=None):
    """Dropout of x (batch, kv_heads, group, seqlen_q, seqlen_k)."""
    if not spec.dropout_p:
        return x
    return x * _kept(x.shape, spec, extras, sequence) / (1 - spec.dropout_p)


def _kept(shape, spec: AttentionSpec, extras, sequence=None):
    seed = extras["dropout_seed"]
    batch, _, _, seqlen_q, seqlen_k = shape
    if sequence is None:
        sequence = torch.arange(batch, device=seed.device)[:, None, None, None, None]
    heads = torch.arange(spec.num_heads, device=seed.device).view(spec.num_kv_heads, spec.group_size, 1, 1)
    rows, cols = torch.arange(seqlen_q, device=seed.device)[:, None], torch.arange(seqlen_k, device=seed.device)
    return kept(seed, spec.dropout_p, sequence, heads, rows, cols)


def _gradients(dout, q, k, v, out, lse, dlse, spec: AttentionSpec, extras, sequence=None):
    acc = _accumulator(q)
    heads = (spec.num_kv_heads, spec.group_size)
    lse = lse.to(acc)
    p, _ = _probabilities(q, k, spec, extras, sequence, lse)
    do = dout.to(acc).unflatten(2, heads)  # (batch, seqlen_q, kv_heads, group, head_dim)
    delta = (do * out.to(acc).unflatten(2, heads)).sum(-1).permute(0, 2, 3, 1)  # (batch, kv_heads, group, seqlen_q)
    if dlse is not None:
        delta = delta - dlse.to(acc).unflatten(1, heads)
    dv = torch.einsum("bhgqk,bqhgd->bkhd", _drop(p, spec, extras, sequence), do)
    dp = _drop(torch.einsum("bqhgd,bkhd->bhgqk", do, v.to(acc)), spec, extras, sequence)
    ds = p * (dp - delta[..., None]) * spec.softmax_scale
    if spec.softcap:
        ds = ds * _scores(q, k, spec, extras, sequence)[2]
    dq = torch.einsum("bhgqk,bkhd->bqhgd", ds, k.to(acc)).flatten(2, 3)
    dk = torch.einsum("bhgqk,bqhgd->bkhd", ds, q.to(acc).unflatten(2, heads))
    if not spec.sinks:
        return dq, dk, dv
    p_sink = (extras["sinks"].to(acc)[:, None] - lse).exp()
    dsinks = -(p_sink * delta.flatten(1, 2)).masked_fill(lse == -torch.inf, 0).sum((0, 2))
    return dq, dk, dv, dsinks
