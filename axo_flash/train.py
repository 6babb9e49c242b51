"""train(config): the straight story of a run, from the YAML to the weights, the report and the loss curve."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from transformers import set_seed

from axo_flash import metrics, sampling
from axo_flash.callbacks import EarlyStopping, LossWatchdog, Meter, StopOnSignal
from axo_flash.checkpoints import Found, NotPublished, Session
from axo_flash.config import Config
from axo_flash.data.dataset import DataError, PreparedData
from axo_flash.data.streaming import StreamRows, StreamStopped, open_data
from axo_flash.demo import prepare as prepare_demo
from axo_flash.errors import UserError
from axo_flash.model import LoadedModel, load_model, load_tokenizer
from axo_flash.mount_io import MountError
from axo_flash.report import (
    REPORT_FILE,
    AttentionFacts,
    RunReport,
    Sample,
    config_hash,
    device_description,
    plot_losses,
    sample_text,
    summary,
    versions,
)
from axo_flash.trainer import KeepHistory, RunTrainer, count_steps, make_trainer

Say = Callable[[str], None]
LOSS_PICTURE = "loss.png"


class Interrupted(Exception):
    """Training was stopped by a signal, after the step that ran and with a checkpoint (`report.checkpoint`)."""

    def __init__(self, report: RunReport, signal_number: int):
        super().__init__(f"stopped by signal {signal_number} at step {report.steps}")
        self.report, self.signal_number = report, signal_number


class StreamFailed(UserError):
    """Rows of a stream do not come any more: why, and what was trained until then."""

    def __init__(self, error: Exception, step: int):
        saved = f"Step {step} is saved; the same command with resume_from_checkpoint=true goes on from there."
        super().__init__(f"{error} {saved if step else 'No step was done yet.'}")


def train(config: Config, say: Say = print) -> RunReport:
    """Fine-tune as the configuration says.

    Leaves in config.output_dir the adapter (or the weights) with the tokenizer, checkpoints, run_report.json and
    loss.png. `say` gets the few lines that a person should read; progress goes to stderr.

    Raises:
        ModelError, DataError, DemoError, CheckpointError: the run cannot start; the message says what to change.
        StreamFailed: data that are read while training cannot be read any more; a checkpoint was saved.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was saved and the report written.
        NotPublished: the run ended, but output_dir could not be written to in time; the message says what is where.
    """
    report = new_report(config)
    with Session(config, say) as checkpoints:
        run(config, report, checkpoints, say)
    return report


def run(config: Config, report: RunReport, checkpoints: Session, say: Say) -> None:
    """The run itself, with the lease on output_dir held."""
    phase = Phases(report.seconds)
    found = checkpoints.find()
    with contextlib.ExitStack() as demo:
        with phase("demo"):
            demo.enter_context(prepare_demo(config, say))
        with phase("data"):
            tokenizer = load_tokenizer(config)
            data = open_data(config, tokenizer, found and found.local)
    with data:
        checkpoints.begin(data_fingerprint(data))
        with phase("model"):
            loaded = load_model(config, tokenizer)
        checkpoints.require_room(loaded.checkpoint_bytes(config.optimizer, bool(config.adapter)))
        describe_inputs(report, config, loaded, data)
        trainer = make_trainer(config, loaded, tokenizer, data, Meter(), checkpoints)
        fine_tune(config, report, trainer, loaded, data, phase, say)


def fine_tune(
    config: Config,
    report: RunReport,
    trainer: RunTrainer,
    loaded: LoadedModel,
    data: PreparedData,
    phase: Phases,
    say: Say,
) -> None:
    """From the model as it was loaded to the weights in output_dir."""
    checkpoints, found = trainer.checkpoints, trainer.checkpoints.found
    with phase("before"):
        question = sampling.find_question((data.eval or data.train).examples(), trainer.processing_class)
        measure_before(report, trainer, question, resuming=found is not None)
    metrics.reset_peak_memory()
    with StopOnSignal(say, config.preemption_timeout, checkpoints.last_words) as stop:
        with phase("training"):
            run_steps(trainer, stop, config, found, say)
        stop.training_is_over = True
        describe_training(report, trainer, data)
        report.resumed_from = found.source if found else None
        if stop.received is None:
            with phase("after"):
                measure_after(report, trainer, question)
            with phase("saving"):
                trainer.save_model(str(checkpoints.local_output()))
        with phase("publishing"):
            deadline = stop.leave_at or time.monotonic() + config.checkpoint_timeout
            problem = publish(report, trainer, checkpoints, stop, deadline)
        finish(report, config, trainer, loaded, checkpoints, say)
        problem = problem or checkpoints.publish_notes(report_files(checkpoints), deadline)
    if problem is not None:
        raise problem
    checkpoints.clear_local_output()
    if stop.received is not None:
        raise Interrupted(report, stop.received)


class Phases:
    """Wall time by phase: ``with phase("data"): ...`` adds to seconds["data"]."""

    def __init__(self, seconds: dict[str, float]):
        self.seconds = seconds

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time the block, however it ends."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


# -------------------------------------------------------------------------------------------------------- the steps


def measure_before(report: RunReport, trainer: RunTrainer, question: sampling.Question | None, resuming: bool) -> None:
    """Validation loss and sample answer of the model as it was loaded.

    A resumed run takes the loss from its checkpoint's history; the answer is that of the weights before it.
    """
    if trainer.eval_dataset is not None and not resuming:
        trainer.evaluate()
    if question is not None:
        tokenizer = trainer.processing_class
        report.sample = Sample(question.prompt_text(tokenizer), question.expected_text(tokenizer))
        report.sample.before = sampling.answer(trainer.model, tokenizer, question)


def run_steps(trainer: RunTrainer, stop: StopOnSignal, config: Config, found: Found | None, say: Say) -> None:
    """All optimizer steps that the checkpoint leaves, or those up to a signal."""
    total = count_steps(config, len(trainer.train_dataset))
    if found is not None and found.manifest.step >= total:
        say(f"nothing left to train: the checkpoint is of step {found.manifest.step} of {total}")
        trainer.restore(found.local)
        return
    trainer.add_callback(KeepHistory(trainer.state.log_history))
    trainer.add_callback(stop)
    set_seed(config.seed)  # whatever was drawn before, rows and dropout start alike
    trainer.saved_step = found.manifest.step if found else 0
    if not isinstance(trainer.train_dataset, StreamRows):
        trainer.train(resume_from_checkpoint=str(found.local) if found else None)
        return
    trainer.train_dataset.stopped = lambda: stop.received is not None
    try:
        trainer.train(resume_from_checkpoint=str(found.local) if found else None)
    except StreamStopped:  # by a signal, while it waited for rows
        trainer.save_where_it_stands()
    except (DataError, MountError) as error:
        trainer.save_where_it_stands()
        raise StreamFailed(error, trainer.saved_step) from error


def measure_after(report: RunReport, trainer: RunTrainer, question: sampling.Question | None) -> None:
    """Validation loss and sample answer of the trained model."""
    if trainer.eval_dataset is not None:
        report.eval_loss_after = trainer.last_eval_loss()
    if report.sample is not None:
        report.sample.after = sampling.answer(trainer.model, trainer.processing_class, question)


def publish(
    report: RunReport, trainer: RunTrainer, checkpoints: Session, stop: StopOnSignal, deadline: float
) -> NotPublished | None:
    """Wait for the checkpoints and bring the weights to output_dir, until `deadline`; what could not be brought."""
    problem = checkpoints.settle(deadline)
    if problem is None and stop.received is None:
        problem = checkpoints.publish_weights(trainer.state.global_step, deadline)
    report.status = "finished" if stop.received is None else "interrupted"
    if problem is not None:
        report.status, report.stopped_because = "unpublished", str(problem)
    report.checkpoint, report.checkpoints = checkpoints.newest(), checkpoints.facts()
    return problem


def finish(
    report: RunReport, config: Config, trainer: RunTrainer, loaded: LoadedModel, checkpoints: Session, say: Say
) -> None:
    """Write the report and the loss curve, and say what there is."""
    report.history = trainer.state.log_history
    report.attention = attention_facts(config, loaded)
    directory = checkpoints.local_output()
    written = report.write(directory)
    picture = directory / LOSS_PICTURE
    problem = plot_losses(report.history, picture, f"{Path(config.base_model).name}: loss")
    say("")
    if report.sample is not None:
        say(sample_text(report.sample) + "\n")
    say(summary(report))
    say("")
    if report.status == "finished":
        say(f"{'adapter' if config.adapter else 'model'} and tokenizer: {config.output_dir}")
    place = written.parent if report.status == "unpublished" else Path(config.output_dir)
    say(f"report: {place / written.name}")
    say(f"loss curve: {place / picture.name}" if problem is None else f"no loss curve: {problem}")


def report_files(checkpoints: Session) -> list[str]:
    """Names of what `finish` wrote."""
    names = (REPORT_FILE, LOSS_PICTURE)
    return [name for name in names if (checkpoints.local_output() / name).exists()]


def data_fingerprint(data: PreparedData) -> str:
    """What decides which rows come in which order: the key of the tokenised set, and how it was split and packed."""
    if isinstance(data.train, StreamRows):
        return data.train.fingerprint
    digest = hashlib.sha256(Path(data.report.cache_path).name.encode())
    for rows in (data.train, data.eval):
        if rows is not None:
            digest.update(rows.order.tobytes() + rows.borders.tobytes())
    return digest.hexdigest()[:32]


# -------------------------------------------------------------------------------------------------------- the report


def new_report(config: Config) -> RunReport:
    """A report with what is known before anything is loaded."""
    values = config.to_dict()
    return RunReport(
        status="running",
        config=values,
        config_hash=config_hash(values),
        seed=config.seed,
        versions=versions(),
        device=device_description(),
    )


def describe_inputs(report: RunReport, config: Config, loaded: LoadedModel, data: PreparedData) -> None:
    """Note what was loaded: the model, its attention and the data."""
    trainable, total = loaded.parameter_counts()
    report.model = {
        "base_model": config.base_model,
        "family": loaded.family,
        "parameters": total,
        "trainable_parameters": trainable,
        "adapter": config.adapter,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "dtype_reason": loaded.dtype_reason,
    }
    report.attention = attention_facts(config, loaded)
    report.data = dataclasses.asdict(data.report)


def attention_facts(config: Config, loaded: LoadedModel) -> AttentionFacts:
    """Which attention the model has, and what really ran up to now."""
    patch = loaded.patch_report
    if patch is None:
        layers = loaded.model.config.num_hidden_layers
        return AttentionFacts(config.attn_implementation, layers, reason="as attn_implementation in the YAML asks")
    return AttentionFacts(config.attn_implementation, patch.layers, patch.backend, patch.reason, patch.calls())


def describe_training(report: RunReport, trainer: RunTrainer, data: PreparedData) -> None:
    """Note how training went: steps, losses, speed, memory, and why it stopped early if it did."""
    state = trainer.state
    report.data = dataclasses.asdict(data.report)  # a stream's was empty before
    losses = [row["loss"] for row in state.log_history if "loss" in row]
    evaluations = [row for row in state.log_history if "eval_loss" in row]
    report.steps, report.epochs = state.global_step, state.epoch or 0.0
    if isinstance(data.train, StreamRows):
        report.epochs = data.train.epochs(trainer.rows_trained())
    report.first_loss, report.last_loss = (losses[0], losses[-1]) if losses else (None, None)
    if evaluations and evaluations[0]["step"] == 0:
        report.eval_loss_before = evaluations[0]["eval_loss"]
    guards = [cb for cb in trainer.callback_handler.callbacks if isinstance(cb, LossWatchdog | EarlyStopping)]
    report.stopped_because = next((guard.stopped_because for guard in guards if guard.stopped_because), None)

    cost = metrics.step_cost(trainer.model)
    meter = trainer.meter
    steady_tokens, steady_pairs, steady_seconds = meter.steady()
    speed = report.speed
    speed.tokens, speed.seconds, speed.first_step_seconds = meter.tokens, meter.seconds, meter.first_step_seconds
    speed.tokens_per_second = meter.tokens_per_second
    speed.flops = cost.flops(meter.tokens, meter.pairs)
    speed.mfu = metrics.mfu(cost.flops(steady_tokens, steady_pairs), steady_seconds, metrics.device_name())
    speed.packing_efficiency = report.data.get("packing_efficiency")
    speed.peak_memory_bytes, speed.peak_memory_kind = metrics.peak_memory_bytes()
