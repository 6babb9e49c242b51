"""Counting, the two displays, and the guards, without a trainer."""

import io
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl, TrainerState

from axo_flash.callbacks import EarlyStopping, LossWatchdog, Meter, MeteredCollator, Progress, StopOnSignal


class Terminal(io.StringIO):
    def isatty(self):
        return True


def state(step, total=10, **fields):
    return TrainerState(global_step=step, max_steps=total, **fields)


def test_metered_collator_counts_real_tokens_and_pairs():
    packed = {"cu_seq_lens_q": torch.tensor([0, 3, 5, 8], dtype=torch.int32)}  # two documents and padding
    batch = MeteredCollator(lambda items: dict(packed), None)([{"length": 5}])
    meter = Meter()
    meter.take(batch)
    assert batch.keys() == packed.keys()
    assert (meter.tokens, meter.pairs) == (5, 6 + 3 + 6)

    batch = MeteredCollator(lambda items: {}, 2)([{"length": 3}, {"length": 1}])
    meter.take(batch)
    assert (meter.tokens, meter.pairs) == (9, 15 + 5 + 1)


def test_meter_leaves_out_pauses_and_the_first_step():
    meter = Meter()
    meter.on_train_begin(None, state(0), None)
    for step, (tokens, seconds) in enumerate([(10, 0.2), (100, 0.05), (100, 0.05)], start=1):
        meter.tokens += tokens
        time.sleep(seconds)
        meter.on_step_end(None, state(step), None)
        with meter.paused():
            time.sleep(0.3)
    meter.on_train_end(None, state(3), None)
    tokens, _, seconds = meter.steady()
    assert tokens == 200
    assert 0.1 <= seconds < 0.2
    assert 0.2 <= meter.first_step_seconds < 0.3
    assert meter.seconds == pytest.approx(meter.first_step_seconds + seconds)


def test_one_bar_on_a_terminal():
    stream = Terminal()
    progress = Progress(Meter(), stream)
    progress.on_train_begin(None, state(0), None)
    for step in (1, 2):
        progress.on_step_end(None, state(step), None)
        progress.on_log(None, state(step), None, logs={"loss": 3.25})
    progress.on_evaluate(None, state(2), None, metrics={"eval_loss": 2.5})
    progress.on_train_end(None, state(2), None)
    shown = stream.getvalue().replace("\n", "\r").split("\r")
    assert "step 2: eval loss 2.5000" in [line.strip() for line in shown]
    assert any("2/10 steps, loss 3.250, 0 tokens/s" in line and "left" in line for line in shown)


def test_a_few_lines_in_a_log_file():
    stream = io.StringIO()
    progress = Progress(Meter(), stream)
    progress.on_train_begin(None, state(0, 1000), None)
    for step in range(1, 1001):
        progress.on_step_end(None, state(step, 1000), None)
        progress.on_log(None, state(step, 1000), None, logs={"loss": 1.0})
    progress.on_log(None, state(1000, 1000), None, logs={"train_runtime": 1.0})
    lines = stream.getvalue().splitlines()
    assert 15 <= len(lines) <= 25
    assert lines[-1].startswith("step 1000/1000: loss 1.000, ")


def test_first_signal_asks_and_the_second_insists():
    said, control = [], TrainerControl(should_evaluate=True)
    before = signal.getsignal(signal.SIGINT)
    with StopOnSignal(said.append) as stop:
        stop.on_step_end(None, state(1), control)
        assert not control.should_training_stop
        signal.raise_signal(signal.SIGINT)
        stop.on_step_end(None, state(2), control)
        assert (control.should_save, control.should_training_stop, control.should_evaluate) == (True, True, False)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    assert len(said) == 1


def test_the_progress_line_says_what_is_wrong_with_the_checkpoints():
    notice = []
    progress = Progress(Meter(), io.StringIO(), notice=lambda: "".join(notice))
    assert progress.facts() == "0 tokens/s"
    notice.append("checkpoint 8 only in /tmp/staging")
    assert progress.facts() == "0 tokens/s, checkpoint 8 only in /tmp/staging"


def test_ctrl_c_after_training_ends_at_once():
    with StopOnSignal([].append) as stop:
        stop.training_is_over = True
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert stop.received is None


def test_sigterm_sets_the_time_to_leave():
    said = []
    with StopOnSignal(said.append, leave_within=50) as stop:
        signal.raise_signal(signal.SIGTERM)
        assert 30 < stop.leave_at - time.monotonic() <= 40
    assert stop.received == signal.SIGTERM
    assert "within 50 s" in said[0]


@pytest.mark.parametrize(
    ("losses", "stops"),
    [([5.0, 5.0], False), ([5.0, 5.0, 5.0], True), ([5.0, 1.0, 5.0], False), ([float("nan")] * 3, True)],
)
def test_loss_watchdog(losses, stops):
    control = TrainerControl()
    watchdog = LossWatchdog(threshold=4.0, patience=3)
    history = [{"loss": loss} for loss in losses]
    watchdog.on_log(None, state(len(losses), log_history=history), control, logs=history[-1])
    assert control.should_training_stop == stops
    assert bool(watchdog.stopped_because) == stops


@pytest.mark.parametrize(
    ("losses", "stops"), [([3.0, 2.0, 2.5], False), ([3.0, 2.0, 2.5, 2.0], True), ([3.0, 2.0, 2.5, 1.9], False)]
)
def test_early_stopping(losses, stops):
    control, history = TrainerControl(), [{"eval_loss": loss} for loss in losses]
    guard = EarlyStopping(patience=2)
    guard.on_evaluate(SimpleNamespace(), state(len(losses), log_history=history), control)
    assert control.should_training_stop == stops
