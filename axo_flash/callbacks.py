"""What watches a run while it trains: the meter, the progress display, Ctrl-C, and the two reasons to stop early."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback

from axo_flash.metrics import visible_pairs
from axo_flash.report import duration

TOKENS, PAIRS = "metered_tokens", "metered_pairs"  # keys that MeteredCollator adds to a batch and Meter takes out


class MeteredCollator:
    """A collator that also counts its batch's real tokens and visible (query, key) pairs, where both are still known.

    Counting on the CPU, document by document, costs microseconds; on the device it would wait for it at every step.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]], window: int | None):
        self.collator, self.window = collator, window

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """The collator's batch with two plain integers added; the model must not see them (`Meter.take`)."""
        batch = self.collator(items)
        if "cu_seq_lens_q" in batch:
            lengths = batch["cu_seq_lens_q"].diff().tolist()
        else:
            lengths = [item["length"] for item in items]
        batch[TOKENS] = sum(item["length"] for item in items)
        batch[PAIRS] = sum(visible_pairs(length, window=self.window) for length in lengths)
        return batch


class Meter(TrainerCallback):
    """Real tokens, visible pairs and seconds of training. Evaluation and saving stop the clock (`paused`).

    The first step compiles and warms up, so its time and tokens are kept apart.
    """

    def __init__(self) -> None:
        self.tokens = self.pairs = 0
        self.seconds = 0.0
        self.first_step_tokens = self.first_step_pairs = 0
        self.first_step_seconds = 0.0
        self._started: float | None = None

    def take(self, inputs: dict[str, Any]) -> None:
        """Count one micro-batch and remove from it what MeteredCollator added."""
        self.tokens += inputs.pop(TOKENS)
        self.pairs += inputs.pop(PAIRS)

    def steady(self) -> tuple[int, int, float]:
        """Tokens, pairs and seconds so far, without the first step if there was another."""
        seconds = self.seconds + (time.perf_counter() - self._started if self._started is not None else 0.0)
        if self.tokens > self.first_step_tokens > 0:
            first = self.first_step_tokens, self.first_step_pairs, self.first_step_seconds
            return self.tokens - first[0], self.pairs - first[1], seconds - first[2]
        return self.tokens, self.pairs, seconds

    @property
    def tokens_per_second(self) -> float:
        """Of the steady steps so far."""
        tokens, _, seconds = self.steady()
        return tokens / seconds if seconds > 0 else 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock for the length of the block, if it runs."""
        running = self._started is not None
        self._stop()
        try:
            yield
        finally:
            if running:
                self._start()

    def _start(self) -> None:
        self._started = time.perf_counter()

    def _stop(self) -> None:
        if self._started is None:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # a step returns before its kernels end
        self.seconds += time.perf_counter() - self._started
        self._started = None

    def on_train_begin(self, args, state, control, **kwargs):
        """Start the clock."""
        self._start()

    def on_step_end(self, args, state, control, **kwargs):
        """Note what the first step cost."""
        if not self.first_step_seconds:
            with self.paused():
                pass  # brings self.seconds up to date
            self.first_step_seconds = self.seconds
            self.first_step_tokens, self.first_step_pairs = self.tokens, self.pairs

    def on_train_end(self, args, state, control, **kwargs):
        """Stop the clock."""
        self._stop()


class Progress(TrainerCallback):
    """One bar on a terminal (steps, loss, tokens/s, time left); elsewhere a line now and then, fit for a log file."""

    LINES = 20  # about so many lines in a log file

    def __init__(self, meter: Meter, stream: Any = None, notice: Callable[[], str] = lambda: "") -> None:
        self.meter, self.stream, self.notice = meter, stream or sys.stderr, notice
        self.bar: tqdm | None = None
        self.loss: float | None = None
        self.first_step = 0
        self.next_line = 0
        self.began = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        """Open the display; a resumed run starts where the checkpoint was."""
        self.first_step = self.next_line = state.global_step
        self.began = time.perf_counter()
        if self.stream.isatty():
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc="training",
                unit="step",
                file=self.stream,
                dynamic_ncols=True,
                bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps{postfix}, {remaining} left",
            )

    def on_step_end(self, args, state, control, **kwargs):
        """Move the bar."""
        if self.bar is not None:
            self.bar.set_postfix_str(self.facts(), refresh=False)
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Take the newest loss, which is logged after the step has ended."""
        if "loss" not in (logs or {}):
            return
        self.loss = logs["loss"]
        if self.bar is not None:
            self.bar.set_postfix_str(self.facts())
        elif state.global_step >= self.next_line or state.global_step == state.max_steps:
            done = state.global_step - self.first_step
            left = (time.perf_counter() - self.began) / done * (state.max_steps - state.global_step)
            step = f"step {state.global_step}/{state.max_steps}"
            print(f"{step}: {self.facts()}, {duration(left)} left", file=self.stream, flush=True)
            self.next_line = state.global_step + max(1, state.max_steps // self.LINES)

    def facts(self) -> str:
        """The newest loss, the speed so far, and what is wrong with the checkpoints, if anything is."""
        loss = [] if self.loss is None else [f"loss {self.loss:.3f}"]
        notice = [self.notice()] if self.notice() else []
        return ", ".join([*loss, f"{self.meter.tokens_per_second:,.0f} tokens/s", *notice])

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """Leave a line for every evaluation."""
        text = f"step {state.global_step}: eval loss {metrics['eval_loss']:.4f}"
        if self.bar is not None:
            self.bar.write(text, file=self.stream)
        else:
            print(text, file=self.stream, flush=True)

    def on_train_end(self, args, state, control, **kwargs):
        """Close the display."""
        self.close()

    def close(self) -> None:
        """Close the bar, if there is one, leaving its last state on the screen."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class StopOnSignal(TrainerCallback):
    """Ctrl-C (or SIGTERM) ends training after the step that runs, with a checkpoint: a step is never torn in two.

    A second Ctrl-C ends it at once, without. SIGTERM is what a node that is taken away sends: `leave_within` seconds
    after it the process is gone, whatever hangs, with `last_words()` on stderr. Use as a context manager around
    training and what follows it, in the main thread.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(
        self, say: Callable[[str], None], leave_within: float = 60.0, last_words: Callable[[], str] = lambda: ""
    ) -> None:
        self.say, self.leave_within, self.last_words = say, leave_within, last_words
        self.received: int | None = None
        self.training_is_over = False  # set it when no step is left to be torn: Ctrl-C then ends what follows at once
        self.leave_at: float | None = None  # time.monotonic() by which a run that got SIGTERM stops waiting
        self._timer: threading.Timer | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python forbids it
            self._previous = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
        if self._timer is not None:
            self._timer.cancel()

    def _handle(self, number: int, frame: Any) -> None:
        if number == signal.SIGTERM and self._timer is None:
            self.leave_at = time.monotonic() + 0.8 * self.leave_within  # the rest is for the report
            self._timer = threading.Timer(self.leave_within, self._leave)
            self._timer.daemon = True
            self._timer.start()
        elif self.received is not None or self.training_is_over:
            raise KeyboardInterrupt
        within = f" within {self.leave_within:.0f} s" if number == signal.SIGTERM else ""
        if self.training_is_over:
            self.say(f"\nleaving{within}")
        elif self.received is None:
            self.received = number
            self.say(
                f"\nstopping after this step{within}, with a checkpoint to go on from (once more to stop at once, without)"
            )

    def _leave(self) -> None:
        print(
            f"not done {self.leave_within:.0f} s after SIGTERM: leaving. {self.last_words()}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(128 + signal.SIGTERM)  # a call that hangs in a mount answers to nothing milder

    def on_step_end(self, args, state, control, **kwargs):
        """Save and stop if a signal came."""
        if self.received is not None:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False


class LossWatchdog(TrainerCallback):
    """Stop when the logged loss was above `threshold` (or not a number) `patience` times in a row."""

    def __init__(self, threshold: float, patience: int) -> None:
        self.threshold, self.patience = threshold, patience
        self.stopped_because: str | None = None

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Look at the newest losses."""
        losses = [row["loss"] for row in state.log_history if "loss" in row][-self.patience :]
        if len(losses) == self.patience and not any(loss <= self.threshold for loss in losses):
            self.stopped_because = (
                f"loss_watchdog_threshold: the loss was above {self.threshold} for {self.patience} log lines in a row"
            )
            control.should_training_stop = True


class EarlyStopping(TrainerCallback):
    """Stop after `patience` evaluations in a row without a better loss, counted from the history, resumed or not."""

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.stopped_because: str | None = None

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """Look at the evaluations so far."""
        losses = [row["eval_loss"] for row in state.log_history if "eval_loss" in row]
        since_best = len(losses) - 1 - losses.index(min(losses))
        if since_best >= self.patience:
            self.stopped_because = f"early_stopping_patience: no better eval loss in {since_best} evaluations"
            control.should_training_stop = True
