"""The checkpoints of a run, beside its training: threads that seal and publish, and the end that waits for them."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from axo_flash.checkpoints.resume import CheckpointError, remove_empty
from axo_flash.checkpoints.shelf import Shelf
from axo_flash.checkpoints.storage import FAULTS

LOG = logging.getLogger(__name__)
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds between two tries to publish


class NotPublished(CheckpointError):
    """The run ended, and its newest checkpoint or its weights are on local disk only: the message names them."""


class Writer:
    """Seals and publishes what the trainer saves to `folder`, while training goes on.

    One thread seals (local disk only, so an output that hangs does not hold it up), another publishes.
    """

    def __init__(self, shelf: Shelf, folder: Path, fence: Callable[[], None] = lambda: None):
        self.shelf, self.folder, self.fence = shelf, Path(folder), fence
        self._wake = threading.Condition()
        self._to_seal: Path | None = None
        self._closing = self._abandon = False
        self._bug: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._guarded, args=(work,), name=name, daemon=True)
            for name, work in (("seal checkpoints", self._seal_all), ("publish checkpoints", self._publish_all))
        ]
        for thread in self._threads:
            thread.start()

    def saved(self, directory: Path) -> None:
        """The trainer has written a checkpoint; waits while the one before is still being sealed (local work only)."""
        with self._wake:
            self._wake.wait_for(lambda: self._to_seal is None or self._bug is not None)
            self._raise_bug()
            self._to_seal = Path(directory)
            self._wake.notify_all()

    def wait(self, deadline: float) -> bool:
        """Wait until everything saved is sealed and published, or time.monotonic() passes `deadline`."""
        with self._wake:
            self._wake.wait_for(lambda: self._idle() or self._bug is not None, max(0.0, deadline - time.monotonic()))
            self._raise_bug()
            return self._idle()

    def close(self, deadline: float) -> None:
        """End both threads once all is published; raises NotPublished at the deadline, with what is where."""
        done = self.wait(deadline)
        self.stop()
        if not (done or self._idle()):
            raise NotPublished(self.explain())
        self.shelf.forget_staged()
        remove_empty(self.shelf.staging)

    def stop(self) -> None:
        """End both threads without waiting for the output: one that hangs there is a daemon, and ends with us."""
        with self._wake:
            self._closing = self._abandon = True
            self._wake.notify_all()
        for thread in self._threads:
            thread.join(timeout=1.0)

    def explain(self) -> str:
        """Which checkpoint is not in output_dir, where it is instead, and what to do."""
        status, root = self.shelf.status, self.shelf.output.root
        there = f"the newest there is {status.published}" if status.published else "there is none of this run there"
        return (
            f"checkpoint {status.sealed_step} could not be published to {root} in time ({status.tries_failed} tries "
            f"failed; last: {status.last_error or 'it is still being copied'}); {there}. It is complete in "
            f"{status.staged or self.folder}: keep that directory. Once {root} works again, the same command with "
            "resume_from_checkpoint: true takes it from there and publishes it."
        )

    # ------------------------------------------------------------------------------------------------------ threads

    def _idle(self) -> bool:
        return self._to_seal is None and not self.shelf.waiting

    def _raise_bug(self) -> None:
        if self._bug is not None:
            raise CheckpointError(f"checkpoints are no longer saved: {self._bug}") from self._bug

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # raised again by the next call from the main thread
            with self._wake:
                self._bug = error
                self._wake.notify_all()

    def _seal_all(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._to_seal is not None or self._closing)
                directory = self._to_seal
            if directory is None:
                return
            self.shelf.seal(directory)
            # the checkpoint that the run was resumed from has been read by now, and there is a newer one
            shutil.rmtree(self.shelf.staging / "resume", ignore_errors=True)
            with self._wake:
                self._to_seal = None
                self._wake.notify_all()

    def _publish_all(self) -> None:
        pause = FIRST_PAUSE
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self.shelf.waiting or self._closing)
                if self._abandon:
                    return
            self.fence()
            if self.shelf.publish():
                pause = FIRST_PAUSE
                with self._wake:
                    self._wake.notify_all()
            else:
                with self._wake:
                    self._wake.wait_for(lambda: self._abandon, pause)
                pause = min(2 * pause, LONGEST_PAUSE)


def until(deadline: float, attempt: Callable[[], None], what: str, kept: Path) -> None:
    """Call `attempt` until it succeeds; NotPublished at the deadline, naming what is `kept` on local disk."""
    pause, tries = FIRST_PAUSE, 0
    while True:
        try:
            return attempt()
        except FAULTS as error:
            tries += 1
            LOG.warning("%s: %s", what, error)
            if time.monotonic() + pause > deadline:
                raise NotPublished(
                    f"{what} ({tries} tries failed; last: {error}). The files are complete in {kept}: copy them."
                ) from error
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
