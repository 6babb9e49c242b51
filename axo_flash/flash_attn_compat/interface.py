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
]


def _get_block_size_n(device, head_dim: int, is_dropout: bool, is_causal: bool) -> int:
    """How many keys share one maximum in S_dmask, for those who normalise it: ours is of the whole row."""
    return 1 << 30
