"""The plugin for Axolotl: its fine-tuning through our attention, from an otherwise unmodified YAML.

    plugins:
      - axo_flash.integrations.axolotl.AxoFlashPlugin

`register` takes what the YAML says of attention out of it before Axolotl acts on it (Axolotl would look for the package
flash-attn, or patch the attention itself); `post_model_build` patches the model that was loaded. What Axolotl derives
from the name of an attention, the shape of packed batches and the dtype of norms and embeddings, stays that of the name
that was asked for. A run in which the plugin does not take effect ends with an error, at its first step at the latest.
"""

from __future__ import annotations

from typing import Any, Literal

try:
    import torch
    from axolotl.integrations.base import BasePlugin, PluginManager
    from axolotl.utils.logging import get_logger
    from axolotl.utils.schemas import enums
    from pydantic import BaseModel, Field
    from transformers import TrainerCallback

    from axo_flash.attention import NAME
    from axo_flash.errors import UserError
    from axo_flash.kernels.backends import BACKENDS
    from axo_flash.patch import FAMILIES, PatchReport, patch_model, patched_layers
except ImportError as error:  # of a plugin that raises one, Axolotl prints it and trains without the plugin
    raise RuntimeError(
        f"axo_flash's plugin for Axolotl cannot be loaded: {error}. It needs Axolotl (pip install axolotl) and "
        "axo_flash with its kernels (pip install 'axo-flash[flash-attn]') in one environment"
    ) from error

# in Axolotl's namespace, as it shows INFO of its own loggers alone
LOG = get_logger("axolotl.axo_flash")

# What Axolotl is told instead. It acts on most other names: patches them, looks for their packages, warns about them.
PLACEHOLDER = "eager"
DEFAULT = "sdpa"  # what transformers takes where the YAML names no attention

# Names of attn_implementation that compute the function that ours does, which may therefore take their place
REPLACED = (
    NAME,
    *("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flash_attention_torch"),
    *("flex_attention", "xformers", "kernels-community/flash-attn2", "kernels-community/flash-attn3"),
)
# Keys of Axolotl that the plugin cannot be combined with: key -> (which of its true values are meant, reason)
REFUSED = {
    "context_parallel_size": (lambda value: value != 1, "ring attention over several GPUs is another attention"),
    "sequence_parallel_degree": (lambda value: value != 1, "ring attention over several GPUs is another attention"),
    "scaling_softmax": (bool, "it changes what attention computes"),
    "flash_attn_cross_entropy": (bool, "it is a layer of the package flash-attn, which is not used: try a Liger loss"),
    "flash_attn_fuse_mlp": (bool, "it is a layer of the package flash-attn, which is not used"),
    "batch_flattening": (lambda value: value is True, "Axolotl ties it to other attentions: use sample_packing"),
}


class AxoFlashArgs(BaseModel):
    """The keys that the plugin adds to Axolotl's YAML."""

    attention_backend: Literal[("auto", *(row.name for row in BACKENDS))] = Field(
        default="auto", description="The kernels that must serve: a name, or auto for the best on this machine."
    )
    axo_flash_replaces: str | None = Field(
        default=None, description="Set by the plugin: the attn_implementation in whose place its attention stands."
    )


