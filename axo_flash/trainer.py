"""Hugging Face's Trainer with the YAML's settings, a meter, and a validation loss that is a mean over tokens."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from axo_flash.callbacks import EarlyStopping, LossWatchdog, Meter, MeteredCollator, Progress
from axo_flash.checkpoints import Session
from axo_flash.config import Config
from axo_flash.data.dataset import PreparedData
from axo_flash.data.streaming import STATE_FILE, StreamRows
from axo_flash.model import LoadedModel, ModelError, require_bitsandbytes
from axo_flash.sampling import evaluating

BITSANDBYTES_OPTIMIZERS = ("8bit", "paged", "lion")  # parts of their names


class RunTrainer(Trainer):
    """Trainer for one device and causal language models.

    Differences: micro-batches are metered; evaluation is the exact mean over all trained tokens, so that packed and
    unpacked validation rows give one loss (Trainer's is a mean of means); saved weights say ``use_cache: true``.
    """

    def __init__(
        self,
        *,
        meter: Meter,
        eval_collator: Callable[[list[dict]], dict[str, Any]],
        checkpoints: Session,
        **options: Any,
    ):
        super().__init__(**options)
        self.meter, self.eval_collator, self.checkpoints = meter, eval_collator, checkpoints
        self._folder: Path | None = None  # that a checkpoint is being written in
        self.saved_step = 0  # of the newest checkpoint, that of an earlier run included

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """One micro-batch, metered."""
        self.meter.take(inputs)
        return super().training_step(model, inputs, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        if isinstance(self.train_dataset, StreamRows):  # which has its own order
            return SequentialSampler(self.train_dataset)
        if self.args.train_sampling_strategy == "group_by_length":
            group = self.args.train_batch_size * self.args.gradient_accumulation_steps
            return LengthGrouped(self.train_dataset.lengths, group, self.args.seed)
        return super()._get_train_sampler(train_dataset)

    @torch.no_grad()
    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict:
        """Mean loss over the trained tokens of the validation rows, logged as eval_loss."""
        rows = DataLoader(
            self.eval_dataset if eval_dataset is None else eval_dataset,
            batch_size=self.args.eval_batch_size,
            collate_fn=self.eval_collator,
        )
        total, count = 0.0, 0
        with self.meter.paused(), evaluating(self.model):
            for batch in rows:
                # a label is predicted from the token before it, so the first one of a row is never trained
                tokens = int((batch["labels"][..., 1:] != -100).sum())
                if tokens:
                    with self.compute_loss_context_manager():
                        loss = self.model(**self._prepare_inputs(batch), use_cache=False).loss
                    total, count = total + float(loss) * tokens, count + tokens
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        result = {f"{metric_key_prefix}_loss": total / count if count else math.nan}
        self.log(result)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, result)
        return result

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Save to a new local folder; what makes a checkpoint of it goes on beside training."""
        with self.meter.paused():
            self._folder = self.checkpoints.folder()
            try:
                super()._save_checkpoint(*args, **kwargs)
                checkpoint = self._folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
                if isinstance(self.train_dataset, StreamRows):
                    self.train_dataset.write_state(checkpoint / STATE_FILE, self.rows_trained())
                self.checkpoints.saved(checkpoint)
                self.saved_step = self.state.global_step
            finally:
                self._folder = None

    def save_where_it_stands(self) -> None:
        """A checkpoint of the last step that was done, for a run whose next rows do not come."""
        if self.state.global_step > self.saved_step:
            self._save_checkpoint(self.model, None)

    def rows_trained(self) -> int:
        """Rows that the steps so far have taken from a stream, in this process and those before it."""
        return self.state.global_step * self.args.gradient_accumulation_steps * self.args.train_batch_size

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._folder is None else str(self._folder)

    def restore(self, checkpoint: Path) -> None:
        """Weights and history of a checkpoint at the last step: `train` would take one step more from it."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save weights (or the adapter) and tokenizer, with the cache that training switched off switched on."""
        config = self.model.config
        training, config.use_cache = config.use_cache, True
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            config.use_cache = training

    def last_eval_loss(self) -> float:
        """The validation loss of the weights as they are: the last step's if it was evaluated, else a new one."""
        last = next((row for row in reversed(self.state.log_history) if "eval_loss" in row), None)
        if last is not None and last["step"] == self.state.global_step:
            return last["eval_loss"]
        return self.evaluate()["eval_loss"]


class LengthGrouped(Sampler):
    """Rows in random order, but batches of rows of like length; the order depends on the seed and the epoch alone, so a
    resumed run goes on with the same one (Trainer's own sampler draws from the global generator)."""

    def __init__(self, lengths: list[int], group: int, seed: int):
        self.lengths, self.group, self.seed, self.epoch = lengths, group, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader before every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.group, generator=generator))


