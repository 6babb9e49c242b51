"""load_model(config): weights, attention and adapter as the YAML asks; load_tokenizer(config): its tokenizer."""

from __future__ import annotations

import contextlib
import importlib.util
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

from axo_flash.config import Config
from axo_flash.data.inputs import local_directory, template_text
from axo_flash.data.templates import chat_template
from axo_flash.errors import UserError
from axo_flash.patch import FAMILIES, PatchReport, patch_model

INSTALL_BITSANDBYTES = 'pip install "axo-flash[qlora]"'
EMBEDDINGS = ("embed_tokens", "lm_head")


class ModelError(UserError):
    """The model or tokenizer that the YAML asks for cannot be had; the message says what to change."""


# Bytes that optimizers keep for each trained parameter, by a part of their names; the others keep two numbers of its type
STATE_BYTES = {"8bit": 2, "adafactor": 0, "sgd": 0, "lion": 4}


def optimizer_bytes(optimizer: str, trained: int, element_size: int) -> int:
    """What an optimizer's state takes on disk, about."""
    small = next((size for part, size in STATE_BYTES.items() if part in optimizer), None)
    return trained * (2 * element_size if small is None else small)


@dataclass
class LoadedModel:
    """A model that is ready to train.

    Attributes:
        model: the Hugging Face model, inside PEFT's wrapper if the YAML names an adapter.
        family: its architecture as Hugging Face names it (llama, mistral).
        dtype: of the computation: bfloat16, float16 or float32 (quantised weights are computed in it too).
        dtype_reason: why that one.
        patch_report: which attention layers were replaced, or None for the model's own attention.
    """

    model: torch.nn.Module
    family: str
    dtype: torch.dtype
    dtype_reason: str
    patch_report: PatchReport | None

    def parameter_counts(self) -> tuple[int, int]:
        """(trainable, all) parameters; a packed 4-bit weight counts by the shape that it stands for."""
        trainable = total = 0
        for parameter in self.model.parameters():
            state = getattr(parameter, "quant_state", None)
            count = state.shape.numel() if state is not None else parameter.numel()
            total += count
            trainable += count if parameter.requires_grad else 0
        return trainable, total

    def checkpoint_bytes(self, optimizer: str, adapter: bool) -> int:
        """What one checkpoint takes on disk, about: the weights that are saved, and the optimizer's state."""
        saved = state = 0
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                state += optimizer_bytes(optimizer, parameter.numel(), parameter.element_size())
            if parameter.requires_grad or not adapter:
                saved += parameter.numel() * parameter.element_size()
        return saved + state


def load_tokenizer(config: Config) -> Any:
    """The tokenizer of config.base_model with the YAML's special_tokens, tokens and chat_template.

    From a mount its files are brought to local disk first.

    A tokenizer without a padding token pads with its end-of-sequence token, as Axolotl's Llama tokenizers do; padding
    is never attended to and never trained on.

    Raises ModelError if base_model has no tokenizer that can be loaded.
    """
    kind = getattr(transformers, config.tokenizer_type) if config.tokenizer_type else AutoTokenizer
    source = local_directory("base_model", config.base_model, config, weights=False)
    with _explained(config, "tokenizer", source):
        tokenizer = kind.from_pretrained(source, trust_remote_code=config.trust_remote_code)
    tokenizer.name_or_path = config.base_model
    if config.special_tokens:
        tokenizer.add_special_tokens(dict(config.special_tokens))
    if config.tokens:
        tokenizer.add_tokens(list(config.tokens))
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(
                f"the tokenizer of {config.base_model} has neither a padding nor an end-of-sequence token: "
                "set special_tokens: {eos_token: ..., pad_token: ...}"
            )
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    if config.chat_template:
        jinja = template_text(config.chat_template_jinja, config)
        tokenizer.chat_template = chat_template(config.chat_template, jinja, tokenizer)
    return tokenizer


