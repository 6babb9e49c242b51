"""The public attention functions, as torch.library operators with autograd.

The operators `axo_flash::attention_forward` and `axo_flash::attention_backward` have fake kernels, so torch.compile,
selective activation checkpointing and FSDP see one opaque call; which backend serves is decided inside, at run time. Eager
calls that nobody looks at go to it without the dispatcher.
"""

from __future__ import annotations

import logging
from collections import Counter
from functools import cache, lru_cache

import torch

from axo_flash.arguments import check, check_cu_seqlens, check_logits
from axo_flash.kernels.backends import BACKENDS, Choice, choose_backend
from axo_flash.kernels.dropout import draw_seed
from axo_flash.kernels.spec import AttentionSpec
from axo_flash.paged import from_pages

logger = logging.getLogger(__name__)

# Forward calls in this process by the backend that computed them, compiled models and the recomputation of gradient
# checkpointing included: what a run states as what really ran.
calls: Counter[str] = Counter()

_library = torch.library.Library("axo_flash", "DEF")
_SPEC = (
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? alibi_slopes, Tensor? sinks, Tensor? dropout_seed, "
    "float softmax_scale, bool causal, int left, int right, float softcap, float dropout_p, bool deterministic, str backend"
)
_TENSORS = 5  # of them
_library.define(f"attention_forward(Tensor q, Tensor k, Tensor v, {_SPEC}) -> (Tensor, Tensor)")
_library.define(  # the last of the gradients is of the sinks, and empty where there are none
    "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_SPEC}) -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(f"attention_dropped(Tensor q, Tensor k, SymInt rows, SymInt cols, {_SPEC}) -> Tensor")
_FORWARD = torch.ops.axo_flash.attention_forward.default
_BACKWARD = torch.ops.axo_flash.attention_backward.default
_DROPPED = torch.ops.axo_flash.attention_dropped.default


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
    sinks: torch.Tensor | None = None,
    backend: str = "auto",
):
    """softmax(softmax_scale * q k^T + mask) v, with the arguments of flash-attn's function of this name.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim); any strides with a unit last one (another last stride is copied).
        k, v: (batch, seqlen_k, num_kv_heads, head_dim); num_heads is a multiple of num_kv_heads (GQA, MQA), and
            query head h reads kv head h // (num_heads // num_kv_heads).
        dropout_p: probability with which an entry of the softmax is dropped; 0 when evaluating. The seed is drawn from
            torch's default generator of q's device, so torch.manual_seed repeats it; the backward pass drops the same.
        softmax_scale: default head_dim ** -0.5.
        causal: bottom-right aligned: with seqlen_q != seqlen_k the last query sees the last key.
        window_size: (left, right) keys visible on each side, inclusive; -1 = unlimited.
        softcap: scores become softcap * tanh(scores / softcap); 0 = off.
        alibi_slopes: fp32 (num_heads,) or (batch, num_heads): -slope * |i + seqlen_k - seqlen_q - j| is added to the score
            of query i and key j. They get no gradient.
        deterministic: dq too is bit-equal from run to run, which costs the backend "hopper" speed; out, lse, dk and dv
            always are, and the other backends' dq. Implied by torch.use_deterministic_algorithms(True).
        return_attn_probs: also return lse and, with dropout and for tests alone, S_dmask in O(seqlen^2) memory, as
            flash-attn does: (batch, num_heads, seqlen_q, seqlen_k), both rounded up to 128, in q's dtype, exp(score - its
            row's maximum), negative where it was dropped, 0 where there is nothing to see; without dropout None.
        sinks: (num_heads,), a learnable logit a head (gpt-oss' sinks, transformers' s_aux, FlashAttention-4's
            learnable_sink), which joins the softmax's denominator, so lse too, and no key's weight.
        backend: "auto" (the best that serves this call) or one of axo_flash.kernels.backends.BACKENDS.

    Returns:
        out (batch, seqlen_q, num_heads, head_dim) in q's dtype; with return_attn_probs (out, lse, S_dmask), lse natural
        log, fp32, (batch, num_heads, seqlen_q), differentiable. A row that sees no key gives out 0 and lse -inf, or its
        sink.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit, or no backend for them; names every reason.
    """
    check("flash_attn_func", q, k, v, rank=4)
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"flash_attn_func: q has batch {q.shape[0]} and k has {k.shape[0]}; they must be equal")
    check_logits("flash_attn_func", q, q.shape[0], alibi_slopes, sinks)
    tensors, options = _arguments(
        q, None, None, alibi_slopes, sinks, softmax_scale, causal, window_size, softcap, dropout_p, deterministic, backend,
    )  # fmt: skip
    lengths = (q.shape[1], k.shape[1]) if return_attn_probs else None
    return _call(q, k, v, tensors, options, lengths)


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
    block_table: torch.Tensor | None = None,
    *,
    sinks: torch.Tensor | None = None,
    backend: str = "auto",
):
    """`flash_attn_func` over sequences of different lengths laid end to end.

    Args:
        q: (total_q, num_heads, head_dim). k, v: (total_k, num_kv_heads, head_dim).
        cu_seqlens_q, cu_seqlens_k: int32 (batch + 1,), on q's device: sequence i is rows cu_seqlens[i] ...
            cu_seqlens[i + 1] - 1. Empty sequences are legal; so are tokens past cu_seqlens[-1], whose output is 0.
        max_seqlen_q, max_seqlen_k: of flash-attn's signature; only S_dmask needs them, as lengths are read on the device, and
            max_seqlen_k spares memory with block_table.
        block_table: int32 (batch, pages of a sequence): k and v are pages, (num_pages, page_size, num_kv_heads, head_dim).
            They are copied into one piece first: right, but no way to decode fast. See axo_flash.paged.

    Everything else as there; lse is (num_heads, total_q), and -inf for tokens past cu_seqlens[-1].
    """
    name = "flash_attn_varlen_func"
    check_cu_seqlens(q, cu_seqlens_q, cu_seqlens_k)
    if block_table is not None:
        k, v = from_pages(name, k, v, block_table, cu_seqlens_k, max_seqlen_k)
    check(name, q, k, v, rank=3)
    check_logits(name, q, cu_seqlens_q.numel() - 1, alibi_slopes, sinks)
    if return_attn_probs and dropout_p and (max_seqlen_q is None or max_seqlen_k is None):
        raise ValueError(f"{name}: return_attn_probs with dropout needs max_seqlen_q and max_seqlen_k, got none")
    tensors, options = _arguments(
        q, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, softmax_scale, causal, window_size, softcap, dropout_p,
        deterministic, backend,
    )  # fmt: skip
    lengths = (max_seqlen_q, max_seqlen_k) if return_attn_probs else None
    return _call(q, k, v, tensors, options, lengths)


