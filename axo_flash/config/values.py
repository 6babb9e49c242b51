"""What single keys of the YAML may be: their words and forms, as checks."""

import re
from typing import Any

from axo_flash.config.checks import (
    Check,
    any_text,
    check,
    choice,
    count_or_fraction,
    either,
    file_path,
    flag_or,
    list_of,
    mapping,
    text,
    wrong,
)

_TEMPLATES = ("tokenizer_default", "chatml", "llama3", "mistral_v1", "alpaca")
_SHAREGPT = (
    "write type: chat_template, field_messages: conversations, message_property_mappings: {role: from, content: value}"
)
_OUR_KERNELS = "our kernels take its place, the fastest that the GPU has: write axo_fa"
_ON_DEVICE = "activations stay on the device: write true"

model_type = choice("LlamaForCausalLM MistralForCausalLM AutoModelForCausalLM")
tokenizer_type = choice("AutoTokenizer LlamaTokenizer LlamaTokenizerFast PreTrainedTokenizerFast")
scheduler = choice("cosine linear constant constant_with_warmup cosine_with_restarts polynomial inverse_sqrt")
optimizer = choice(
    """adamw_torch_fused adamw_torch adamw_bnb_8bit adamw_8bit paged_adamw_8bit paged_adamw_32bit
    lion_8bit lion_32bit paged_lion_8bit paged_lion_32bit adafactor sgd"""
)
named_format = choice(
    """alpaca alpaca:instruct alpaca:chat alpaca:chatml alpaca:phi
    alpaca_chat alpaca_chat.load_concise alpaca_chat.load_qa alpaca_chat.load_camel_ai alpaca_chat.load_no_prompt
    alpaca_instruct alpaca_instruct.load_no_prompt
    alpaca_w_system alpaca_w_system.load_chat alpaca_w_system.load_instruct
    alpaca_w_system.load_open_orca alpaca_w_system.load_open_orca_chatml
    gpteacher completion chat_template input_output""",
    refused={"sharegpt": _SHAREGPT},
)
own_format = mapping(
    dict.fromkeys(("format", "no_input_format", "system_format", "system_prompt"), any_text)
    | dict.fromkeys(("field_instruction", "field_input", "field_output", "field_system"), text)
)
dataset_type = either(lambda value: isinstance(value, dict), own_format, named_format)
special_tokens = mapping(
    dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), text)
    | {"additional_special_tokens": list_of(text)}
)
gradient_checkpointing = flag_or(refused=dict.fromkeys(("offload", "offload_disk", "unsloth"), _ON_DEVICE))
interval = count_or_fraction(zero=False)
_OTHER_ATTENTION = (
    *("flash_attention_3", "flash_attention_4", "flash_attention_torch", "flash"),
    *("flex_attention", "flex", "xformers", "sage", "fp8"),
)
_attention_name = choice("axo_fa flash_attention_2 sdpa eager", refused=dict.fromkeys(_OTHER_ATTENTION, _OUR_KERNELS))
attention = Check(_attention_name.expected, lambda value: _attention_name(value).replace("flash_attention_2", "axo_fa"))


@check("one of no, epoch, steps")
def strategy(value: Any) -> str:
    """When to evaluate or save; YAML 1.1 reads a bare `no` as false."""
    if value is False:
        return "no"
    return choice("no epoch steps", refused={"best": "no best checkpoint is kept; use epoch"})(value)


@check("a plugin of this package")
def plugin(value: Any) -> str:
    """Our own Axolotl plugin, which has nothing to do where we are the host."""
    if isinstance(value, str) and value.startswith("axo_flash."):
        return value
    raise wrong(
        value, "a plugin of this package (its name starts with axo_flash.)", "Axolotl's own do not run here: remove it"
    )


@check("a list of datasets")
def dataset_list(value: Any) -> list:
    """A list that is not empty; load reads its entries."""
    if isinstance(value, list) and value:
        return value
    raise wrong(value, "a list of datasets", "write '- path: ...' below it, and 'type: ...' below that")


@check("a path, or a list of paths")
def paths(value: Any) -> list[str]:
    """Paths, of which one may stand alone."""
    return list_of(file_path)(value) if isinstance(value, list) else [file_path(value)]


@check("the path of a checkpoint, or true")
def checkpoint(value: Any) -> str | bool | None:
    """A path; `true` is the newest complete one, and an error if there is none; `false` is null."""
    if isinstance(value, bool):
        return value or None
    return file_path(value)


@check("a list of layer names, or one regular expression")
def layers(value: Any) -> list[str] | str:
    """What PEFT takes as target_modules."""
    if isinstance(value, list):
        return list_of(text)(value)
    try:
        re.compile(text(value))
    except re.error as error:
        raise wrong(value, "a list of layer names, or one regular expression", f"{error}") from None
    return value


@check(f"one of {', '.join(_TEMPLATES)}, jinja, or tokenizer_default_fallback_NAME")
def template(value: Any) -> str:
    """The name of a chat template, as Axolotl names them."""
    fallbacks = [f"tokenizer_default_fallback_{name}" for name in _TEMPLATES[1:]]
    return choice(" ".join((*_TEMPLATES, "jinja", *fallbacks)))(value)