def load_model(config: Config, tokenizer: Any) -> LoadedModel:
    """The model of config.base_model on the device that trains, with its attention and adapter, ready to train.

    Weights on a mount are brought to local disk first: they are memory-mapped, which kills the process when a daemon dies.

    Args:
        config: the run.
        tokenizer: from `load_tokenizer`; the embeddings grow where it has more tokens than the model.

    Raises ModelError for a model that cannot be found or is of no supported family, for a dtype that the device does
    not have, and for a missing bitsandbytes.
    """
    model_config = _model_config(config)
    dtype, reason = compute_dtype(config)
    options: dict[str, Any] = {"quantization_config": quantization(config, dtype)} if _quantised(config) else {}
    if torch.cuda.is_available():
        options["device_map"] = {"": torch.cuda.current_device()}
    source = local_directory("base_model", config.base_model, config, weights=True)
    with _explained(config, "model", source):
        model = AutoModelForCausalLM.from_pretrained(
            source,
            config=model_config,
            dtype=weights_dtype(config, dtype),
            attn_implementation="eager" if config.attn_implementation == "eager" else "sdpa",
            trust_remote_code=config.trust_remote_code,
            **options,
        )
    model.name_or_path = model.config._name_or_path = config.base_model  # what an adapter says that it belongs to
    _grow_embeddings(config, model, tokenizer)
    report = _patched(config, model, dtype) if config.attn_implementation == "axo_fa" else None
    set_seed(config.seed)  # the adapter's random matrices come next
    if config.adapter:
        model = add_adapter(config, model)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False, **config.gradient_checkpointing_kwargs})
        model.enable_input_require_grads()  # reentrant checkpointing of frozen layers loses the gradient otherwise
    return LoadedModel(model, model_config.model_type, dtype, reason, report)


def _patched(config: Config, model: torch.nn.Module, dtype: torch.dtype) -> PatchReport:
    try:
        return patch_model(model, backend=config.attention_backend, dtype=dtype)
    except ValueError as error:
        raise ModelError(f"attention_backend: {config.attention_backend}: {error}") from error


# --------------------------------------------------------------------------------------------------------- what is it


@contextlib.contextmanager
def _explained(config: Config, what: str, source: str) -> Iterator[None]:
    """Turn the libraries' many ways to miss a file into one ModelError; `source` is base_model, or its local copy."""
    name = config.base_model
    try:
        yield
    except (OSError, ValueError) as error:
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if Path(source).is_dir():
            raise ModelError(f"base_model: no {what} can be loaded from the directory {name}: {first_line}") from error
        if Path(name).is_absolute() or name.startswith(".") or name.count("/") > 1:
            raise ModelError(
                f"base_model: there is no directory {name}; expected a local directory with a config.json, or an id on "
                "the Hugging Face Hub such as mistralai/Mistral-7B-v0.1"
            ) from error
        raise ModelError(
            f"base_model: {name} is no local directory, and its {what} could not be had from the Hugging Face Hub "
            f"({first_line}). Check the spelling and the network; a gated model needs `hf auth login`; without "
            "network, give the directory of a model that was downloaded elsewhere"
        ) from error


def _model_config(config: Config) -> Any:
    """The Hugging Face configuration of base_model, if it is of a family that we train."""
    source = local_directory("base_model", config.base_model, config, weights=False)
    with _explained(config, "config.json", source):
        model_config = AutoConfig.from_pretrained(source, trust_remote_code=config.trust_remote_code)
    families = sorted(family.name for family in FAMILIES)
    if model_config.model_type not in families:
        raise ModelError(
            f"base_model: {config.base_model} is a model of the family {model_config.model_type}; "
            f"expected one of {', '.join(families)}"
        )
    wanted = (config.model_type or "AutoModelForCausalLM").removesuffix("ForCausalLM").lower()
    if wanted not in ("automodel", model_config.model_type):
        raise ModelError(
            f"model_type: {config.model_type} does not fit base_model {config.base_model}, whose family is "
            f"{model_config.model_type}: remove model_type, or name another model"
        )
    return model_config


# -------------------------------------------------------------------------------------------------------------- dtype


def compute_dtype(config: Config) -> tuple[torch.dtype, str]:
    """The dtype to compute in, from bf16 and fp16 of the YAML and from the device, and why.

    ``bf16: auto`` takes bfloat16 wherever the hardware multiplies it; on a GPU without it, float16; on a CPU without
    it, float32 (emulated bfloat16 is several times slower there).
    """
    on_gpu = torch.cuda.is_available()
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else cpu_has_bf16()
    if config.fp16:
        if not on_gpu:
            raise ModelError("fp16: true needs a GPU; on a CPU write fp16: false and bf16: auto")
        return torch.float16, "fp16: true"
    if config.bf16 is True:
        if on_gpu and not has_bf16:
            raise ModelError(f"bf16: true, and {torch.cuda.get_device_name()} has no bfloat16: write bf16: auto")
        return torch.bfloat16, "bf16: true" + ("" if has_bf16 else " (emulated on this CPU, slow)")
    if config.bf16 is False:
        return torch.float32, "bf16: false, fp16: false"
    if has_bf16:
        return torch.bfloat16, "bf16: auto, and the hardware has bfloat16"
    if on_gpu:
        return torch.float16, "bf16: auto, and this GPU has no bfloat16"
    return torch.float32, "bf16: auto, and this CPU does not multiply bfloat16"


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512-BF16, AMX or Arm's BF16), as Linux lists it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.system() == "Darwin" and platform.machine() == "arm64"
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "").split()
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)


