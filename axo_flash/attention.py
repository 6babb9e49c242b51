"""The Hugging Face seam: transformers' attention interface in front of our functions.

Every name, layout and convention of transformers is translated here and nowhere else. `register()` makes
`attn_implementation="axo_fa"` work for any model, through the public registries (no "flash" in the name: transformers 5
takes such a name for the flash-attn package and refuses it). The mask function is registered with the attention
function, as transformers drops padding masks of a name without one.
"""

from __future__ import annotations

from functools import cache

import torch

from axo_flash.layout import Layout, find_layout
from axo_flash.ops import flash_attn_func, flash_attn_varlen_func
from axo_flash.varlen import pad, unpad

NAME = "axo_fa"


def register() -> str:
    """Register `attention` and `attention_mask` with transformers under NAME, which it returns. Idempotent."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, attention_mask)
    return NAME


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    *,
    is_causal: bool | None = None,
    position_ids: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    output_attentions: bool | None = False,
    cache=None,
    past_key_values=None,
    backend: str = "auto",
    **_,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers' AttentionInterface.

    Args:
        module: the attention module; its `is_causal` is read, and for the compute dtype its config and weights.
        query: (batch, num_heads, seqlen_q, head_dim), rotated. key, value: (batch, num_kv_heads, seqlen_k, head_dim),
            as the cache returns them; never repeated. fp32 ones of a half-precision model are cast to its dtype.
        attention_mask: what `attention_mask` below made: None, or bool (batch, n): the first n keys, True = token.
        dropout: probability with which a weight is dropped; 0 when not training, as the modules themselves see to.
        sliding_window: W: a query sees W keys, its own included.
        position_ids: (batch or 1, seqlen_q); rows in which they restart are packed documents, kept apart.
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: documents of the flattened batch, as packing collators
            give them; position_ids and their restarts are then not looked at.
        softcap: scores become softcap * tanh(scores / softcap); None or 0 = off.
        s_aux: (num_heads,), the sinks: a logit a head that joins the softmax's denominator.
        past_key_values: the cache behind key and value, if the caller knows it: documents packed into one are
            remembered, so that going on from it is refused.
        backend: for `flash_attn_func`.

    Returns:
        out (batch, seqlen_q, num_heads, head_dim) in query's dtype, and None for the weights.

    Raises:
        ValueError: attention weights, 4-D masks, paged caches, or packing that would leak.
    """
    _refuse_unsupported(module, attention_mask, output_attentions, cache, position_ids)
    if getattr(attention_mask, "axo_flash_packed", False):
        if position_ids is None and cu_seq_lens_q is None:
            raise ValueError(
                f"{NAME}: the batch is packed, and {type(module).__name__} is not handed the position_ids that tell its "
                "documents apart: also pass cu_seq_lens_q, cu_seq_lens_k, max_length_q and max_length_k to the model"
            )
        attention_mask = None  # all of it are tokens
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if sliding_window is not None and not causal:
        raise ValueError(f"{NAME}: sliding_window={sliding_window} needs causal attention; use 'sdpa' for this model")
    dtype = _compute_dtype(module, query, key, value)
    q, k, v = (x.transpose(1, 2).to(dtype) for x in (query, key, value))  # views (batch, seqlen, heads, head_dim)
    if attention_mask is not None:  # the tail of a static cache is empty
        k, v = k[:, : attention_mask.shape[1]], v[:, : attention_mask.shape[1]]
    options = {
        "softmax_scale": scaling,
        "causal": causal,
        "window_size": (-1, -1) if sliding_window is None else (sliding_window - 1, 0),
        "dropout_p": dropout or 0,  # never 0.0: see flash_attn_func
        "softcap": softcap or 0,
        "sinks": s_aux,
        "backend": backend,
    }
    batch, seqlen_q, seqlen_k = *q.shape[:2], k.shape[1]
    given = cu_seq_lens_q is not None
    layout = find_layout(attention_mask, None if given else position_ids, batch, seqlen_q, seqlen_k, q.device)
    if given:
        layout = _given_layout(layout, cu_seq_lens_q, cu_seq_lens_k, q, k)
    _refuse_leaks(layout, past_key_values, sliding_window, seqlen_q, seqlen_k)
    if layout is None:
        out = flash_attn_func(q, k, v, **options)
    else:
        out = _attend_varlen(q, k, v, layout, max_length_q, max_length_k, options)
    return out.to(query.dtype), None


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function=None,
    attention_mask: torch.Tensor | None = None,
    use_vmap: bool = False,
    local_size: int | None = None,
    config=None,
    device=None,
    **kwargs,
) -> torch.Tensor | None:
    """A mask function of transformers' AttentionMaskInterface: which keys are tokens; never O(seqlen^2).

    transformers calls it once a forward and hands what it returns to every layer.

    Args:
        q_length, q_offset: the queries stand at positions q_offset ... q_offset + q_length - 1.
        kv_length, kv_offset: the keys stand at kv_offset ... kv_offset + kv_length - 1; those past the queries are the
            empty tail of a static cache, whose q_offset is a tensor.
        attention_mask: the user's, bool (batch, positions).

    Returns:
        None if all keys are tokens and no row is packed, else bool (batch, n): the first n keys, True = token. The
        queries are the last of the n columns; only a single query (whose column is its last True one) may be followed
        by an empty tail.
    """
    if use_vmap or "allow_is_bidirectional_skip" in kwargs:
        raise ValueError(_OTHER_MASK)
    if local_size is not None and local_size != getattr(config, "sliding_window", None):
        raise ValueError(f"{NAME} has no chunked attention (attention_chunk_size={local_size}); use 'sdpa'")
    if config is not None and (other := _own_attention(type(config))):
        raise ValueError(f"{NAME}: {other} computes attention of its own and would never call ours: use 'eager'")
    deviates = not kwargs.get("allow_is_causal_skip", True) and q_length > 1 and mask_function is not None
    if deviates:  # from what the other arguments say, by packed rows or by blocks that see both ways
        _refuse_blocks(mask_function, batch_size, q_length, q_offset, device)
    if isinstance(q_offset, torch.Tensor) and (q_length == 1 or torch.compiler.is_compiling()):
        return _static_cache_mask(batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask, device)
    existing = int(q_offset) + q_length - kv_offset  # of the kv_length keys
    if attention_mask is None:
        packed = deviates and not torch.compiler.is_compiling()
        if existing == kv_length and not packed:
            return None
        everything = torch.ones((batch_size, existing), dtype=torch.bool, device=device)
        if packed:
            everything.axo_flash_packed = True  # for `attention`, which has to be told the documents then
        return everything
    if attention_mask.shape[1] == existing:  # also what `generate` made here beforehand and hands in again
        return attention_mask
    if attention_mask.shape[1] < kv_offset + existing:
        raise ValueError(
            f"{NAME}: attention_mask has {attention_mask.shape[1]} columns for {kv_offset + existing} tokens (cached "
            "and new): pass one that covers all of them, or none"
        )
    return attention_mask[:, kv_offset : kv_offset + existing]


