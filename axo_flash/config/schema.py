"""Every key of a run that acts: one dataclass field each, with its check and its documentation beside it."""

# ruff: noqa: RUF009  key() and required() return dataclass fields

import dataclasses
from collections.abc import Iterator
from typing import Any

from axo_flash.config import values
from axo_flash.config.checks import (
    Check,
    choice,
    count_or_fraction,
    file_path,
    flag,
    flag_or,
    integer,
    list_of,
    mapping,
    not_negative,
    positive,
    share,
    show,
    text,
)


def key(check: Check, doc: str, default: Any = None) -> Any:
    """A field: its check, its documentation (one line: what it does, units) and its value when absent or null."""
    metadata = {"check": check, "doc": doc}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def required(check: Check, doc: str) -> Any:
    """A field without a default."""
    return dataclasses.field(metadata={"check": check, "doc": doc})


@dataclasses.dataclass(kw_only=True)
class DatasetConfig:
    """One entry of `datasets`: where the rows are and how a row becomes tokens and labels."""

    path: str = required(file_path, "A file, a directory or a glob, mounted or not; or a dataset's id on the Hub.")
    type: str | dict[str, str] | None = key(
        values.dataset_type,
        "Prompt format of the rows; null for rows that hold input_ids and labels already.",
    )
    ds_type: str | None = key(choice("json jsonl csv parquet arrow"), "File format; null reads it off the file names.")
    data_files: list[str] | None = key(values.paths, "Only these files (names or globs) below `path`.")
    name: str | None = key(text, "Configuration of a dataset on the Hub.")
    split: str | None = key(text, "Split to read, or a slice of it: train, validation, train[:1000], train[10%:].")
    shards: int | None = key(integer(1), "Shuffle the rows, cut them into this many parts, take one (shards_idx).")
    shards_idx: int | None = key(integer(0), "Which of `shards` parts to take, from 0; null is 0.")
    field: str | None = key(text, "completion: the column with the text; null is `text`.")
    field_messages: str | None = key(text, "chat_template: the column with the list of turns; null is `messages`.")
    message_property_mappings: dict[str, str] = key(
        mapping(text), "chat_template: a turn's property (role, content, ...) -> its name in the rows.", {}
    )
    message_field_role: str | None = key(text, "Older name of message_property_mappings.role; merged into it.")
    message_field_content: str | None = key(text, "Older name of message_property_mappings.content; merged into it.")
    message_field_training: str | None = key(text, "chat_template: a turn's true/false column: train on it or not.")
    message_field_training_detail: str | None = key(
        text, "chat_template: a turn's column of {begin_offset, end_offset, train} spans (characters)."
    )
    roles: dict[str, list[str]] | None = key(
        mapping(list_of(text)), "chat_template: role of the template -> names that the rows use for it."
    )
    roles_to_train: list[str] | None = key(
        list_of(text), "chat_template: roles whose turns are trained on; [assistant]."
    )
    train_on_eos: str | None = key(
        choice("turn all last none"), "chat_template: which end-of-turn tokens are trained on; null is turn."
    )
    train_on_eot: str | None = key(
        choice("turn all last none"), "chat_template: the same for eot_tokens; null is as train_on_eos."
    )
    chat_template: str | None = key(values.template, "Template for this dataset; null takes the file's chat_template.")
    chat_template_jinja: str | None = key(
        text, "Own Jinja template (its text, or a path to it), for chat_template: jinja."
    )
    drop_system_message: bool = key(flag, "chat_template: leave out a first turn of role system.", False)

    def keys_of_one_type(self) -> Iterator[tuple[str, str]]:
        """(key, type) of every key that is set and acts with that one type alone: its documentation says so."""
        for one in dataclasses.fields(self):
            only, colon, _ = one.metadata["doc"].partition(":")
            if colon and only in ("completion", "chat_template") and getattr(self, one.name):
                yield one.name, only