def weights_dtype(config: Config, dtype: torch.dtype) -> torch.dtype:
    """What the weights are held in: the compute dtype, as Axolotl does, but float32 where float16 weights are trained.

    (The loss scaler cannot unscale float16 gradients. Adapters are float32 in any case: PEFT sees to it.)
    """
    return torch.float32 if dtype == torch.float16 and not config.adapter else dtype


# -------------------------------------------------------------------------------------------- quantisation and adapter


def require_bitsandbytes(key: str) -> None:
    """ModelError with the pip command if bitsandbytes, which `key` of the YAML needs, is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(f"{key} needs the package bitsandbytes, which is not installed: {INSTALL_BITSANDBYTES}")


def _quantised(config: Config) -> bool:
    return config.load_in_4bit or config.load_in_8bit


def quantization(config: Config, dtype: torch.dtype) -> Any:
    """The BitsAndBytesConfig: NF4 with double quantisation computed in `dtype` (the QLoRA paper's), or 8 bit."""
    require_bitsandbytes("load_in_4bit: true" if config.load_in_4bit else "load_in_8bit: true")
    if config.load_in_8bit:
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def add_adapter(config: Config, model: torch.nn.Module) -> torch.nn.Module:
    """`model` frozen inside a PEFT LoRA wrapper: a new adapter, or the saved one of lora_model_dir.

    PEFT's prepare_model_for_kbit_training is left out on purpose: it turns norms, embeddings and lm_head to float32,
    which costs a 7B model a gigabyte and a slow lm_head; the frozen weights stay in the compute dtype, as in Axolotl.
    """
    import peft

    if config.lora_model_dir:
        source = local_directory("lora_model_dir", config.lora_model_dir, config, weights=True)
        if not (Path(source) / "adapter_config.json").is_file():
            raise ModelError(
                f"lora_model_dir: there is no adapter_config.json in {config.lora_model_dir}; expected a directory "
                "that a LoRA run saved"
            )
        return peft.PeftModel.from_pretrained(model, source, is_trainable=True)
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=target_modules(config, model),
        modules_to_save=config.lora_modules_to_save,
        # one matrix under two names stays one when it is trained whole
        ensure_weight_tying=bool(config.lora_modules_to_save) and model.config.tie_word_embeddings,
    )
    try:
        return peft.get_peft_model(model, settings)
    except ValueError as error:
        if "not found in the base model" not in str(error):
            raise
        raise ModelError(
            f"lora_target_modules: {config.lora_target_modules} names no layer of {config.base_model}; its linear "
            f"layers are {', '.join(linear_names(model))}"
        ) from error


def target_modules(config: Config, model: torch.nn.Module) -> str | list[str]:
    """PEFT's target_modules: the YAML's list or regular expression, with lora_target_linear every linear layer too."""
    if not config.lora_target_linear:
        return config.lora_target_modules
    if isinstance(config.lora_target_modules, str):
        raise ModelError("lora_target_modules is a regular expression: set lora_target_linear: false, or give a list")
    return sorted({*linear_names(model), *(config.lora_target_modules or ())})


def linear_names(model: torch.nn.Module) -> list[str]:
    """The last parts of the names of the linear layers, without the output head: q_proj, gate_proj, ..."""
    names = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()
    }
    return sorted(names)


def _grow_embeddings(config: Config, model: torch.nn.Module, tokenizer: Any) -> None:
    """Give the tokenizer's new tokens their rows; refuse an adapter that would leave those rows random."""
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) <= rows:
        return
    new = [token for token, index in tokenizer.get_vocab().items() if index >= rows and token != tokenizer.pad_token]
    if new and config.adapter and not set(EMBEDDINGS) <= set(config.lora_modules_to_save or ()):
        raise ModelError(
            f"special_tokens and tokens add {', '.join(sorted(new))} to the model's vocabulary, and with adapter: "
            f"{config.adapter} their embeddings would stay random: set lora_modules_to_save: [{', '.join(EMBEDDINGS)}]"
        )
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
