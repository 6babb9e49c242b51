"""Put our attention into a Llama or Mistral model, and take it out again.

A patched attention module keeps its identity: only its `__class__` changes, to a subclass of its own class that
overrides `forward`. So isinstance, parameter names, the state_dict, LoRA layers, hooks and checkpoints stay what they
were. The model's attention implementation is switched with it, as the mask is made by whichever is set there.

    report = axo_flash.patch_model(model)    # a loaded model, PEFT-wrapped or not; report.undo() takes it back
    with axo_flash.patched(model): ...
    axo_flash.patch_llama()                  # every Llama made from now on, until unpatch_llama()
"""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache

import torch

from axo_flash.attention import NAME, attention, register, takes_names, weight_dtype
from axo_flash.kernels.backends import BACKENDS, Choice, choose_backend
from axo_flash.kernels.spec import AttentionSpec
from axo_flash.ops import calls


@dataclass(frozen=True)
class Family:
    """A row of FAMILIES: where a model family keeps its attention.

    Args:
        name: as users call it.
        module: transformers' module of the family.
        attention: name of the attention class there.
        decoder: name of the class there that makes the layers.
        window: config attribute that holds the sliding window, or None if the family has none.
    """

    name: str
    module: str
    attention: str
    decoder: str
    window: str | None = None

    def attention_class(self) -> type | None:
        """The attention class; None if its module was never imported, so that no model of this family can exist."""
        return getattr(sys.modules.get(self.module), self.attention, None)


FAMILIES = (
    Family(
        name="llama",
        module="transformers.models.llama.modeling_llama",
        attention="LlamaAttention",
        decoder="LlamaModel",
    ),
    Family(
        name="mistral",
        module="transformers.models.mistral.modeling_mistral",
        attention="MistralAttention",
        decoder="MistralModel",
        window="sliding_window",
    ),
)


class FlashAttention:
    """Mixed into the family's own attention class. Everything that undoing needs is on the class.

    Class attributes:
        family: the row of FAMILIES. original: the class of the module before. backend: as given to patch_model.
        previous: the attention implementation that the model had before.
    """

    family: Family
    original: type
    backend: str
    previous: str

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values=None,
        **kwargs,
    ) -> tuple[torch.Tensor, None]:
        """The forward of the class it replaces: (batch, seqlen, hidden) to the same, and None for the weights.

        The projections are called as modules, so LoRA and quantized layers act; the rotary embedding is looked up in
        transformers' module at each call, so that whoever replaces it there (Liger) is heard; so are Axolotl's fused
        LoRA projections, which it leaves on the module as apply_qkv and apply_o. Our function is called directly, so
        the backend of this model holds whatever others register.
        """
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (x.view(heads).transpose(1, 2) for x in _project(self, hidden_states))
        cos, sin = position_embeddings
        query, key = sys.modules[self.family.module].apply_rotary_pos_emb(query, key, cos, sin)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        out, _ = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=_window(self.family, self.config),
            past_key_values=past_key_values,
            backend=self.backend,
            **kwargs,
        )
        return vars(self).get("apply_o", self.o_proj)(out.flatten(-2)), None

    def __reduce__(self):  # the class is made at run time, so a pickle names what it is made from
        return _unpickle, (self.family, self.original, self.backend, self.previous), self.__dict__


@dataclass
class PatchReport:
    """What `patch_model` did.

    Attributes:
        family: row of FAMILIES ("llama", "mistral"). layers: attention modules patched.
        backend: the one that serves the model as it is loaded, in training if it has attention dropout.
        reason: why it, and not a better one.
    """

    family: str
    layers: int
    backend: str
    reason: str
    _model: torch.nn.Module = field(repr=False)
    _calls_before: Counter = field(repr=False, default_factory=lambda: Counter(calls))

    def undo(self) -> None:
        """`unpatch_model` of the model."""
        unpatch_model(self._model)

    def calls(self) -> dict[str, int]:
        """Attention calls since patching that each backend really computed in this process (`ops.calls`)."""
        return dict(calls - self._calls_before)