def _arguments(
    q, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, softmax_scale, causal, window_size, softcap, dropout_p,
    deterministic, backend,
):  # fmt: skip
    """The tensors and the options of _SPEC, in its order."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    left, right = window_size
    deterministic = bool(deterministic) or torch.are_deterministic_algorithms_enabled()
    if sinks is not None:
        sinks = sinks.to(_lse_dtype(q)).contiguous()
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.contiguous()
    seed = draw_seed(q.device) if 0 < dropout_p < 1 else None  # others are refused by the spec
    options = (scale, bool(causal), int(left), int(right), float(softcap), float(dropout_p), deterministic, backend)
    return (cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, seed), options


def _call(q, k, v, tensors, options, lengths):
    """out, or (out, lse, S_dmask) where `lengths`, the longest of q and of k, are given."""
    q, k, v = _rows(q), _rows(k), _rows(v)
    forward = _without_dispatcher(_FORWARD, _forward_autograd)
    out, lse = forward(q, k, v, *tensors, *options)
    if lengths is None:
        return out
    dropout_seed, dropped = tensors[-1], None
    if dropout_seed is not None:
        rows, cols = (-(-n // 128) * 128 for n in lengths)
        dropped = _DROPPED(q, k, rows, cols, *tensors, *options)
    return out, lse, dropped


def _rows(x):
    return x if x.stride(-1) == 1 else x.contiguous()


# --- operators ------------------------------------------------------------------------------------------------------


def _without_dispatcher(operator, autograd):
    """`autograd`, to which the dispatcher would go from `operator`: the way there and back costs as much as all the checks.
    Dynamo gets the operator, to see one opaque call."""
    return operator if torch.compiler.is_compiling() else autograd


_PLAIN = {torch.Tensor, torch.nn.Parameter}


def _unobserved(q, k, v) -> bool:
    """Whether the dispatcher would hand a call with these tensors to its kernel and to nobody else: there are no modes (as
    selective checkpointing's), transforms of functions, traces or profiles, and no tensors of another kind."""
    return (
        {type(q), type(k), type(v)} <= _PLAIN
        and not q.is_meta
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch._C._get_tracing_state()
        and not torch.autograd._profiler_enabled()
    )


def _backend_for(q, k, tensors, options) -> Choice:
    """The backend that serves a call with these arguments of _SPEC; that it is not the best is logged once."""
    _, _, alibi_slopes, sinks, _ = tensors
    heads = q.shape[-2], k.shape[-2], q.shape[-1]
    extras = alibi_slopes is not None, sinks is not None
    choice = _choice(q.device, q.dtype, q.ndim == 3, *heads, *extras, *options)
    if choice.name != BACKENDS[0].name and options[-1] == "auto":
        _say_once(choice.name, f"attention runs on the backend '{choice.name}' ({choice.reason})")
    return choice


@lru_cache(maxsize=1024)
def _choice(
    device, dtype, varlen, num_heads, num_kv_heads, head_dim, alibi, sinks, softmax_scale, causal, left, right, softcap,
    dropout_p, deterministic, backend,
) -> Choice:  # fmt: skip
    spec = AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=str(dtype).removeprefix("torch."),
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=(left, right),
        varlen=varlen,
        deterministic=deterministic,
        softcap=softcap,
        dropout_p=dropout_p,
        alibi=alibi,
        sinks=sinks,
    )
    return choose_backend(spec, device, backend)


