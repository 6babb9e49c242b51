"""flash-attn's functions for q, k and v, or k and v, that lie in one tensor: views of it go to the functions of ops.

The options are those of `axo_flash.ops.flash_attn_func`, and so are results and errors; the gradient is one tensor, like
the one given.
"""

from __future__ import annotations

import torch

from axo_flash.ops import flash_attn_func, flash_attn_varlen_func


def flash_attn_qkvpacked_func(
    qkv: torch.Tensor,
    dropout_p: float = 0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    sinks: torch.Tensor | None = None,
    backend: str = "auto",
):
    """`flash_attn_func` of qkv (batch, seqlen, 3, num_heads, head_dim)."""
    q, k, v = _parts("flash_attn_qkvpacked_func", "qkv", qkv, 3, rank=5)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return flash_attn_func(q, k, v, *options, sinks=sinks, backend=backend)


def flash_attn_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    dropout_p: float = 0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    sinks: torch.Tensor | None = None,
    backend: str = "auto",
):
    """`flash_attn_func` of q (batch, seqlen_q, num_heads, head_dim) and kv (batch, seqlen_k, 2, num_kv_heads, head_dim)."""
    k, v = _parts("flash_attn_kvpacked_func", "kv", kv, 2, rank=5)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return flash_attn_func(q, k, v, *options, sinks=sinks, backend=backend)


def flash_attn_varlen_qkvpacked_func(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int | None = None,
    dropout_p: float = 0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    sinks: torch.Tensor | None = None,
    backend: str = "auto",
):
    """`flash_attn_varlen_func` of qkv (total, 3, num_heads, head_dim)."""
    q, k, v = _parts("flash_attn_varlen_qkvpacked_func", "qkv", qkv, 3, rank=4)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return flash_attn_varlen_func(q, k, v, *lengths, *options, sinks=sinks, backend=backend)


def flash_attn_varlen_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    sinks: torch.Tensor | None = None,
    backend: str = "auto",
):
    """`flash_attn_varlen_func` of q (total_q, num_heads, head_dim) and kv (total_k, 2, num_kv_heads, head_dim)."""
    k, v = _parts("flash_attn_varlen_kvpacked_func", "kv", kv, 2, rank=4)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return flash_attn_varlen_func(q, k, v, *lengths, *options, sinks=sinks, backend=backend)


def _parts(name: str, what: str, packed: torch.Tensor, count: int, rank: int):
    if packed.ndim != rank or packed.shape[-3] != count:
        rows = "batch, seqlen" if rank == 5 else "total"
        raise ValueError(f"{name}: {what} must be ({rows}, {count}, heads, head_dim), got {tuple(packed.shape)}")
    return packed.unbind(-3)