def _static_cache_mask(batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask, device):
    """`attention_mask` where q_offset is a tensor that nobody should wait for: all kv_length columns, False past the
    query."""
    if q_length > 1:
        raise ValueError(
            f"{NAME}: {q_length} queries against a static cache cannot be compiled, as their place in the cache is not "
            "known while compiling: run the prefill eagerly (as `generate` does) and compile the decoding"
        )
    column = torch.arange(kv_offset, kv_offset + kv_length, device=device)
    existing = (column < q_offset + q_length).expand(batch_size, kv_length)
    if attention_mask is None:
        return existing
    missing = max(kv_offset + kv_length - attention_mask.shape[1], 0)
    return existing & torch.nn.functional.pad(attention_mask, (0, missing))[:, kv_offset : kv_offset + kv_length]


def _attend_varlen(q, k, v, layout: Layout, max_length_q, max_length_k, options):
    batch, seqlen_q = q.shape[:2]
    q, k, v = (
        x.flatten(0, 1) if indices is None else unpad(x, indices)
        for x, indices in ((q, layout.q_indices), (k, layout.k_indices), (v, layout.k_indices))
    )  # (tokens, heads, head_dim)
    out = flash_attn_varlen_func(
        q, k, v, layout.cu_seqlens_q, layout.cu_seqlens_k, max_length_q, max_length_k, **options
    )
    if layout.q_indices is None:
        return out.unflatten(0, (batch, seqlen_q))
    return pad(out, layout.q_indices, batch, seqlen_q)


def _given_layout(padding: Layout | None, cu_seqlens_q, cu_seqlens_k, q, k) -> Layout:
    """The layout that a collator gave, unless the mask speaks of padding too."""
    message = (
        f"{NAME}: got cu_seq_lens_q and an attention_mask with padding, which are two statements about one batch: "
        "leave the mask out and count padding as a document of its own"
    )
    if padding is not None:
        if not torch.compiler.is_compiling():
            raise ValueError(message)
        torch._assert_async(padding.cu_seqlens_k[-1] == k.shape[0] * k.shape[1], message)
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    cu_seqlens_q, cu_seqlens_k = (cu.to(device=q.device, dtype=torch.int32) for cu in (cu_seqlens_q, cu_seqlens_k))
    return Layout(cu_seqlens_q, cu_seqlens_k, packed=True)