def patch_model(model: torch.nn.Module, backend: str = "auto", *, dtype: torch.dtype | None = None) -> PatchReport:
    """Replace the attention of a loaded Llama or Mistral model, PEFT-wrapped or not, by ours. Doing it twice changes
    nothing; with another backend, it changes the backend.

    Args:
        backend: "auto" (the best that serves each call) or the name of one that must.
        dtype: in which attention will compute, if not in the weights': a model in fp32 that will run under autocast to
            bf16. Only the choice reported and checked here depends on it; each call goes by its own tensors.

    Raises:
        ValueError: no attention of a family in FAMILIES in the model, or of a class with a forward of its own; no
            backend that can serve, with every reason.
    """
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"patch_model needs a model (a torch.nn.Module), got {type(model).__name__}")
    modules = [module for module in model.modules() if _family(module) is not None]
    if not modules:
        raise ValueError(f"nothing to patch: {_found(model)}; supported are {_supported()}{_by_name(model)}")
    families = {_family(module).name: _family(module) for module in modules}
    if len(families) > 1:
        raise ValueError(f"the model mixes the families {sorted(families)}: patch its parts one by one")
    owners = _owners(model, modules)
    for module in modules:
        _check_module(module)
    choice = _choose(modules[0], backend, dtype or weight_dtype(modules[0]))
    register()
    for module in modules:
        owner = owners[id(module.config)]
        original, previous = type(module), owner.config._attn_implementation
        if isinstance(module, FlashAttention):
            original, previous = module.original, module.previous
        _set_class(module, _flash_class(_family(module), original, backend, previous))
    for owner in owners.values():
        owner.set_attn_implementation(NAME)
    return PatchReport(*families, len(modules), choice.name, choice.reason, model)


def unpatch_model(model: torch.nn.Module) -> int:
    """Take `patch_model` back: the very same classes, and the attention implementation that the model had (unless it
    was set to another one since). Returns how many attention modules that were; 0 if none was patched."""
    modules = [module for module in model.modules() if isinstance(module, FlashAttention)]
    owners = _owners(model, modules)
    for module in modules:
        owner, previous = owners[id(module.config)], module.previous
        _set_class(module, module.original)
        if owner.config._attn_implementation == NAME != previous:
            owner.set_attn_implementation(previous)
    return len(modules)


def patched_layers(model: torch.nn.Module) -> int:
    """How many attention modules of `model` compute by ours: patched, and no other tool's forward put over it."""
    return sum(
        isinstance(module, FlashAttention)
        and type(module).forward is FlashAttention.forward
        and ("forward" not in vars(module) or "_old_forward" in vars(module))
        for module in model.modules()
    )


@contextmanager
def patched(model: torch.nn.Module, backend: str = "auto") -> Iterator[PatchReport]:
    """`patch_model` for the length of a with block. Then the model is again what it was before, unpatched or patched.

    What the block computes it must also differentiate: gradient checkpointing computes a layer again in its backward.
    """
    modules = model.modules() if isinstance(model, torch.nn.Module) else ()  # what is none, patch_model refuses
    before = {module: type(module) for module in modules if isinstance(module, FlashAttention)}
    report = patch_model(model, backend)
    try:
        yield report
    finally:
        report.undo()
        for module, cls in before.items():
            _set_class(module, cls)
        for owner in _owners(model, list(before)).values():
            owner.set_attn_implementation(NAME)


def patch_llama(backend: str = "auto") -> None:
    """Patch every Llama model made from now on, by from_pretrained, from_config or its class, until `unpatch_llama`."""
    _patch_family("llama", backend)


def unpatch_llama() -> None:
    """Take `patch_llama` back. Models made meanwhile stay patched; `unpatch_model` is for those."""
    _unpatch_family("llama")


def patch_mistral(backend: str = "auto") -> None:
    """`patch_llama` for Mistral models."""
    _patch_family("mistral", backend)


def unpatch_mistral() -> None:
    """Take `patch_mistral` back, as `unpatch_llama` does."""
    _unpatch_family("mistral")


# --- classes --------------------------------------------------------------------------------------------------------


@cache
def _flash_class(family: Family, original: type, backend: str, previous: str) -> type:
    attributes = {"family": family, "original": original, "backend": backend, "previous": previous}
    return type(f"Flash{original.__name__}", (FlashAttention, original), {"__module__": __name__, **attributes})


def _unpickle(family: Family, original: type, backend: str, previous: str) -> torch.nn.Module:
    register()
    cls = _flash_class(family, original, backend, previous)
    return cls.__new__(cls)


