"""The checkpoints of one run as train() sees them: the lease, what to go on from, where to save, and a good end."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from axo_flash.checkpoints.identity import identity_of
from axo_flash.checkpoints.lease import Lease
from axo_flash.checkpoints.manifest import LARGEST, MANIFEST, Broken, Manifest, seal
from axo_flash.checkpoints.output import LocalOutput, MountedOutput, Output
from axo_flash.checkpoints.resume import (
    Candidate,
    CheckpointError,
    Found,
    checkpoint_at,
    clear_staging,
    newest_complete,
    remove_empty,
    require_same_config,
    require_same_data,
    survey,
)
from axo_flash.checkpoints.room import require_room
from axo_flash.checkpoints.shelf import Shelf, next_generation
from axo_flash.checkpoints.storage import FAULTS, LocalStorage, Storage
from axo_flash.checkpoints.writer import NotPublished, Writer, until
from axo_flash.config import Config
from axo_flash.mount_io import MountIO
from axo_flash.mounts import covers, find_mount, real_place

HEARTBEAT_TIMEOUT, RELEASE_TIMEOUT = 30.0, 5.0  # seconds; another heartbeat follows, so one may give up soon


def place_of(config: Config) -> tuple[str, bool]:
    """(the absolute output_dir, whether it lies on a mount), touching no mount.

    Raises CheckpointError if it lies below data_mount and nothing is mounted there: that is the local disk underneath.
    """
    root = os.path.abspath(config.output_dir)
    mount = find_mount(real_place(root))
    wanted = config.data_mount and os.path.abspath(config.data_mount)
    if wanted and covers(wanted, root) and mount.mount_point != wanted and not mount.is_remote:
        raise CheckpointError(
            f"output_dir {root} lies below data_mount {wanted}, but nothing is mounted there: checkpoints would go to "
            f"{mount}, and be hidden by the next mount. Mount it, or correct output_dir."
        )
    return (real_place(root), True) if mount.is_remote else (root, False)


def staging_of(config: Config, output_dir: str, mounted: bool) -> Path:
    """Where checkpoints are written first: inside a local output_dir, else a folder for it on a local disk."""
    if not mounted:
        return Path(output_dir) / ".staging"
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "axo_flash" / "checkpoints"
    fallback = Path(tempfile.gettempdir()) / "axo_flash" / "checkpoints"
    wanted = [Path(config.checkpoint_staging_path)] if config.checkpoint_staging_path else [default, fallback]
    local = next((root for root in wanted if not find_mount(real_place(root)).is_remote), None)
    if local is None:
        raise CheckpointError(
            f"checkpoint_staging_path: {wanted[0]} lies on {find_mount(wanted[0])}, expected a directory on a local "
            "disk: checkpoints are completed there before they go to the mount. Set it to one with room for three."
        )
    name = f"{Path(output_dir).name}-{hashlib.sha256(output_dir.encode()).hexdigest()[:12]}"
    return local.absolute() / name


class Session:
    """Use as a context manager around a run: it holds the lease on output_dir.

    Steps: `find` what to go on from, `begin` when the data is known, hand every save to `saved` (each written below a
    new `folder()`), `settle` when training is over, `publish_weights` and `publish_notes` at the end.
    """

    def __init__(
        self,
        config: Config,
        say: Callable[[str], None] = print,
        *,
        storage: Storage | None = None,
        lease_storage: Storage | None = None,
        lease_options: dict[str, float] | None = None,
    ):
        self.config, self.say = config, say
        self.root, self.mounted = place_of(config)
        self._mount_ios: list[MountIO] = []
        if storage is not None:
            self.mounted, self.storage, beating = True, storage, lease_storage or storage
        elif self.mounted:
            self.storage = self._mount_io(config.data_timeout)
            beating = self._mount_io(HEARTBEAT_TIMEOUT)
        else:
            self.storage = beating = LocalStorage()
        self.output: Output = MountedOutput(self.root, self.storage) if self.mounted else LocalOutput(self.root)
        self.staging = staging_of(config, self.root, self.mounted)
        self.lease = Lease(self.root, self.storage, beating, say=say, **(lease_options or {}))
        self.found: Found | None = None
        self.writer: Writer | None = None
        self._saves = 0

    def _mount_io(self, timeout: float, place: str | None = None) -> MountIO:
        """A helper process of its own: calls of one take turns, and a long copy must not hold up a heartbeat."""
        mount_io = MountIO(timeout, self.config.stall_timeout)
        mount_io.expect_mount(find_mount(place or self.root).mount_point)
        self._mount_ios.append(mount_io)
        return mount_io

    def __enter__(self) -> Session:
        try:
            self.lease.acquire()
        except OSError as error:
            raise CheckpointError(
                f"output_dir {self.root} cannot be used: {error}. Correct it, or the path."
            ) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        """Give the lease back. After an error what is sealed stays in staging, and the next run finds it there."""
        if self.writer is not None:
            unsettled = kind is not None and not issubclass(kind, KeyboardInterrupt | NotPublished)
            if unsettled:  # an error of training: what it saved before is worth a while
                self.writer.wait(time.monotonic() + self.config.preemption_timeout)
            if self._mount_ios:
                self._mount_ios[0].stop()  # what still runs there will not end in time: the publishing thread returns
            self.writer.stop()
        thread = threading.Thread(target=self._leave, name="release", daemon=True)
        thread.start()
        thread.join(RELEASE_TIMEOUT)  # a mount that hangs must not hold the end of the run
        if thread.is_alive():
            self.say(f"{self.root} does not answer: its lease could not be given back, and will run out")

    def _leave(self) -> None:
        try:
            self.lease.release()
        except FAULTS as error:
            self.say(f"the lease on {self.root} could not be given back, and will run out: {error}")
        for mount_io in self._mount_ios:
            mount_io.close()

    # ------------------------------------------------------------------------------------------------------- before

    def find(self) -> Found | None:
        """What the configuration says to go on from, verified and local; None to start afresh. Says what it skipped."""
        clear_staging(self.staging)
        wanted = self.config.resume_from_checkpoint
        if isinstance(wanted, str):
            self.found = checkpoint_at(wanted, self._output_that_holds(wanted), self.output, self.staging)
        elif wanted or self.config.auto_resume_from_checkpoints:
            self.found = newest_complete(self.output, self.staging)
            if wanted and self.found is None:
                raise CheckpointError(
                    f"resume_from_checkpoint: true, but there is no complete checkpoint in {self.root} (nor in "
                    f"{self.staging}). Remove the key to start afresh, or correct output_dir."
                )
        if self.found is not None:
            for skipped in self.found.skipped:
                self.say(f"skipped {skipped}")
            require_same_config(self.found, identity_of(self.config))
            if not self.mounted and Path(self.found.source).is_relative_to(self.staging):
                # left by a killed run; now, and not beside training: the trainer reads it where it will stay
                path = self.output.path(self.output.publish(self.found.local))
                self.found = replace(self.found, source=path, local=Path(path))
            self.say(f"going on from {self.found.source}, verified")
        return self.found

    def _output_that_holds(self, checkpoint: str) -> Output:
        """The place that a checkpoint is a directory of: one on another mount is brought from there like our own."""
        parent = os.path.dirname(os.path.abspath(checkpoint))
        place = real_place(parent)
        if place == real_place(self.root):
            return self.output
        if find_mount(place).is_remote:
            return MountedOutput(place, self._mount_io(self.config.data_timeout, place))
        return LocalOutput(parent)

    def begin(self, data: str) -> None:
        """Check that the checkpoint was of the same data, and start the threads that seal and publish."""
        identity = identity_of(self.config, data)
        if self.found is not None:
            require_same_data(self.found, identity)
        candidates, _ = survey(self.output, self.staging)
        generation = next_generation([candidate.manifest for candidate in candidates])
        shelf = Shelf(self.output, self.staging, self.config.save_total_limit, generation, identity)
        self._take_over(shelf, candidates)
        self.writer = Writer(shelf, self.staging, self.lease.require)

    def _take_over(self, shelf: Shelf, candidates: list[Candidate]) -> None:
        """What earlier runs left in staging: the checkpoint that we go on from is kept, older ones of it go."""
        for candidate in (one for one in candidates if one.name is None):
            path = Path(candidate.source)
            if self.found is not None and path == self.found.local:
                same = (one for one in candidates if one.name is not None and one.manifest == candidate.manifest)
                shelf.adopt(path, next((one.source for one in same), None))
            elif self.found is not None and candidate.manifest.order < self.found.manifest.order:
                shutil.rmtree(path)
            else:
                self.say(f"left in staging by an earlier run, and not touched: {path}")
        remove_empty(self.staging)

    def require_room(self, one: int) -> None:
        """Raise CheckpointError if local disk cannot take a checkpoint of `one` bytes; say so if it may get short."""
        if self.config.save_schedule()[0] != "no":
            require_room(self.staging, one, self.say)

    # ------------------------------------------------------------------------------------------------------- during

    def folder(self) -> Path:
        """A new folder for the trainer to save a checkpoint in; on local disk, and never used before."""
        self._saves += 1
        folder = self.staging / f"save-{self.writer.shelf.generation}-{self._saves}"
        folder.mkdir(parents=True)
        return folder

    def saved(self, directory: Path) -> None:
        """A checkpoint has been written; the rest happens beside training."""
        self.writer.saved(directory)

    def notice(self) -> str:
        """What a person should know of the checkpoints at this moment, or nothing."""
        return self.writer.shelf.status.notice() if self.writer else ""

    def newest(self) -> str | None:
        """The newest complete checkpoint of this run, or the one that it went on from."""
        status = self.writer.shelf.status if self.writer else None
        own = status and (status.staged or status.published)
        return own or (self.found.source if self.found else None)

    # ---------------------------------------------------------------------------------------------------------- end

    def settle(self, deadline: float) -> NotPublished | None:
        """Wait until all is published; at the deadline, what to tell the user instead."""
        try:
            self.writer.close(deadline)
        except NotPublished as problem:
            return problem
        return None

    def last_words(self) -> str:
        """What is where, for a process that has to leave at once."""
        status = self.writer.shelf.status
        if status.staged is None:
            return f"The newest checkpoint is {self.newest()}."
        return self.writer.explain()

    def facts(self) -> dict[str, Any]:
        """For the report."""
        facts = vars(self.writer.shelf.status) | {"staging": str(self.staging), "lease_fault": self.lease.last_fault}
        facts.pop("behind_since")  # a clock of this process
        return facts

    def local_output(self) -> Path:
        """Where weights, report and picture are written: output_dir, or a local folder if that is a mount."""
        folder = self.staging / f"output-{self.writer.shelf.generation}" if self.mounted else Path(self.root)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def publish_weights(self, step: int, deadline: float) -> NotPublished | None:
        """Bring what local_output holds to a mounted output_dir, its manifest last; or what to tell the user."""
        if not self.mounted:
            return None
        local, identity = self.local_output(), self.writer.shelf.identity
        manifest = seal(local, step, self.writer.shelf.generation, 0, identity)
        return self._in_time(
            deadline, lambda: self._replace(local, manifest), "the trained weights could not be published"
        )

    def publish_notes(self, names: list[str], deadline: float) -> NotPublished | None:
        """Bring single files of local_output (report, picture) to a mounted output_dir; or what to tell the user."""
        if not self.mounted:
            return None
        local = self.local_output()

        def attempt() -> None:
            for name in names:
                self._put(local / name, name)

        return self._in_time(deadline, attempt, f"{' and '.join(names)} could not be published")

    def clear_local_output(self) -> None:
        """Remove the local copy of what is on the mount now."""
        if self.mounted:
            shutil.rmtree(self.local_output())
            remove_empty(self.staging)

    def _put(self, local: Path, name: str) -> None:
        """Copy a file into output_dir in the place of an older one, which goes first: nothing is written over."""
        target = os.path.join(self.root, name)
        if self.storage.stat(target) is not None:
            self.storage.remove_tree(target)
        self.storage.makedirs(os.path.dirname(target))
        self.storage.copy_out(str(local), target)

    def _replace(self, local: Path, manifest: Manifest) -> None:
        """The weights of an earlier run go, their manifest first, so that no mixture of the two is ever complete."""
        target = os.path.join(self.root, MANIFEST)
        if self.storage.stat(target) is not None:
            self.storage.remove_tree(target)
        for name in manifest.files:
            self._put(local / name, name)
        self.storage.write_new(target, manifest.to_bytes())
        try:
            arrived = Manifest.from_bytes(self.storage.read_bytes(target, LARGEST))
        except Broken as error:
            raise OSError(f"{target}: {error}") from error
        if arrived != manifest:
            raise OSError(f"{target}: what is read back is not what was written")

    def _in_time(self, deadline: float, attempt: Callable[[], None], what: str) -> NotPublished | None:
        """`until`, in a thread that can be left behind: a mount that hangs must not hold the end of the run."""
        failed: list[BaseException] = []

        def work() -> None:
            try:
                until(deadline, attempt, f"{what} to {self.root}", self.local_output())
            except BaseException as error:  # raised below, in the main thread
                failed.append(error)

        thread = threading.Thread(target=work, name="publish output", daemon=True)
        thread.start()
        thread.join(max(0.0, deadline - time.monotonic()) + 1.0)
        if thread.is_alive():
            return NotPublished(
                f"{what} to {self.root} in time: it does not answer. The files are complete in "
                f"{self.local_output()}: copy them."
            )
        if failed and not isinstance(failed[0], NotPublished):
            raise failed[0]
        return failed[0] if failed else None
