"""What must hold between the keys of a run: one small function a rule, run when the keys it reads are right alone."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from axo_flash.config.schema import Config, DatasetConfig

Problems = Iterator[tuple[str, str]]  # (the key that the user should look at, what is wrong and what to do)

RULES: list[tuple[tuple[str, ...], Callable[["Config"], Problems]]] = []


def _reads(*keys: str) -> Callable:
    """Register a rule over these keys."""

    def register(rule: Callable[["Config"], Problems]) -> Callable:
        RULES.append((keys, rule))
        return rule

    return register


@_reads("warmup_steps", "warmup_ratio")
def _one_warmup(config: "Config") -> Problems:
    if config.warmup_steps and config.warmup_ratio:
        yield "warmup_ratio", "excludes warmup_steps, which is set too; keep one of them"


@_reads("evals_per_epoch", "eval_steps", "eval_strategy", "val_set_size", "test_datasets")
def _when_to_evaluate(config: "Config") -> Problems:
    yield from _schedule(config.evals_per_epoch, config.eval_steps, config.eval_strategy, "eval")
    if not config.evaluates and (config.eval_steps or config.eval_strategy in ("epoch", "steps")):
        key = "eval_steps" if config.eval_steps else "eval_strategy"
        yield key, "there are no rows to evaluate on; set val_set_size (0.05 holds 5% of the rows out), or remove it"


@_reads("saves_per_epoch", "save_steps", "save_strategy")
def _when_to_save(config: "Config") -> Problems:
    yield from _schedule(config.saves_per_epoch, config.save_steps, config.save_strategy, "save")


def _schedule(per_epoch: int | None, steps: float | None, strategy: str | None, verb: str) -> Problems:
    if per_epoch and steps:
        yield f"{verb}s_per_epoch", f"excludes {verb}_steps, which is set too; keep one of them"
    elif strategy in ("no", "epoch") and (per_epoch or steps):
        key = f"{verb}s_per_epoch" if per_epoch else f"{verb}_steps"
        yield f"{verb}_strategy", f"got {strategy!r}, which excludes {key}; remove one of them"
    elif strategy == "steps" and not (per_epoch or steps):
        yield f"{verb}_strategy", f"got 'steps'; say how many with {verb}_steps or {verb}s_per_epoch"


@_reads("early_stopping_patience", "val_set_size", "test_datasets", "eval_strategy")
def _stopping_needs_evaluation(config: "Config") -> Problems:
    if config.early_stopping_patience and (not config.evaluates or config.eval_strategy == "no"):
        missing = "remove eval_strategy: no" if config.evaluates else "set val_set_size"
        yield "early_stopping_patience", f"watches the evaluation loss, but nothing is evaluated; {missing}"


@_reads("adapter", "load_in_4bit", "load_in_8bit")
def _quantised_weights(config: "Config") -> Problems:
    if config.load_in_4bit and config.load_in_8bit:
        yield "load_in_8bit", "excludes load_in_4bit, which is set too; keep one of them"
    elif config.adapter == "qlora" and not config.load_in_4bit:
        other = "and remove load_in_8bit" if config.load_in_8bit else "or adapter: lora"
        yield "adapter", f"qlora trains an adapter on 4 bit weights; set load_in_4bit: true, {other}"
    elif config.adapter == "lora" and config.load_in_4bit:
        yield "adapter", "lora on 4 bit weights is qlora; set adapter: qlora, or load_in_4bit: false"
    elif config.adapter is None and (config.load_in_4bit or config.load_in_8bit):
        bits = 4 if config.load_in_4bit else 8
        yield f"load_in_{bits}bit", f"weights in {bits} bit cannot be trained; set adapter: lora or qlora, or remove it"


@_reads("adapter", "lora_model_dir", "lora_r", "lora_alpha", "lora_target_linear", "lora_target_modules")
def _adapter_is_complete(config: "Config") -> Problems:
    if config.adapter is None:
        if config.lora_model_dir:
            yield "lora_model_dir", "is a saved adapter, but adapter is null; set adapter: lora or qlora, or remove it"
        return
    if config.lora_model_dir:  # the saved adapter carries its settings
        return
    for key, example in (("lora_r", 16), ("lora_alpha", 32)):
        if getattr(config, key) is None:
            yield key, f"missing, and adapter: {config.adapter} needs it; set for example {key}: {example}"
    if not config.lora_target_linear and not config.lora_target_modules:
        yield "adapter", "no layer to adapt; set lora_target_linear: true, or name layers in lora_target_modules"


@_reads("bf16", "fp16")
def _one_precision(config: "Config") -> Problems:
    if config.bf16 is True and config.fp16:
        yield "fp16", "excludes bf16, which is true too; keep one of them (bf16 where the GPU has it)"


@_reads("sample_packing", "group_by_length")
def _packing_or_grouping(config: "Config") -> Problems:
    if config.sample_packing and config.group_by_length:
        yield "group_by_length", "excludes sample_packing: packed rows are of one length already; set it to false"


@_reads("streaming", "streaming_multipack_buffer_size", "streaming_prefetch_shards", "sample_packing")
def _keys_of_streaming(config: "Config") -> Problems:
    for key in ("streaming_multipack_buffer_size", "streaming_prefetch_shards"):
        if getattr(config, key) and not config.streaming:
            yield key, "acts with streaming: true alone; set it, or remove this"
    if config.streaming and config.streaming_multipack_buffer_size and not config.sample_packing:
        yield "streaming_multipack_buffer_size", "acts with sample_packing: true alone; set it, or remove this"


@_reads("streaming", "max_steps", "val_set_size", "group_by_length", "demo")
def _streaming_excludes(config: "Config") -> Problems:
    if not config.streaming:
        return
    if not config.max_steps:
        yield "streaming", "needs max_steps, as the number of rows is not known before they are read; set max_steps"
    if config.val_set_size:
        yield (
            "val_set_size",
            "rows cannot be held out of a stream; set it to 0, and name files to evaluate on in test_datasets",
        )
    if config.group_by_length:
        yield "group_by_length", "a stream has no lengths to sort by before it is read; set it to false"
    if config.demo:
        yield "streaming", "the demo's mount is gone when training begins; set it to false, or demo: false"


@_reads("streaming", "saves_per_epoch", "save_strategy", "evals_per_epoch", "eval_strategy")
def _streaming_knows_no_epochs(config: "Config") -> Problems:
    for verb in ("save", "eval") if config.streaming else ():
        if getattr(config, f"{verb}s_per_epoch"):
            yield f"{verb}s_per_epoch", f"the length of an epoch is not known with streaming: true; use {verb}_steps"
        if getattr(config, f"{verb}_strategy") == "epoch":
            yield f"{verb}_strategy", f"the length of an epoch is not known with streaming: true; use {verb}_steps"


@_reads("streaming", "test_datasets")
def _rows_to_evaluate_on(config: "Config") -> Problems:
    if config.test_datasets and not config.streaming:
        yield "test_datasets", "acts with streaming: true alone; hold rows out of datasets with val_set_size"


@_reads("streaming", "datasets")
def _whole_files_are_streamed(config: "Config") -> Problems:
    for index, dataset in enumerate(config.datasets if config.streaming else []):
        if dataset.shards or "[" in (dataset.split or ""):
            key = "shards" if dataset.shards else "split"
            yield (
                "datasets",
                f"entry {index}: {key} chooses among all rows of a dataset, and streaming: true reads whole files one by "
                "one; remove it, and name the files with path or data_files",
            )


@_reads("data_timeout", "stall_timeout")
def _time_to_try_again(config: "Config") -> Problems:
    if config.stall_timeout >= config.data_timeout:
        yield (
            "stall_timeout",
            f"got {config.stall_timeout:g}, expected less than data_timeout, which is {config.data_timeout:g}: a call "
            "that hangs would never be tried again; raise data_timeout, or lower this",
        )


@_reads("attn_implementation", "attention_backend")
def _backend_of_our_attention(config: "Config") -> Problems:
    if config.attention_backend != "auto" and config.attn_implementation != "axo_fa":
        yield (
            "attention_backend",
            f"got {config.attention_backend!r}, which is a kernel of axo_fa, but the attention is "
            f"{config.attn_implementation}; set attn_implementation: axo_fa, or remove it",
        )


@_reads("chat_template", "chat_template_jinja")
def _template_of_the_run(config: "Config") -> Problems:
    yield from _template(config)


def dataset_problems(dataset: "DatasetConfig") -> Problems:
    """What does not hold between the keys of one entry of `datasets`."""
    yield from _template(dataset)
    yield from _message_names(dataset)
    if dataset.shards_idx is not None and dataset.shards_idx >= (dataset.shards or 0):
        limit = f"less than shards, which is {dataset.shards}" if dataset.shards else "shards to be set too"
        yield "shards_idx", f"got {dataset.shards_idx}, expected {limit}"
    for key, only in dataset.keys_of_one_type():
        if dataset.type != only:
            yield key, f"acts with type: {only} alone, but the type is {dataset.type or 'null'}; remove it"


def _template(holder: "Config | DatasetConfig") -> Problems:
    if holder.chat_template == "jinja" and not holder.chat_template_jinja:
        yield (
            "chat_template",
            "got 'jinja'; give the template, or the path of its file, in chat_template_jinja",
        )
    if holder.chat_template_jinja and holder.chat_template not in (None, "jinja"):
        yield (
            "chat_template_jinja",
            f"is read with chat_template: jinja alone, not {holder.chat_template}; remove one of them",
        )


def _message_names(dataset: "DatasetConfig") -> Problems:
    for name in ("role", "content"):
        old, new = getattr(dataset, f"message_field_{name}"), dataset.message_property_mappings.get(name)
        if old and new and old != new:
            yield (
                f"message_field_{name}",
                f"got {old!r}, but message_property_mappings.{name} is {new!r}; keep the latter",
            )