_KEYWORDS = ("cu_seqlens_q", "cu_seqlens_k", "alibi_slopes", "sinks", "dropout_seed")


def _keywords(choice, tensors) -> dict:
    """`tensors` as a backend takes them: those that there are."""
    keywords = {"spec": choice.spec}
    for name, x in zip(_KEYWORDS, tensors, strict=True):
        if x is not None:
            keywords[name] = x
    return keywords


def _widened(choice, *tensors):
    """`tensors` with the columns of zeros that the backend wants behind those of head_dim."""
    missing = choice.spec.head_dim - tensors[0].shape[-1]
    return tensors if not missing else tuple(torch.nn.functional.pad(x, (0, missing)) for x in tensors)


@cache
def _say_once(backend: str, message: str) -> None:
    # the last of the table is slow and takes O(seqlen^2) memory; of the others, each GPU has its best
    logger.log(logging.WARNING if backend == BACKENDS[-1].name else logging.INFO, message)


def _narrowed(x, like):
    """The inverse of `_widened`."""
    return x if x.shape[-1] == like.shape[-1] else x[..., : like.shape[-1]].contiguous()


def _forward(q, k, v, *arguments):
    tensors, options = arguments[:_TENSORS], arguments[_TENSORS:]
    choice = _backend_for(q, k, tensors, options)
    calls[choice.name] += 1
    out, lse = choice.module.forward(*_widened(choice, q, k, v), **_keywords(choice, tensors))
    return _narrowed(out, q), lse


def _backward(dout, dlse, q, k, v, out, lse, *arguments):
    tensors, options = arguments[:_TENSORS], arguments[_TENSORS:]
    choice = _backend_for(q, k, tensors, options)
    if dout.stride(-1) != 1:  # an expanded gradient, as of out.sum()
        dout = dout.contiguous()
    dout, wide_q, wide_k, wide_v, out = _widened(choice, dout, q, k, v, out)
    grads = choice.module.backward(dout, wide_q, wide_k, wide_v, out, lse, dlse=dlse, **_keywords(choice, tensors))
    dq, dk, dv = (_narrowed(x, q) for x in grads[:3])
    return dq, dk, dv, grads[3] if len(grads) > 3 else lse.new_empty(0)


