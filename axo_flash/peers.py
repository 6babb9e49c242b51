"""What else can compute attention on this machine, as functions that the benchmark can call: (q, k, v, call) -> out."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch

from axo_flash.kernels.backends import choose_backend
from axo_flash.kernels.spec import AttentionSpec
from axo_flash.ops import flash_attn_func, flash_attn_varlen_func

OURS = ("hopper", "triton")  # best first


@dataclass(frozen=True)
class Call:
    """What a call asks beside q, k and v, which are (batch, seqlen, heads, head_dim), or (total, heads, head_dim) with
    cu_seqlens (int32, on the device; max_seqlen is the longest document)."""

    causal: bool
    window: int = -1  # keys to the left that a query sees, itself not counted
    cu_seqlens: torch.Tensor | None = None
    max_seqlen: int = 0


class Unsupported(Exception):
    """A peer has no kernel for such a call."""


def peers() -> dict[str, Callable]:
    """Ours first, then what this PyTorch brings, and FlashAttention-3 if it is installed or was loaded."""
    from torch.nn.attention import SDPBackend

    device = torch.device("cuda", torch.cuda.current_device())
    spec = AttentionSpec(16, 16, 128, "bfloat16", softmax_scale=128**-0.5)
    found = {name: _ours(name) for name in OURS if _serves(spec, device, name)}
    if has_fa3():
        found["fa3"] = _fa3
    return found | {"cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION), "fa2": _fa2, "flex": _flex()}


def reference(q, k, v, call: Call):
    """The fp32 definition, at a length that it can do."""
    return _ours("reference")(q, k, v, call)


def _serves(spec: AttentionSpec, device: torch.device, name: str) -> bool:
    try:
        return choose_backend(spec, device, name).name == name
    except ValueError:  # not on this GPU, for a reason that `axo-flash doctor` states
        return False


def _ours(backend):
    def run(q, k, v, call):
        options = dict(causal=call.causal, window_size=(call.window, -1), backend=backend)
        if call.cu_seqlens is None:
            return flash_attn_func(q, k, v, **options)
        cu_seqlens = call.cu_seqlens, call.cu_seqlens
        return flash_attn_varlen_func(q, k, v, *cu_seqlens, call.max_seqlen, call.max_seqlen, **options)

    return run


# --- FlashAttention-3 -----------------------------------------------------------------------------------------------


def has_fa3() -> bool:
    """Whether its operators are there: from its own package, or loaded by scripts/bench/fa3.py."""
    with contextlib.suppress(ImportError):  # not installed; its operators may have been loaded from elsewhere
        import flash_attn_3._C  # noqa: F401
    return hasattr(torch.ops.flash_attn_3, "fwd") and hasattr(torch.ops.flash_attn_3, "bwd")


def _fa3(q, k, v, call):
    return _FlashAttention3.apply(q, k, v, call)


class _FlashAttention3(torch.autograd.Function):
    """Its two operators, called as its own Python interface calls them."""

    @staticmethod
    def forward(ctx, q, k, v, call):
        masks, lengths = _fa3_options(q, call)
        out, lse, *_ = torch.ops.flash_attn_3.fwd(q, k, v, num_splits=1, **masks, **lengths)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.call = call
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse = ctx.saved_tensors
        masks, lengths = _fa3_options(q, ctx.call)
        grads = [torch.empty_like(x) for x in (q, k, v)]
        torch.ops.flash_attn_3.bwd(
            dout.contiguous(), q, k, v, out, lse, *grads, **masks, **lengths, deterministic=False
        )
        return *grads, None


def _fa3_options(q, call):
    masks = dict(softmax_scale=q.shape[-1] ** -0.5, is_causal=call.causal, window_size_left=call.window)
    masks["window_size_right"] = 0 if call.causal and call.window >= 0 else -1
    if call.cu_seqlens is None:
        return masks, {}
    lengths = dict(cu_seqlens_q=call.cu_seqlens, cu_seqlens_k=call.cu_seqlens)
    return masks, lengths | dict(max_seqlen_q=call.max_seqlen, max_seqlen_k=call.max_seqlen)


# --- PyTorch's own --------------------------------------------------------------------------------------------------


def _sdpa(backend):
    from torch.nn.attention import sdpa_kernel

    def run(q, k, v, call):
        if call.window >= 0 or call.cu_seqlens is not None:
            raise Unsupported("scaled_dot_product_attention takes windows and documents only as a mask of seqlen^2")
        with sdpa_kernel(backend):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=call.causal, enable_gqa=q.shape[1] != k.shape[1]
            ).transpose(1, 2)

    return run


def _fa2(q, k, v, call):
    """FlashAttention-2: in scaled_dot_product_attention, and for documents in torch.nn.attention.varlen."""
    from torch.nn.attention import SDPBackend

    if call.cu_seqlens is None:
        return _sdpa(SDPBackend.FLASH_ATTENTION)(q, k, v, call)
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise Unsupported("torch.nn.attention.varlen came with PyTorch 2.10") from error
    parameters = inspect.signature(varlen_attn).parameters
    if "window_size" not in parameters:
        raise Unsupported("torch.nn.attention.varlen takes window_size, and so causal masks, from PyTorch 2.11 on")
    gqa = {} if q.shape[1] == k.shape[1] else {"enable_gqa": True}
    if not gqa.keys() <= parameters.keys():
        raise Unsupported("torch.nn.attention.varlen takes grouped heads from PyTorch 2.12 on")
    cu_seqlens = call.cu_seqlens, call.cu_seqlens
    window = (call.window, 0 if call.causal else -1)
    return varlen_attn(q, k, v, *cu_seqlens, call.max_seqlen, call.max_seqlen, window_size=window, **gqa)


def _flex():
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # one process times many shapes: over the limit it would fall back to an unfused version
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
    compiled = torch.compile(flex_attention, dynamic=False)
    masks = {}

    def mask_of(seqlen_q, seqlen_k, call, device):
        document = None
        if call.cu_seqlens is not None:
            lengths = call.cu_seqlens.diff()
            document = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)

        def visible(b, h, i, j):
            seen = i >= j if call.causal else i >= 0
            if call.window >= 0:
                seen = seen & (i - j <= call.window)
            return seen if document is None else seen & (document[i] == document[j])

        return create_block_mask(visible, None, None, seqlen_q, seqlen_k, device=device)

    def run(q, k, v, call):
        if call.cu_seqlens is not None:
            q, k, v = (x[None] for x in (q, k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        key = q.shape[2], k.shape[2], call
        if key not in masks:
            everything = not call.causal and call.window < 0 and call.cu_seqlens is None
            masks[key] = None if everything else mask_of(q.shape[2], k.shape[2], call, q.device)
        out = compiled(q, k, v, block_mask=masks[key], enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)
        return out if call.cu_seqlens is None else out[0]

    return run