@dataclasses.dataclass(kw_only=True)
class Config:
    """Every key of a run that acts, under Axolotl's names, as plain values."""

    # model
    base_model: str = required(file_path, "Model to fine-tune: a local directory, or an id on the Hugging Face Hub.")
    model_type: str | None = key(values.model_type, "Architecture that the model must be; null takes what it is.")
    tokenizer_type: str | None = key(values.tokenizer_type, "Tokenizer class; null takes what the model names.")
    trust_remote_code: bool = key(flag, "Run Python code that comes with the model. Only for authors you trust.", False)
    special_tokens: dict[str, Any] = key(values.special_tokens, "Special tokens to set or add, by their role.", {})
    tokens: list[str] = key(list_of(text), "Ordinary tokens to add to the tokenizer; embeddings grow to fit.", [])
    chat_template: str | None = key(values.template, "Chat template of all datasets; null is the tokenizer's own.")
    chat_template_jinja: str | None = key(
        text, "Own Jinja template (its text, or a path to it), for chat_template: jinja."
    )
    eot_tokens: list[str] | None = key(list_of(text), "Tokens that end a turn in the chat template, besides eos_token.")

    # attention
    attn_implementation: str = key(
        values.attention, "axo_fa (our kernels), or the model's own sdpa or eager, unpatched.", "axo_fa"
    )
    attention_backend: str = key(
        choice("auto hopper triton reference"), "Kernel behind axo_fa; auto takes the fastest.", "auto"
    )
    plugins: list[str] = key(
        list_of(values.plugin), "This package's Axolotl plugin; nothing to do here, where we are the host.", []
    )

    # adapter and quantisation
    adapter: str | None = key(
        choice("lora qlora", refused={"llama-adapter": "use lora"}), "lora, qlora, or null to train all weights."
    )
    load_in_4bit: bool = key(flag, "Hold the frozen weights in 4 bit NF4 (bitsandbytes); qlora needs it.", False)
    load_in_8bit: bool = key(flag, "Hold the frozen weights in 8 bit (bitsandbytes), for adapter: lora.", False)
    lora_r: int | None = key(integer(1), "Rank of the LoRA matrices: more learns more, and costs memory in proportion.")
    lora_alpha: int | None = key(integer(1), "LoRA updates are scaled by lora_alpha / lora_r.")
    lora_dropout: float = key(share, "Dropout before the LoRA matrices, as a probability.", 0.0)
    lora_target_linear: bool = key(flag, "Adapt every linear layer of the decoder.", False)
    lora_target_modules: str | list[str] | None = key(values.layers, "Layers to adapt: name endings, or a regex.")
    lora_modules_to_save: list[str] | None = key(
        list_of(text), "Layers trained and saved whole (embed_tokens, lm_head)."
    )
    lora_model_dir: str | None = key(file_path, "A saved adapter to go on from, its settings included.")

    # data
    datasets: list[DatasetConfig] = required(values.dataset_list, "What to train on: one entry a dataset.")
    data_mount: str | None = key(file_path, "Mount point that the data must lie on; checked before anything is read.")
    data_timeout: float = key(
        positive, "Seconds for which a failing mount is tried again, from where a read last got further.", 900.0
    )
    stall_timeout: float = key(
        positive, "Seconds without progress after which a call on a mount is given up, and tried again.", 330.0
    )
    demo: bool = key(flag, "Prepare the demo's model and data, under the paths of this file, before the run.", False)
    dataset_prepared_path: str | None = key(
        file_path, "Where tokenised data is kept: a local disk, not a mount; null chooses."
    )
    dataset_num_proc: int | None = key(integer(1), "Processes that tokenise; null takes all cores.")
    # null, not false: checkpoints of versions without these keys are of runs that did not stream
    streaming: bool | None = key(flag, "Read data files one by one while training, never all at once; needs max_steps.")
    streaming_multipack_buffer_size: int | None = key(
        integer(1), "streaming: documents of a file that are packed together; null is 10000."
    )
    streaming_prefetch_shards: int | None = key(
        integer(1), "streaming: files made ready on local disk beside the one in use; null is 1."
    )
    val_set_size: int | float = key(
        count_or_fraction(zero=True), "Rows held out to evaluate on: a count, or a fraction below 1.", 0
    )
    test_datasets: list[DatasetConfig] | None = key(
        values.dataset_list, "streaming: rows to evaluate on, read whole before training; entries as of datasets."
    )
    sequence_len: int = key(integer(2), "Longest row, in tokens; with packing, the length of every row.", 512)
    excess_length_strategy: str = key(
        choice("drop truncate raise"), "What happens to a row longer than sequence_len.", "drop"
    )
    sample_packing: bool = key(
        flag, "Put several documents in a row, kept apart by the attention: no padding to compute.", False
    )
    eval_sample_packing: bool | None = key(flag, "Pack the validation rows too; as sample_packing when absent.")
    pad_to_sequence_len: bool | None = key(
        flag, "Pad rows to sequence_len: steady memory; as sample_packing when absent."
    )
    group_by_length: bool = key(flag, "Batch rows of like length: less padding, without packing.", False)
    train_on_inputs: bool = key(flag, "Train on prompts too, not on answers alone.", False)

    # steps and batches
    micro_batch_size: int = key(integer(1), "Rows in one forward pass; memory grows with it.", 1)
    gradient_accumulation_steps: int = key(integer(1), "Forward passes added up for one optimizer step.", 1)
    num_epochs: float = key(positive, "Passes over the data.", 1.0)
    max_steps: int | None = key(integer(1), "Optimizer steps to stop after, whatever num_epochs says.")
    seed: int = key(integer(0), "Seed of everything random: row order, split, LoRA init, dropout.", 42)

    # optimizer
    learning_rate: float = required(positive, "Peak learning rate.")
    lr_scheduler: str = key(values.scheduler, "How the learning rate falls after the warmup.", "cosine")
    warmup_steps: int | None = key(integer(0), "Steps over which the learning rate rises from 0.")
    warmup_ratio: float | None = key(share, "The same, as a fraction of all steps. Neither: 0.03, 100 steps at most.")
    optimizer: str = key(values.optimizer, "Optimizer; *_8bit and paged_* need bitsandbytes.", "adamw_torch_fused")
    weight_decay: float = key(not_negative, "Decoupled weight decay.", 0.0)
    max_grad_norm: float = key(not_negative, "Gradients are clipped to this norm; 0 does not clip.", 1.0)
    adam_beta1: float = key(share, "Adam's decay of the mean gradient.", 0.9)
    adam_beta2: float = key(share, "Adam's decay of the mean squared gradient.", 0.999)
    adam_epsilon: float = key(positive, "Adam's epsilon.", 1e-8)

    # precision and memory
    bf16: str | bool = key(flag_or("auto"), "bfloat16 mixed precision; auto where the device has it.", "auto")
    fp16: bool = key(flag, "float16 mixed precision with loss scaling, for GPUs without bfloat16.", False)
    tf32: str | bool = key(flag_or("auto"), "TF32 for what stays in float32; auto where there is.", "auto")
    gradient_checkpointing: bool = key(
        values.gradient_checkpointing,
        "Recompute activations in the backward pass: about 30% slower, far less memory.",
        False,
    )
    gradient_checkpointing_kwargs: dict[str, Any] = key(
        mapping({"use_reentrant": flag}), "{use_reentrant: true|false}, for gradient checkpointing.", {}
    )

    # logging, evaluation, checkpoints
    output_dir: str = key(file_path, "Directory of checkpoints, final weights and run_report.json.", "./model-out")
    logging_steps: int | None = key(integer(1), "Steps between log lines; null picks 1 to 10 by the run's length.")
    eval_strategy: str | None = key(values.strategy, "When to evaluate, if neither key below says so.")
    eval_steps: int | float | None = key(values.interval, "Steps between evaluations, or a fraction of the run.")
    evals_per_epoch: int | None = key(integer(1), "Evaluations in one epoch.")
    save_strategy: str | None = key(values.strategy, "When to save, if neither key below says so.")
    save_steps: int | float | None = key(values.interval, "Steps between checkpoints, or a fraction of the run.")
    saves_per_epoch: int | None = key(integer(1), "Checkpoints in one epoch.")
    save_total_limit: int = key(integer(1), "Checkpoints kept; the oldest go.", 4)
    resume_from_checkpoint: str | bool | None = key(
        values.checkpoint, "Checkpoint to go on from: its directory, or true for the newest complete one."
    )
    auto_resume_from_checkpoints: bool = key(
        flag, "Go on from the newest complete checkpoint in output_dir, if any.", False
    )
    checkpoint_staging_path: str | None = key(
        file_path, "Local directory where checkpoints for a mounted output_dir are completed first; null chooses."
    )
    checkpoint_timeout: float = key(positive, "Seconds that the end of a run waits for a mount that fails.", 900.0)
    preemption_timeout: float = key(positive, "Seconds after SIGTERM in which the run has saved and left.", 60.0)
    early_stopping_patience: int | None = key(integer(1), "Stop after this many evaluations without a better loss.")
    loss_watchdog_threshold: float | None = key(
        positive, "Stop when the loss stays above this (about twice the first loss)."
    )
    loss_watchdog_patience: int = key(integer(1), "Steps in a row above the threshold before stopping.", 3)

    # Weights & Biases
    use_wandb: bool | None = key(flag, "Log to Weights & Biases; null does so when wandb_project is set.")
    wandb_project: str | None = key(text, "Its project.")
    wandb_entity: str | None = key(text, "Its team or user.")
    wandb_name: str | None = key(text, "The run's name there.")
    wandb_run_id: str | None = key(text, "The run's id there: the same id goes on with the same run.")
    wandb_mode: str | None = key(choice("online offline disabled"), "offline keeps the log on this machine.")
    wandb_watch: str | None = key(choice("gradients parameters all false"), "What of the model to log.")
    wandb_log_model: str | None = key(choice("checkpoint end false"), "Which weights to upload, if any.")

    def __post_init__(self) -> None:
        if self.eval_sample_packing is None:
            self.eval_sample_packing = self.sample_packing
        if self.pad_to_sequence_len is None:
            self.pad_to_sequence_len = self.sample_packing

    def to_dict(self) -> dict[str, Any]:
        """All keys as plain values, nested datasets included: for hashing, JSON and the run report."""
        return dataclasses.asdict(self)

    def warmup_for(self, total_steps: int) -> int:
        """Steps of warmup in a run of `total_steps`: as set, or by Axolotl's default, 3% and 100 at most."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        if self.warmup_ratio is not None:
            return int(self.warmup_ratio * total_steps)
        return min(int(0.03 * total_steps), 100)

    def logging_interval(self, total_steps: int) -> int:
        """Steps between log lines in a run of `total_steps`: as set, or by Axolotl's default, 1 to 10."""
        return self.logging_steps or max(min(int(0.005 * total_steps), 10), 1)

    def save_schedule(self) -> tuple[str, int | float | None]:
        """When to save, as Trainer's save_strategy and save_steps (a count, or a fraction of the run)."""
        return self._schedule(self.saves_per_epoch, self.save_steps, self.save_strategy)

    @property
    def evaluates(self) -> bool:
        """Whether there are rows to evaluate on."""
        return bool(self.val_set_size or self.test_datasets)

    def eval_schedule(self) -> tuple[str, int | float | None]:
        """When to evaluate, as Trainer's eval_strategy and eval_steps; ("no", None) without validation rows."""
        if not self.evaluates:
            return "no", None
        return self._schedule(self.evals_per_epoch, self.eval_steps, self.eval_strategy)

    def _schedule(
        self, per_epoch: int | None, steps: int | float | None, strategy: str | None
    ) -> tuple[str, int | float | None]:
        if per_epoch:
            fraction = 1 / (per_epoch * self.num_epochs)  # of the whole run, as in Axolotl
            return ("steps", fraction) if fraction < 1 else ("epoch", None)
        if steps:
            return "steps", steps
        return strategy or "epoch", None

    def wandb_environment(self) -> dict[str, str] | None:
        """Environment variables for the Trainer's report_to="wandb", or None when nothing is logged there."""
        wanted = self.use_wandb if self.use_wandb is not None else bool(self.wandb_project)
        if not wanted or self.wandb_mode == "disabled":
            return None
        names = ("project", "entity", "name", "run_id", "mode", "watch", "log_model")
        values = {f"WANDB_{name.upper()}": getattr(self, f"wandb_{name}") for name in names}
        return {name: value for name, value in values.items() if value}


def key_docs(schema: type[Config] | type[DatasetConfig] = Config) -> dict[str, str]:
    """Every key that acts, with one line on what it does, what it may be and what it is when absent."""
    docs = {}
    for field in dataclasses.fields(schema):
        if field.default_factory is not dataclasses.MISSING:
            absent = f"default {field.default_factory()}"
        else:
            absent = "required" if field.default is dataclasses.MISSING else f"default {show(field.default)}"
        docs[field.name] = f"{field.metadata['doc']} ({field.metadata['check'].expected}; {absent})"
    return docs