def _compute_dtype(module, query, key, value) -> torch.dtype:
    """The dtype to compute in. fp32 inputs of a model in half precision come from fp32 norms (as k-bit training makes
    them): transformers' own flash path casts those, by the same rules."""
    if torch.float32 not in (query.dtype, key.dtype, value.dtype):
        return query.dtype
    if torch.is_autocast_enabled(query.device.type):
        return torch.get_autocast_dtype(query.device.type)
    return weight_dtype(module)


def weight_dtype(module: torch.nn.Module) -> torch.dtype:
    """The dtype that an attention module computes in: its linear weights', or config.dtype where they are quantized."""
    weights = (layer.weight for layer in module.modules() if isinstance(layer, torch.nn.Linear))
    dtype = next((weight.dtype for weight in weights), torch.float32)
    if dtype.is_floating_point and dtype.itemsize > 1 and not getattr(module.config, "_is_quantized", False):
        return dtype
    return module.config.dtype or torch.float32


# --- refusals -------------------------------------------------------------------------------------------------------

_OTHER_MASK = f"{NAME} computes causal masks with padding, packing and windows; use 'sdpa' for other masks"


def takes_names(model_class: type) -> bool:
    """Whether a transformers model of this class calls the attention that is registered under the name it was given."""
    return model_class._can_set_attn_implementation()


@torch.compiler.assume_constant_result  # beside @cache, which torch.compile would trace through
def _own_attention(config_class: type) -> str | None:
    return _own_attention_cached(config_class)


@cache
def _own_attention_cached(config_class: type) -> str | None:
    """The model class of this configuration if it is of the older kind (BLOOM, XGLM, ...), which takes any name and
    computes attention of its own, to which "no mask" means that a token sees the later ones."""
    from transformers import MODEL_MAPPING

    known = MODEL_MAPPING.get(config_class, ())
    known = known if isinstance(known, tuple) else (known,)
    return next((model_class.__name__ for model_class in known if not takes_names(model_class)), None)


def _refuse_blocks(mask_function, batch_size, q_length, q_offset, device) -> None:
    """Blocks whose tokens see one another both ways (images), of which only the mask function knows."""
    batch = torch.arange(batch_size, device=device)[:, None]
    query = q_offset + torch.arange(q_length - 1, device=device)[None]
    sees_the_next = mask_function(batch, torch.zeros_like(batch), query, query + 1).any()
    if torch.compiler.is_compiling():
        torch._assert_async(~sees_the_next, _OTHER_MASK)
    elif sees_the_next:
        raise ValueError(_OTHER_MASK)


def _refuse_unsupported(module, mask, output_attentions, cache, position_ids):
    errors = []
    if output_attentions:
        errors.append("attention weights are never formed: leave output_attentions off, or use eager attention")
    if cache is not None:
        errors.append("paged caches (continuous batching) are not supported: use attn_implementation='sdpa' for them")
    if position_ids is not None and position_ids.ndim != 2:
        errors.append(f"position_ids must be (batch, seqlen), got {tuple(position_ids.shape)}")
    if mask is not None and mask.ndim != 2:
        errors.append(
            f"the mask must be (batch, seqlen), got {tuple(mask.shape)}. 4-D masks are for eager and sdpa attention; "
            "for packed rows pass position_ids that restart, or cu_seq_lens_q. If you passed none, the model made it, "
            f"as its attention is set to {module.config._attn_implementation!r}: set it to {NAME!r}"
        )
    if errors:
        raise ValueError(f"{NAME}: " + "; ".join(errors))


def _refuse_leaks(layout: Layout | None, cache, sliding_window, seqlen_q, seqlen_k):
    """What a layout cannot say exactly: windows across holes, and a cache of documents that is gone on with."""
    if layout is not None and sliding_window is not None and sliding_window < seqlen_k and layout.holes is not False:
        message = (
            f"{NAME}: the mask has padding between tokens of a row, and a sliding window of {sliding_window} counts "
            "that padding: pad on the left, or use attn_implementation='sdpa'"
        )
        if isinstance(layout.holes, torch.Tensor):
            torch._assert_async(~layout.holes, message)
        else:
            raise ValueError(message)
    if cache is None or torch.compiler.is_compiling():
        return
    if seqlen_q == seqlen_k:
        cache.axo_flash_packed = layout is not None and layout.packed
    elif getattr(cache, "axo_flash_packed", False):
        raise ValueError(
            f"{NAME}: this KV cache was filled with packed rows, and going on from it would let every document see the "
            "others: generate from one document a row"
        )