class AxoFlashPlugin(BasePlugin):
    """Runs a Llama's or Mistral's fine-tuning by Axolotl through axo_flash's attention.

    Raises UserError (a ValueError) for a YAML or a model that it cannot serve, RuntimeError where the model that is
    trained does not compute by it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.report: PatchReport | None = None  # of the model that is trained
        self.steps = 0
        self._before: dict[str, Any] = {}

    # --- the YAML ---------------------------------------------------------------------------------------------------

    def get_input_args(self) -> str:
        """Dotted path of the plugin's own keys."""
        return f"{__name__}.{AxoFlashArgs.__name__}"

    def register(self, cfg: dict) -> None:
        """Take the choice of attention out of the raw YAML, or refuse it: before Axolotl validates anything."""
        if not self._concerns(cfg) or cfg.get("axo_flash_replaces"):  # a Ray worker gets what was registered already
            return
        flags = [flag for flag in enums.LEGACY_ATTN_FLAG_TO_IMPL if cfg.get(flag)]
        name = cfg.get("attn_implementation") or (enums.LEGACY_ATTN_FLAG_TO_IMPL[flags[0]] if flags else DEFAULT)
        if (flags and cfg.get("attn_implementation")) or not _is_known(name):
            return  # Axolotl's validation says what is wrong with that
        _refuse(cfg, name)
        touched = (*enums.LEGACY_ATTN_FLAG_TO_IMPL, "attn_implementation", "sdpa_varlen", "axo_flash_replaces")
        self._before = {key: cfg.pop(key) for key in touched if key in cfg}
        said = ", ".join(f"{key}: {_yaml(value)}" for key, value in self._before.items() if value) or "none named"
        cfg["attn_implementation"] = PLACEHOLDER
        cfg["axo_flash_replaces"] = DEFAULT if name == NAME else name
        LOG.info(
            f"axo_flash: takes the place of the YAML's attention ({said}); "
            f"Axolotl is told attn_implementation: {PLACEHOLDER} meanwhile"
        )

    def on_config_validation_error(self, cfg: dict) -> None:
        """Give a YAML that Axolotl rejected its own words back."""
        if "axo_flash_replaces" in cfg:
            del cfg["attn_implementation"], cfg["axo_flash_replaces"]
            cfg.update(self._before)

    def load_datasets(self, cfg: dict, preprocess: bool = False) -> None:
        """Loads nothing; the first hook after validation, before Axolotl plans how batches are packed."""
        if self._concerns(cfg):
            _keep_what_follows_from_the_name(cfg)

    # --- the model --------------------------------------------------------------------------------------------------

    def pre_model_load(self, cfg: dict) -> None:
        """Refuse another model family before its weights are read."""
        if not self._concerns(cfg):
            return
        _keep_what_follows_from_the_name(cfg)  # for those who load a model without a dataset
        families, family = [row.name for row in FAMILIES], cfg.model_config_type
        if family not in families and not cfg.is_multimodal:
            raise UserError(
                f"axo_flash has no attention for the model family {family!r} of {cfg.base_model}: it serves "
                f"{' and '.join(families)}. Remove the plugin {type(self).__name__} from the YAML for this model"
            )

    def post_model_build(self, cfg: dict, model: torch.nn.Module) -> None:
        """Patch the model, before adapters are put around its layers."""
        if not self._concerns(cfg):
            return
        report = patch_model(model, cfg.attention_backend or "auto", dtype=cfg.torch_dtype)
        self.report = self.report or report  # a second model is a reference model of preference tuning
        LOG.info(
            f"axo_flash: {report.layers} {report.family} layers on the backend {report.backend!r} ({report.reason})"
        )

    def post_model_load(self, cfg: dict, model: torch.nn.Module) -> None:
        """Adapters and Axolotl's own patches are in: is the attention still ours?"""
        if self._concerns(cfg):
            self._check_layers(model)

    # --- the training -----------------------------------------------------------------------------------------------

    def add_callbacks_post_trainer(self, cfg: dict, trainer: Any) -> list[TrainerCallback]:
        """What watches that every step computes by our attention."""
        return [_Watch(self)] if self._concerns(cfg) else []

    def post_train(self, cfg: dict, model: torch.nn.Module) -> None:
        """Check the model once more and say what ran. Axolotl calls this twice; the second time says nothing."""
        if not self._concerns(cfg) or self.report is None:
            return
        self._check_layers(model)
        calls = self.report.calls()
        elsewhere = {backend: count for backend, count in calls.items() if backend != self.report.backend}
        LOG.info(
            f"axo_flash: {self.report.layers} {self.report.family} layers patched, backend {self.report.backend}, "
            f"{sum(calls.values()):,} calls in {self.steps:,} steps, fallbacks: {elsewhere or 'none'}"
        )
        self.report = None

    def count_step(self, model: torch.nn.Module, calls: int) -> None:
        """One optimizer step is done, with so many calls of our attention since the one before.

        Raises:
            RuntimeError: they are fewer than one for each layer.
        """
        self.steps += 1
        if self.report is not None and calls < self.report.layers:
            self._check_layers(model)
            raise RuntimeError(
                f"axo_flash: step {self.steps} called our attention {calls} times, expected at least once for each of "
                f"{self.report.layers} layers: something else computed it. Remove what replaces the model or its "
                "layers' forward, or the plugin"
            )

    def _check_layers(self, model: torch.nn.Module) -> None:
        layers, expected = patched_layers(model), self.report.layers if self.report is not None else 0
        if layers != expected or not layers:
            raise RuntimeError(
                f"axo_flash: the plugin did not take effect: {layers} of {expected} layers of {type(model).__name__} "
                "compute by its attention. Something replaced it after the model was loaded (another plugin?): remove "
                "that, or this plugin"
            )

    def _concerns(self, cfg: dict) -> bool:
        """Whether this run asked for the plugin: Axolotl keeps plugins, and calls them, for a process's later runs."""
        registered = PluginManager.get_instance().plugins
        return any(registered.get(name) is self for name in cfg.get("plugins") or [])


