"""Flash attention in Triton for fine-tuning Llama-2 and Mistral models. Importing it needs torch alone."""

import importlib

__version__ = "0.1.0"

# where each public name lives, imported at first use: the functions need torch, the patches transformers
_HOMES = {
    "flash_attn_func": "axo_flash.ops",
    "flash_attn_varlen_func": "axo_flash.ops",
    "flash_attn_qkvpacked_func": "axo_flash.packed",
    "flash_attn_kvpacked_func": "axo_flash.packed",
    "flash_attn_varlen_qkvpacked_func": "axo_flash.packed",
    "flash_attn_varlen_kvpacked_func": "axo_flash.packed",
    "patch_model": "axo_flash.patch",
    "unpatch_model": "axo_flash.patch",
    "patched": "axo_flash.patch",
    "patch_llama": "axo_flash.patch",
    "unpatch_llama": "axo_flash.patch",
    "patch_mistral": "axo_flash.patch",
    "unpatch_mistral": "axo_flash.patch",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name):
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'axo_flash' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