class KeepHistory(TrainerCallback):
    """Put what was logged before training (the first evaluation) back in the history, which train() starts afresh."""

    def __init__(self, history: list[dict[str, Any]]):
        self.history = list(history)

    def on_train_begin(self, args, state, control, **kwargs):
        """A resumed run has its history from the checkpoint."""
        if not state.log_history:
            state.log_history.extend(self.history)


def make_trainer(
    config: Config, loaded: LoadedModel, tokenizer: Any, data: PreparedData, meter: Meter, checkpoints: Session
) -> RunTrainer:
    """The trainer of a run, with everything that watches it but the signal handler."""
    total_steps = count_steps(config, len(data.train))
    window = getattr(loaded.model.config, "sliding_window", None)
    trainer = RunTrainer(
        meter=meter,
        eval_collator=data.eval_collator,
        checkpoints=checkpoints,
        model=loaded.model,
        args=training_arguments(config, checkpoints.local_output(), loaded.dtype, total_steps),
        train_dataset=data.train,
        eval_dataset=data.eval,
        data_collator=MeteredCollator(data.collator, window),
        processing_class=tokenizer,
        callbacks=[meter, Progress(meter, notice=checkpoints.notice)],
    )
    trainer.remove_callback(PrinterCallback)
    if config.loss_watchdog_threshold is not None:
        trainer.add_callback(LossWatchdog(config.loss_watchdog_threshold, config.loss_watchdog_patience))
    if config.early_stopping_patience is not None:
        trainer.add_callback(EarlyStopping(config.early_stopping_patience))
    return trainer


def count_steps(config: Config, rows: int) -> int:
    """Optimizer steps of the whole run over `rows` training rows, counted as Trainer does."""
    batches = math.ceil(rows / config.micro_batch_size)
    steps_per_epoch = math.ceil(batches / config.gradient_accumulation_steps)
    return config.max_steps or math.ceil(config.num_epochs * steps_per_epoch)


def training_arguments(config: Config, local: Path, dtype: torch.dtype, total_steps: int) -> TrainingArguments:
    """Trainer's arguments for the YAML's keys; what depends on the run's length is worked out for `total_steps`.

    `local` is what Trainer knows as output_dir: it makes that directory and lists it, which would touch a mount.
    Raises ModelError for an optimizer whose package is missing and for tf32: true where there is none.
    """
    if any(part in config.optimizer for part in BITSANDBYTES_OPTIMIZERS):
        require_bitsandbytes(f"optimizer: {config.optimizer}")
    on_gpu = torch.cuda.is_available()
    eval_strategy, eval_steps = config.eval_schedule()
    save_strategy, save_steps = config.save_schedule()
    wandb = config.wandb_environment()
    os.environ.update(wandb or {})
    return TrainingArguments(
        output_dir=str(local),  # Trainer writes nothing there: see RunTrainer._get_output_dir
        seed=config.seed,
        per_device_train_batch_size=config.micro_batch_size,
        per_device_eval_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        num_train_epochs=config.num_epochs,
        max_steps=config.max_steps or -1,
        train_sampling_strategy="group_by_length" if config.group_by_length else "random",
        optim=config.optimizer,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler,
        warmup_steps=config.warmup_for(total_steps),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_epsilon=config.adam_epsilon,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        tf32=use_tf32(config),
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        logging_steps=config.logging_interval(total_steps),
        logging_nan_inf_filter=False,  # a loss that is not a number is shown as it is
        eval_strategy=eval_strategy,
        eval_steps=eval_steps,
        save_strategy=save_strategy,
        save_steps=save_steps or 500,  # not read unless save_strategy is steps
        save_total_limit=None,  # axo_flash.checkpoints removes old ones, after a newer one was verified
        remove_unused_columns=False,  # the collator makes the batch; Trainer would drop what it does not know
        disable_tqdm=True,  # axo_flash.callbacks.Progress stands in
        report_to="wandb" if wandb is not None else "none",
        run_name=config.wandb_name,
    )


def use_tf32(config: Config) -> bool | None:
    """Trainer's tf32: whether float32 products may use TF32; None leaves PyTorch's own setting (no GPU that has it)."""
    available = torch.cuda.is_available() and torch.version.cuda and torch.cuda.get_device_capability() >= (8, 0)
    if config.tf32 is True and not available:
        raise ModelError("tf32: true needs an NVIDIA GPU of the Ampere generation or newer; write tf32: auto")
    return bool(config.tf32) if available else None