def _project(module: torch.nn.Module, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values (batch, seqlen, heads * head_dim)."""
    if "apply_qkv" in vars(module):
        return module.apply_qkv(hidden_states)
    return module.q_proj(hidden_states), module.k_proj(hidden_states), module.v_proj(hidden_states)


def _set_class(module: torch.nn.Module, cls: type) -> None:
    module.__class__ = cls
    if "_old_forward" in vars(module):  # accelerate's hooks (device_map) call the forward that they found
        module._old_forward = cls.forward.__get__(module)


def _family(module: torch.nn.Module) -> Family | None:
    for family in FAMILIES:
        cls = family.attention_class()
        if cls is not None and isinstance(module, cls):
            return family
    return None


def _owners(model: torch.nn.Module, modules: list[torch.nn.Module]) -> dict:
    """The transformers model that each config of `modules` belongs to, by the config's id."""
    from transformers import PreTrainedModel

    owners = {id(m.config): m for m in reversed(list(model.modules())) if isinstance(m, PreTrainedModel)}
    orphans = [type(module).__name__ for module in modules if id(module.config) not in owners]
    if orphans:
        raise ValueError(f"{orphans[0]} without its model: give the whole model, got {type(model).__name__}")
    return {id(module.config): owners[id(module.config)] for module in modules}


def _check_module(module: torch.nn.Module) -> None:
    own = _family(module).attention_class().forward
    if not isinstance(module, FlashAttention) and type(module).forward is not own:
        raise ValueError(f"{type(module).__name__} has a forward of its own, which patching would replace")
    if "forward" in vars(module) and "_old_forward" not in vars(module):
        raise ValueError(f"the forward of this {type(module).__name__} was replaced by another tool: undo that first")


def _choose(module: torch.nn.Module, backend: str, dtype: torch.dtype) -> Choice:
    """The backend that serves this attention module, for plain and for packed batches."""
    config, device = module.config, module.q_proj.weight.device
    if device.type == "meta":  # a model that from_pretrained is about to fill: nothing is known yet
        if backend != "auto" and backend not in [row.name for row in BACKENDS]:
            raise ValueError(f"unknown attention backend {backend!r}: 'auto' or {[row.name for row in BACKENDS]}")
        return Choice("unknown", None, "the model has no weights yet; each call chooses")
    window = _window(_family(module), config)
    spec = {
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": module.head_dim,
        "dtype": str(dtype).removeprefix("torch."),
        "softmax_scale": module.scaling,
        "causal": True,
        "window_size": (-1, -1) if window is None else (window - 1, 0),
        "dropout_p": module.attention_dropout,  # in training, which is what it has to be able to serve
    }
    choose_backend(AttentionSpec(**spec, varlen=True), device, backend)
    return choose_backend(AttentionSpec(**spec), device, backend)


def _window(family: Family, config) -> int | None:
    return getattr(config, family.window) if family.window else None


def _supported() -> str:
    return ", ".join(f"{family.name} ({family.attention})" for family in FAMILIES)


def _by_name(model: torch.nn.Module) -> str:
    """What else to do with a model of another family, if anything."""
    from transformers import PreTrainedModel

    if not any(isinstance(m, PreTrainedModel) and takes_names(type(m)) for m in model.modules()):
        return ""
    return f". This model takes attention by name: import axo_flash.hf, and model.set_attn_implementation({NAME!r})"


def _found(model: torch.nn.Module) -> str:
    names = sorted({type(m).__name__ for m in model.modules() if "attention" in type(m).__name__.lower()})
    return f"{type(model).__name__} has " + (f"the attention classes {', '.join(names)}" if names else "no attention")


# --- models made later ----------------------------------------------------------------------------------------------

_original_inits: dict[str, object] = {}


def _patch_family(name: str, backend: str) -> None:
    if backend not in ("auto", *(row.name for row in BACKENDS)):
        raise ValueError(f"unknown attention backend {backend!r}: 'auto' or one of {[row.name for row in BACKENDS]}")
    _unpatch_family(name)
    family = next(family for family in FAMILIES if family.name == name)
    decoder = getattr(importlib.import_module(family.module), family.decoder)
    original_init = _original_inits[name] = decoder.__init__

    def __init__(self, *args, **kwargs):
        original_init(self, *args, **kwargs)
        patch_model(self, backend)

    decoder.__init__ = __init__


def _unpatch_family(name: str) -> None:
    if name in _original_inits:
        family = next(family for family in FAMILIES if family.name == name)
        getattr(sys.modules[family.module], family.decoder).__init__ = _original_inits.pop(name)