def _dropped(q, k, rows, cols, *arguments):
    """S_dmask of `flash_attn_func`: by the definition of the mask, which is every backend's."""
    tensors, options = arguments[:_TENSORS], arguments[_TENSORS:]
    choice = _backend_for(q, k, tensors, (*options[:-1], "reference"))
    with torch.no_grad():
        return choice.module.signed_softmax(q, k, (rows, cols), **_keywords(choice, tensors))


def _lse_dtype(q):
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _forward_fake(q, k, v, *_):
    lse_shape = (q.shape[0], q.shape[2], q.shape[1]) if q.ndim == 4 else (q.shape[1], q.shape[0])
    return q.new_empty(q.shape), q.new_empty(lse_shape, dtype=_lse_dtype(q))


def _backward_fake(dout, dlse, q, k, v, out, lse, *arguments):
    sinks = arguments[3]
    dsinks = lse.new_empty(0) if sinks is None else lse.new_empty(sinks.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


def _dropped_fake(q, k, rows, cols, cu_seqlens_q, *_):
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    return q.new_empty((batch, q.shape[-2], rows, cols))


class _Attention(torch.autograd.Function):
    """What torch.library.register_autograd would make, at half its cost to the host (23 instead of 54 microseconds)."""

    @staticmethod
    def forward(ctx, q, k, v, *arguments):
        out, lse = _forward_below_autograd(q, k, v, *arguments)
        ctx.save_for_backward(q, k, v, out, lse, *arguments[:_TENSORS])
        ctx.options = arguments[_TENSORS:]
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        others = (None,) * len(ctx.options)
        if dout is None:
            if dlse is None:
                return (None,) * (3 + _TENSORS) + others
            dout = torch.zeros_like(out)
        backward = _without_dispatcher(_BACKWARD, _backward_autograd)
        dq, dk, dv, dsinks = backward(dout, dlse, q, k, v, out, lse, *tensors, *ctx.options)
        _, _, _, sinks, _ = tensors
        return dq, dk, dv, None, None, None, None if sinks is None else dsinks, None, *others


def _forward_autograd(q, k, v, *rest):
    sinks = rest[3]
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, sinks)):
        return _Attention.apply(q, k, v, *rest)
    return _forward_below_autograd(q, k, v, *rest)


def _forward_below_autograd(q, k, v, *rest):
    forward = _forward if _unobserved(q, k, v) else _FORWARD
    with torch._C._AutoDispatchBelowAutograd():
        return forward(q, k, v, *rest)


class _Gradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        return _backward_below_autograd(*arguments)

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError(
            "axo_flash attention has no second derivative: use eager attention where you need one"
        )


def _backward_autograd(*arguments):
    if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in arguments):
        return _Gradients.apply(*arguments)
    return _backward_below_autograd(*arguments)


def _backward_below_autograd(dout, dlse, q, k, v, *rest):
    backward = _backward if _unobserved(q, k, v) else _BACKWARD
    with torch._C._AutoDispatchBelowAutograd():
        return backward(dout, dlse, q, k, v, *rest)


_library.impl("attention_forward", _forward, "CompositeExplicitAutograd")
_library.impl("attention_backward", _backward, "CompositeExplicitAutograd")
_library.impl("attention_dropped", _dropped, "CompositeExplicitAutograd")
_library.impl("attention_forward", _forward_autograd, "Autograd")
_library.impl("attention_backward", _backward_autograd, "Autograd")
_library.impl("attention_dropped", torch.library.fallthrough_kernel, "Autograd")  # a statement, without a gradient
torch.library.register_fake("axo_flash::attention_forward", _forward_fake, lib=_library)
torch.library.register_fake("axo_flash::attention_backward", _backward_fake, lib=_library)
torch.library.register_fake("axo_flash::attention_dropped", _dropped_fake, lib=_library)
