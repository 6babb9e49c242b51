"""What `flash_attn.flash_attn_interface` offers: flash-attn 2.8's functions, and a name that its tests import."""

from axo_flash.ops import flash_attn_func, flash_attn_varlen_func
from axo_flash.packed import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]


def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, cache_batch_idx=None,
    cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False,
):  # fmt: skip
    """There to be imported and inspected, as transformers and others do whatever they call later; calling it is an error."""
    raise NotImplementedError(
        "flash_attn_with_kvcache: axo_flash does not decode in place from a KV cache yet; write the new keys and values "
        "into the cache yourself and call flash_attn_func or flash_attn_varlen_func on what is filled"
    )


def _get_block_size_n(device, head_dim: int, is_dropout: bool, is_causal: bool) -> int:
    """How many keys share one maximum in S_dmask, for those who normalise it: ours is of the whole row."""
    return 1 << 30
