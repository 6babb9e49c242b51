"""Flash attention in Triton for fine-tuning Llama-2 and Mistral models. Importing it needs torch alone."""

import importlib

from axo_flash.ops import flash_attn_func, flash_attn_varlen_func

__version__ = "0.1.0"

# names that need transformers, imported at first use
_LAZY = {
    "patch_model": "axo_flash.patch",
    "unpatch_model": "axo_flash.patch",
    "patched": "axo_flash.patch",
    "patch_llama": "axo_flash.patch",
    "patch_mistral": "axo_flash.patch",
}
__all__ = ["__version__", "flash_attn_func", "flash_attn_varlen_func", *_LAZY]


def __getattr__(name):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'axo_flash' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
