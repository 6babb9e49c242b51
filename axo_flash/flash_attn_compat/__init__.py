"""`import flash_attn` that resolves to axo_flash, for code that demands flash-attn.

    from axo_flash.flash_attn_compat import install

    print(install())  # before importing what demands flash-attn
    from flash_attn import flash_attn_func

What is offered is flash-attn 2.8's surface as far as MODULES goes. transformers' attn_implementation="flash_attention_2",
among others, then computes by ours.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import re
import sys
from types import ModuleType

VERSION = "2.8.4"  # the flash-attn whose surface this is
# flash-attn's module: ours, whose __all__ it has (and, of the interface, a name that flash-attn's tests import)
MODULES = {
    "flash_attn": "axo_flash.flash_attn_compat.interface",
    "flash_attn.flash_attn_interface": "axo_flash.flash_attn_compat.interface",
    "flash_attn.bert_padding": "axo_flash.flash_attn_compat.bert_padding",
    "flash_attn.layers": None,
    "flash_attn.layers.rotary": "axo_flash.flash_attn_compat.rotary",
}
_PRIVATE = {"flash_attn.flash_attn_interface": ["_get_block_size_n"]}

_replaced: dict[str, ModuleType] = {}


def install(replace: bool = False) -> str:
    """Make `import flash_attn` and its submodules in MODULES resolve to axo_flash, in this process.

    importlib.metadata then knows a flash-attn of version VERSION too, as libraries ask it. A flash-attn that is installed
    stays, unless `replace`. Doing it twice changes nothing.

    Returns:
        What `import flash_attn` gives now, in words.
    """
    if _finder in sys.meta_path:
        return _words()
    if not replace and _real_exists():
        return (
            f"flash_attn {_real_version()} is installed and stays what `import flash_attn` gives: "
            "install(replace=True) puts axo_flash in its place"
        )
    _replaced.update({name: sys.modules.pop(name) for name in _loaded()})
    sys.meta_path.insert(0, _finder)
    importlib.invalidate_caches()
    return _words()


def uninstall() -> None:
    """Take `install` back. Modules that imported from flash_attn meanwhile keep what they have."""
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
        for name in _loaded():
            del sys.modules[name]
        sys.modules.update(_replaced)
        _replaced.clear()


def _words() -> str:
    covered = ", ".join(name.removeprefix("flash_attn.") for name, ours in MODULES.items() if ours and "." in name)
    return f"import flash_attn gives axo_flash, with flash-attn {VERSION}'s surface ({covered})"


def _loaded() -> list[str]:
    return [name for name in sys.modules if name == "flash_attn" or name.startswith("flash_attn.")]


def _real_exists() -> bool:
    if "flash_attn" in sys.modules:
        return True
    return importlib.util.find_spec("flash_attn") is not None


def _real_version() -> str:
    try:
        return importlib.metadata.version("flash_attn")
    except importlib.metadata.PackageNotFoundError:
        return getattr(sys.modules.get("flash_attn"), "__version__", "of unknown version")


class _Finder(importlib.metadata.DistributionFinder):
    """Finds the modules of MODULES, and flash-attn's metadata."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in MODULES:
            return None
        spec = importlib.machinery.ModuleSpec(fullname, self, origin=__file__, is_package=True)
        spec.has_location = True  # the module gets a __file__, as those who look for it expect
        return spec

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        name = module.__name__
        module.__doc__ = f"axo_flash in the place of {name}: see axo_flash.flash_attn_compat."
        module.__version__ = VERSION
        module.__getattr__ = lambda attribute: _no_attribute(name, attribute)
        if MODULES[name]:
            ours = importlib.import_module(MODULES[name])
            module.__all__ = list(ours.__all__)
            vars(module).update({n: getattr(ours, n) for n in (*ours.__all__, *_PRIVATE.get(name, []))})

    def find_distributions(self, context=None):
        name = getattr(context, "name", None)
        if name is None or re.sub(r"[-_.]+", "-", name).lower() == "flash-attn":
            yield _Distribution()


class _Distribution(importlib.metadata.Distribution):
    """The metadata by which libraries look whether flash-attn is installed, and which."""

    def read_text(self, filename):
        return {
            "METADATA": f"Metadata-Version: 2.1\nName: flash-attn\nVersion: {VERSION}\nSummary: axo_flash in its place\n",
            "top_level.txt": "flash_attn\n",
        }.get(filename)

    def locate_file(self, path):
        return path


def _no_attribute(module: str, name: str):
    raise AttributeError(f"{module} is axo_flash here, which has no {name} (axo_flash.flash_attn_compat)")


_finder = _Finder()
