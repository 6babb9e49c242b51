"""What happens to one checkpoint after another, without threads: sealed, published, rotated; retried when it fails."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from axo_flash.checkpoints.manifest import Broken, Identity, Manifest, seal, verify_local
from axo_flash.checkpoints.output import CHECKPOINT, Output
from axo_flash.checkpoints.storage import FAULTS

LONG_WAIT = 120.0  # seconds of publishing after which people are told, though nothing has failed yet
LOG = logging.getLogger(__name__)


@dataclass
class Status:
    """What became of the checkpoints so far, for people and for the report."""

    sealed_step: int | None = None  # newest one that is complete on local disk
    published_step: int | None = None  # newest one that is complete and verified in output_dir
    published: str | None = None  # its path
    staged: str | None = None  # the newest that is in staging only
    never_published: list[int] = field(default_factory=list)  # steps given up for a newer one
    tries_failed: int = 0
    last_error: str | None = None
    not_rotated: str | None = None
    behind_since: float | None = None  # time.monotonic() of the first sealed checkpoint that is not published

    def notice(self) -> str:
        """What a person should know while training goes on, or nothing."""
        if self.staged is None:
            return ""
        waited = time.monotonic() - (self.behind_since or time.monotonic())
        if self.last_error is None and waited < LONG_WAIT:
            return ""
        return (
            f"checkpoint {self.sealed_step} only in {self.staged} (output_dir has failed {self.tries_failed} times, and "
            f"is behind for {waited:.0f} s)"
        )


class Shelf:
    """The checkpoints of one run. `seal` and `publish` may be called from one thread each.

    Staging holds the newest sealed checkpoint, one that is being published, and the one being written: never more.
    """

    def __init__(self, output: Output, staging: Path, limit: int, generation: int, identity: Identity):
        self.output, self.staging, self.limit = output, Path(staging), limit
        self.generation, self.identity = generation, identity
        self.status = Status()
        self._saves = 0
        self._lock = threading.Lock()
        self._pending: Path | None = None  # newest sealed, not published
        self._working: Path | None = None  # being published
        self._kept: Path | None = None  # published, kept until a newer one is sealed

    def seal(self, directory: Path) -> Manifest:
        """Complete a checkpoint that was written to staging; an older one that waits to be published gives way."""
        step, self._saves = step_of(directory), self._saves + 1
        manifest = seal(directory, step, self.generation, self._saves, self.identity)
        with self._lock:
            given_up, self._pending = self._pending, directory
            kept, self._kept = self._kept, None
            self.status.sealed_step, self.status.staged = step, str(directory)
            self.status.behind_since = self.status.behind_since or time.monotonic()
            doomed = [path for path in (given_up, kept) if path not in (None, self._working)]
            if given_up is not None and given_up != self._working:
                self.status.never_published.append(step_of(given_up))
        for path in doomed:
            shutil.rmtree(path)
        return manifest

    def adopt(self, directory: Path, published: str | None) -> None:
        """Take over a sealed checkpoint that an earlier run left in staging: to publish it, if it is not `published`."""
        verify_local(directory)
        with self._lock:
            self.status.sealed_step = step_of(directory)
            if published is None:
                self._pending, self.status.staged = directory, str(directory)
            else:
                self._kept = directory
                self.status.published_step, self.status.published = step_of(directory), published

    @property
    def waiting(self) -> bool:
        """Whether a sealed checkpoint is not published."""
        with self._lock:
            return self._pending is not None or self._working is not None

    def publish(self) -> bool:
        """Try once to publish the newest sealed checkpoint and rotate; False if it failed (status says how).

        A fault of the output is noted, for the caller to try again; any other error is a bug, and raised.
        """
        with self._lock:
            staged = self._working = self._pending
        if staged is None:
            return True
        try:
            name = self.output.publish(staged)
        except (Broken, *FAULTS) as error:
            self._failed(staged, error)
            return False
        self._published(staged, name)
        try:
            self.output.rotate(self.limit, newest=name)
            self.status.not_rotated = None
        except FAULTS as error:  # nothing is lost by it: the next rotation takes what this one left
            self.status.not_rotated = str(error)
            LOG.warning("old checkpoints in %s could not be removed, for now: %s", self.output.root, error)
        return True

    def _failed(self, staged: Path, error: Exception) -> None:
        with self._lock:
            self._working = None
            superseded = self._pending != staged
            self.status.tries_failed += 1
            self.status.last_error = str(error)
            if superseded:
                self.status.never_published.append(step_of(staged))
        if superseded:
            shutil.rmtree(staged)
        LOG.warning("%s could not be published to %s: %s", staged.name, self.output.root, error)

    def _published(self, staged: Path, name: str) -> None:
        with self._lock:
            self._working = None
            newest = self._pending == staged
            if newest:
                self._pending, self.status.staged, self.status.behind_since = None, None, None
                self._kept = staged if staged.exists() else None
            self.status.published_step, self.status.published = step_of(staged), self.output.path(name)
            self.status.tries_failed, self.status.last_error = 0, None
        if not newest and staged.exists():
            shutil.rmtree(staged)

    def forget_staged(self) -> None:
        """Remove the staged copy of what is published; call it when the run has ended well."""
        with self._lock:
            kept, self._kept = self._kept, None
        if kept is not None:
            shutil.rmtree(kept)


def next_generation(seen: list[Manifest]) -> int:
    """A generation above all that were seen; seconds since 1970 keep it above those that could not be read too."""
    return max([int(time.time()), *(manifest.generation + 1 for manifest in seen)])


def step_of(directory: Path) -> int:
    """The step in a checkpoint's name."""
    return int(CHECKPOINT.fullmatch(directory.name)[1])