class _Watch(TrainerCallback):
    """Tells the plugin how often each step called our attention."""

    def __init__(self, plugin: AxoFlashPlugin) -> None:
        self.plugin, self.before = plugin, 0

    def _calls(self) -> int:
        return sum(self.plugin.report.calls().values()) if self.plugin.report is not None else 0

    def on_train_begin(self, args, state, control, **kwargs):
        """Count from here."""
        self.before = self._calls()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        """A step is done; evaluation comes after it and is no part of the next one."""
        self.plugin.count_step(model, self._calls() - self.before)
        self.before = self._calls()

    def on_evaluate(self, args, state, control, **kwargs):
        """Leave the evaluation's calls out of the next step's."""
        self.before = self._calls()


def _is_known(name: Any) -> bool:
    """Whether Axolotl knows the name, or we do."""
    return name in REPLACED or name in enums.CANONICAL_ATTN_IMPLS or (isinstance(name, str) and "/" in name)


def _yaml(value: Any) -> str:
    return "true" if value is True else str(value)


def _refuse(cfg: dict, name: str) -> None:
    """Raise UserError with everything in the raw YAML that the plugin cannot be combined with."""
    problems = [
        f"{key}: {_yaml(cfg[key])}: {reason}"
        for key, (is_on, reason) in REFUSED.items()
        if cfg.get(key) and is_on(cfg[key])
    ]
    if name not in REPLACED and enums.attn_impl_base(name) not in REPLACED:
        problems.append(f"attn_implementation: {name}: not known to compute plain softmax attention, which ours does")
    if cfg.get("torch_compile") and cfg.get("sample_packing"):
        problems.append("torch_compile: a compiled model cannot read where packed documents begin")
    if problems:
        raise UserError(
            "axo_flash: the YAML asks for what the plugin cannot be combined with; remove these keys, or the plugin: "
            + "; ".join(problems)
        )


def _keep_what_follows_from_the_name(cfg: dict) -> None:
    """What Axolotl derived from the placeholder, as it would have from the name in the YAML.

    With the flash attentions it packs a batch of b rows into one of b * sequence_len tokens, and holds norms and
    embeddings in half precision; with eager and sdpa it does neither. Both packings keep documents apart.
    """
    name = cfg.axo_flash_replaces
    cfg.attn_supports_packing = enums.attn_impl_base(name) in enums.ATTN_IMPLS_SUPPORTING_PACKING
    cfg.attn_needs_dtype_cast = name not in enums.ATTN_IMPLS_WITHOUT_DTYPE_CAST
