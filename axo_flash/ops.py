"""The public attention functions, as torch.library operators with autograd, and the checks at their door.

The operators `axo_flash::attention_forward` and `axo_flash::attention_backward` have fake kernels, so torch.compile,
selective activation checkpointing and FSDP see one opaque call; which backend serves is decided inside, at run time.
"""

from __future__ import annotations

import logging
from collections import Counter
from functools import cache

import torch

from axo_flash.kernels.backends import BACKENDS, Choice, choose_backend
from axo_flash.kernels.spec import MAX_HEAD_DIM, AttentionSpec

logger = logging.getLogger(__name__)

# Forward calls in this process by the backend that computed them, compiled models and the recomputation of gradient
# checkpointing included: what a run states as what really ran.
calls: Counter[str] = Counter()

_library = torch.library.Library("axo_flash", "DEF")
_SPEC = (
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, float softmax_scale, bool causal, int left, int right, "
    "bool deterministic, str backend"
)
_library.define(f"attention_forward(Tensor q, Tensor k, Tensor v, {_SPEC}) -> (Tensor, Tensor)")
_library.define(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_SPEC}) -> (Tensor, Tensor, Tensor)"
)


# The defaults of dropout_p and softcap are 0, not 0.0: torch.compile(dynamic=True) takes a float default for a variable
# of the graph, and cannot follow it into the layers of a checkpointed model.
def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    backend: str = "auto",
):
    """softmax(softmax_scale * q k^T + mask) v, with the arguments of flash-attn's function of this name.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim); any strides with a unit last one (another last stride is copied).
        k, v: (batch, seqlen_k, num_kv_heads, head_dim); num_heads is a multiple of num_kv_heads (GQA, MQA), and
            query head h reads kv head h // (num_heads // num_kv_heads).
        softmax_scale: default head_dim ** -0.5.
        causal: bottom-right aligned: with seqlen_q != seqlen_k the last query sees the last key.
        window_size: (left, right) keys visible on each side, inclusive; -1 = unlimited.
        deterministic: dq too is bit-equal from run to run, which costs the backend "hopper" speed; out, lse, dk and dv
            always are, and the other backends' dq. Implied by torch.use_deterministic_algorithms(True).
        return_attn_probs: also return lse and, as flash-attn does without dropout, None.
        backend: "auto" (the best that serves this call) or one of axo_flash.kernels.backends.BACKENDS.

    Returns:
        out (batch, seqlen_q, num_heads, head_dim) in q's dtype; with return_attn_probs (out, lse, None), lse natural
        log, fp32, (batch, num_heads, seqlen_q), differentiable. A row that sees no key gives out 0 and lse -inf.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit, or no backend for them; names every reason.
    """
    _refuse_unsupported("flash_attn_func", dropout_p, softcap, alibi_slopes)
    _check("flash_attn_func", q, k, v, rank=4)
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"flash_attn_func: q has batch {q.shape[0]} and k has {k.shape[0]}; they must be equal")
    out, lse = _call(q, k, v, None, None, softmax_scale, causal, window_size, deterministic, backend)
    return (out, lse, None) if return_attn_probs else out


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
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
    backend: str = "auto",
):
    """`flash_attn_func` over sequences of different lengths laid end to end.

    Args:
        q: (total_q, num_heads, head_dim). k, v: (total_k, num_kv_heads, head_dim).
        cu_seqlens_q, cu_seqlens_k: int32 (batch + 1,), on q's device: sequence i is rows cu_seqlens[i] ...
            cu_seqlens[i + 1] - 1. Empty sequences are legal; so are tokens past cu_seqlens[-1], whose output is 0.
        max_seqlen_q, max_seqlen_k: of flash-attn's signature; not needed, as lengths are read on the device.

    Everything else as there; lse is (num_heads, total_q).
    """
    _refuse_unsupported("flash_attn_varlen_func", dropout_p, softcap, alibi_slopes)
    _check("flash_attn_varlen_func", q, k, v, rank=3)
    _check_cu_seqlens(q, cu_seqlens_q, cu_seqlens_k)
    out, lse = _call(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, window_size, deterministic, backend)
    return (out, lse, None) if return_attn_probs else out


def _call(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, window_size, deterministic, backend):
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    left, right = window_size
    deterministic = bool(deterministic) or torch.are_deterministic_algorithms_enabled()
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return torch.ops.axo_flash.attention_forward.default(
        q, k, v, cu_seqlens_q, cu_seqlens_k, scale, bool(causal), int(left), int(right), deterministic, backend
    )


# --- checks ---------------------------------------------------------------------------------------------------------


def _refuse_unsupported(name, dropout_p, softcap, alibi_slopes):
    for option, value, off in (
        ("dropout_p", dropout_p, 0),
        ("softcap", softcap, 0),
        ("alibi_slopes", alibi_slopes, None),
    ):
        if value is not None and (off is None or value != off):
            raise ValueError(f"{name}: {option} is not supported, got {value!r}; leave it at {off!r}")


def _check(name, q, k, v, rank):
    layout = "(batch, seqlen, heads, head_dim)" if rank == 4 else "(total, heads, head_dim)"
    errors = [
        f"{n} must be {layout}, got {tuple(x.shape)}" for n, x in zip("qkv", (q, k, v), strict=True) if x.ndim != rank
    ]
    if not errors:
        if k.shape != v.shape:
            errors.append(f"k and v must have one shape, got {tuple(k.shape)} and {tuple(v.shape)}")
        if q.shape[-1] != k.shape[-1]:
            errors.append(f"q and k must have one head_dim, got {q.shape[-1]} and {k.shape[-1]}")
        if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
            errors.append(f"q's heads must be a multiple of k's, got {q.shape[-2]} and {k.shape[-2]}")
        if not 1 <= q.shape[-1] <= MAX_HEAD_DIM:
            errors.append(f"head_dim must be 1 to {MAX_HEAD_DIM}, got {q.shape[-1]}")
    if not q.dtype == k.dtype == v.dtype:
        errors.append(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if not q.device == k.device == v.device:
        errors.append(f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}")
    if errors:
        raise ValueError(f"{name}: " + "; ".join(errors))


def _check_cu_seqlens(q, cu_seqlens_q, cu_seqlens_k):
    errors = []
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if cu.dtype != torch.int32 or cu.ndim != 1 or cu.numel() < 2:
            errors.append(f"{name} must be int32 (batch + 1,), got {cu.dtype} {tuple(cu.shape)}")
        elif cu.device != q.device:
            errors.append(f"{name} must be on q's device {q.device}, got {cu.device}")
    if not errors and cu_seqlens_q.shape != cu_seqlens_k.shape:
        errors.append(
            f"cu_seqlens_q and cu_seqlens_k must have one length, got {cu_seqlens_q.numel()} and {cu_seqlens_k.numel()}"
        )
    if errors:
        raise ValueError("flash_attn_varlen_func: " + "; ".join(errors))


# --- operators ------------------------------------------------------------------------------------------------------


def _backend_for(q, k, softmax_scale, causal, left, right, deterministic, backend) -> tuple[AttentionSpec, Choice]:
    """The spec of a call with these tensors, and the backend that serves it; that it is not the best is logged once."""
    spec = AttentionSpec(
        num_heads=q.shape[-2],
        num_kv_heads=k.shape[-2],
        head_dim=q.shape[-1],
        dtype=str(q.dtype).removeprefix("torch."),
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=(left, right),
        varlen=q.ndim == 3,
        deterministic=deterministic,
    )
    choice = choose_backend(spec, q.device, backend)
    if backend == "auto" and choice.name != BACKENDS[0].name:
        _say_once(choice.name, f"attention runs on the backend '{choice.name}' ({choice.reason})")
    return spec, choice


@cache
def _say_once(backend: str, message: str) -> None:
    # the last of the table is slow and takes O(seqlen^2) memory; of the others, each GPU has its best
    logger.log(logging.WARNING if backend == BACKENDS[-1].name else logging.INFO, message)


def _forward(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, left, right, deterministic, backend):
    spec, choice = _backend_for(q, k, softmax_scale, causal, left, right, deterministic, backend)
    calls[choice.name] += 1
    return choice.module.forward(q, k, v, spec=spec, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)


def _backward(dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, *options):
    spec, choice = _backend_for(q, k, *options)
    if dout.stride(-1) != 1:  # an expanded gradient, as of out.sum()
        dout = dout.contiguous()
    return choice.module.backward(
        dout, q, k, v, out, lse, spec=spec, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, dlse=dlse
    )


def _forward_fake(q, k, v, *_):
    lse_shape = (q.shape[0], q.shape[2], q.shape[1]) if q.ndim == 4 else (q.shape[1], q.shape[0])
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty(lse_shape, dtype=lse_dtype)


def _backward_fake(dout, dlse, q, k, v, *_):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


class _Attention(torch.autograd.Function):
    """What torch.library.register_autograd would make, at half its cost to the host (23 instead of 54 microseconds)."""

    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens_q, cu_seqlens_k, *options):
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = torch.ops.axo_flash.attention_forward.default(q, k, v, cu_seqlens_q, cu_seqlens_k, *options)
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
        if dout is None:
            if dlse is None:
                return (None,) * (5 + len(ctx.options))
            dout = torch.zeros_like(out)
        grads = torch.ops.axo_flash.attention_backward.default(
            dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, *ctx.options
        )
        return *grads, None, None, *(None for _ in ctx.options)


def _forward_autograd(q, k, v, *rest):
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Attention.apply(q, k, v, *rest)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.axo_flash.attention_forward.default(q, k, v, *rest)


class _Gradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.axo_flash.attention_backward.default(*arguments)

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError(
            "axo_flash attention has no second derivative: use eager attention where you need one"
        )


def _backward_autograd(*arguments):
    if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in arguments):
        return _Gradients.apply(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.axo_flash.attention_backward.default(*arguments)


_library.impl("attention_forward", _forward, "CompositeExplicitAutograd")
_library.impl("attention_backward", _backward, "CompositeExplicitAutograd")
_library.impl("attention_forward", _forward_autograd, "Autograd")
_library.impl("attention_backward", _backward_autograd, "Autograd")
torch.library.register_fake("axo_flash::attention_forward", _forward_fake, lib=_library)
torch.library.register_fake("axo_flash::attention_backward", _backward_fake, lib=_library)
