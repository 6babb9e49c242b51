"""The output directory as a place for checkpoints: one that is a mount gets verified copies, a local one a rename."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

from axo_flash.checkpoints.manifest import (
    LARGEST,
    MANIFEST,
    Broken,
    FileEntry,
    Manifest,
    check_file,
    read_local,
    verify_local,
)
from axo_flash.checkpoints.storage import FAULTS, LocalStorage, Storage, sync
from axo_flash.mount_io import MountError

LOG = logging.getLogger(__name__)
STARTED = "started.json"  # the first file of a checkpoint on a mount: while it is there, nobody finished it
READ_AGAIN = 3  # times that wrong bytes from a mount are read again, if they are others each time
CHECKPOINT = re.compile(r"checkpoint-(\d+)(?:\.\d+)?")


@dataclass(frozen=True)
class Skipped:
    """A checkpoint that cannot be used, and why. `was_complete`: it is damage, not a save that never ended."""

    path: str
    reason: str
    was_complete: bool

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass
class Output:
    """Checkpoints below `root`, through a Storage. `used` are the names that this run gave: none is given twice."""

    root: str
    storage: Storage
    used: set[str] = field(default_factory=set)

    def path(self, name: str) -> str:
        """The path of a checkpoint."""
        return os.path.join(self.root, name)

    def names(self) -> list[str]:
        """Everything that is named like a checkpoint; [] if root is not there. A fault is raised: it is no absence."""
        if self.storage.stat(self.root) is None:
            return []
        return [name for name in self.storage.listdir(self.root) if CHECKPOINT.fullmatch(name)]

    def manifest(self, name: str) -> Manifest:
        """The manifest of a checkpoint, its files not looked at; raises Broken, or what Storage raises."""
        path = os.path.join(self.path(name), MANIFEST)
        if self.storage.stat(path) is None:
            raise Broken(f"no {MANIFEST}: never completed")
        return Manifest.from_bytes(self.storage.read_bytes(path, LARGEST))

    def survey(self) -> tuple[dict[str, Manifest], list[Skipped]]:
        """(name -> manifest of those that have one, newest first; the others)."""
        complete, skipped = {}, []
        for name in self.names():
            try:
                complete[name] = self.manifest(name)
            except Broken as error:
                skipped.append(Skipped(self.path(name), str(error), not self._is_unfinished(name)))
            except FAULTS as error:
                skipped.append(Skipped(self.path(name), f"cannot be read: {error}", True))
        newest_first = sorted(complete, key=lambda name: complete[name].order, reverse=True)
        return {name: complete[name] for name in newest_first}, skipped

    def _is_unfinished(self, name: str) -> bool:
        """Whether a directory without a whole manifest is a save (or a removal) of this package that never ended."""
        try:
            there = self.storage.listdir(self.path(name))
        except FAULTS:
            return False  # unknown: it is not ours to remove, nor to start afresh beside
        return not there or STARTED in there

    def free_name(self, step: int) -> str:
        """checkpoint-STEP, or checkpoint-STEP.2, .3, ... if that was ever there."""
        taken, name, number = self.used | set(self.names()), f"checkpoint-{step}", 1
        while name in taken:
            number += 1
            name = f"checkpoint-{step}.{number}"
        self.used.add(name)
        return name

    def publish(self, staged: Path) -> str:
        """Bring a sealed local checkpoint here; its name once it is complete and verified."""
        raise NotImplementedError

    def bring(self, name: str, into: Path) -> Path:
        """A local directory with the verified files of a checkpoint here; raises Broken, or what Storage raises."""
        raise NotImplementedError

    def rotate(self, limit: int, newest: str) -> list[str]:
        """Remove all but the `limit` newest complete checkpoints; the names removed.

        `newest` has just been verified. It is never removed, nor is anything if it is not listed as the newest one.
        """
        complete, skipped = self.survey()
        if next(iter(complete), None) != newest:
            return []
        unfinished = [os.path.basename(one.path) for one in skipped if not one.was_complete]
        doomed = [*list(complete)[max(limit, 1) :], *unfinished]
        for name in doomed:
            self.remove(name)
        return doomed

    def remove(self, name: str) -> None:
        """Remove a checkpoint so that, wherever it ends, what is left is known as unfinished: by a mark put first."""
        directory = self.path(name)
        entries = [entry for entry in self.storage.listdir(directory) if entry != STARTED]
        try:
            if self.storage.stat(os.path.join(directory, STARTED)) is None:
                self.storage.write_new(os.path.join(directory, STARTED), b"{}")
        except FAULTS as error:  # a full mount: removing is what makes room, so it goes on
            LOG.warning("%s is removed without a mark: %s", directory, error)
        for entry in sorted(entries, key=lambda entry: entry != MANIFEST):
            self.storage.remove_tree(os.path.join(directory, entry))
        self.storage.remove_tree(directory)


class LocalOutput(Output):
    """An output directory on a disk of this machine: a sealed checkpoint is renamed into it, and never copied."""

    def __init__(self, root: str):
        super().__init__(root, LocalStorage())

    def publish(self, staged: Path) -> str:
        """Rename; the directory appears complete or not at all."""
        name = self.free_name(read_local(staged).step)
        os.rename(staged, self.path(name))
        sync(self.root)
        return name

    def bring(self, name: str, into: Path) -> Path:
        """Verified where it is."""
        verify_local(Path(self.path(name)))
        return Path(self.path(name))


@dataclass
class MountedOutput(Output):
    """An output directory on a mount: verified copies under new names, the manifest last."""

    debris: set[str] = field(default_factory=set)  # names of tries that failed, not yet removed

    def publish(self, staged: Path) -> str:
        """Copy every file under a name that was never there, then the manifest; each is read back and compared."""
        self.clear_debris()  # first: on a full mount every try would leave more of it
        manifest = read_local(staged)
        name = self.free_name(manifest.step)
        self.debris.add(name)
        target = self.path(name)
        self.storage.makedirs(target)
        started = json.dumps({"step": manifest.step, "time": time.time()}).encode()
        self.storage.write_new(os.path.join(target, STARTED), started)
        self.copy_files(staged, manifest, target)
        self.storage.write_new(os.path.join(target, MANIFEST), manifest.to_bytes())
        if self.manifest(name) != manifest:
            raise OSError(f"{target}/{MANIFEST}: what is read back is not what was written")
        self.debris.discard(name)
        try:
            # from here on a manifest that the mount hides for a while cannot be taken for one that was never written
            self.storage.remove_tree(os.path.join(target, STARTED))
        except FAULTS as error:
            LOG.warning("%s stays beside a complete checkpoint, which is harmless: %s", f"{target}/{STARTED}", error)
        return name

    def clear_debris(self) -> None:
        """Remove what failed tries of this run left; a fault is raised: the mount is not well.

        What cannot be removed because a call hangs in it stays for a later time: its name is not used again, and the
        rest of the mount may be well.
        """
        for name in sorted(self.debris):
            try:
                if self.storage.stat(self.path(name)) is not None:
                    self.remove(name)
            except MountError as error:
                if error.code != errno.ETIMEDOUT:
                    raise
                LOG.warning("what a failed try left in %s stays for now: %s", self.path(name), error)
                continue
            self.debris.discard(name)

    def copy_files(self, staged: Path, manifest: Manifest, target: str) -> None:
        """Copy a sealed directory's files to `target`, and hold each against the manifest."""
        for folder in sorted({os.path.dirname(file) for file in manifest.files} - {""}):
            self.storage.makedirs(os.path.join(target, folder))
        for file, entry in manifest.files.items():
            copied = self.storage.copy_out(str(staged / file), os.path.join(target, file))
            if (copied.size, copied.sha256) != (entry.size, entry.sha256):
                raise OSError(f"{staged / file} is no longer what was sealed, or was read wrongly")
            arrived = self.storage.stat(os.path.join(target, file))
            if arrived is None or arrived.size != entry.size:
                raise OSError(f"{target}/{file}: {arrived and arrived.size} bytes arrived of {entry.size}")

    def bring(self, name: str, into: Path) -> Path:
        """A copy in `into`, every file held against the manifest while it is copied."""
        manifest, target = self.manifest(name), into / name
        shutil.rmtree(target, ignore_errors=True)
        for file, entry in manifest.files.items():
            local = target / file
            local.parent.mkdir(parents=True, exist_ok=True)
            if self.storage.stat(os.path.join(self.path(name), file)) is None:
                raise Broken(f"{file} is missing")
            self._bring_file(name, file, entry, local)
        (target / MANIFEST).write_bytes(manifest.to_bytes())
        return target

    def _bring_file(self, name: str, file: str, entry: FileEntry, local: Path) -> None:
        """One file of a checkpoint. Wrong bytes are read again: the same ones twice are damage, others a fault on the way."""
        seen: set[str] = set()
        while True:
            copied = self.storage.copy_in(os.path.join(self.path(name), file), str(local))
            try:
                return check_file(file, entry, copied.size, copied.sha256)
            except Broken as error:
                if copied.sha256 in seen or len(seen) == READ_AGAIN:
                    raise
                seen.add(copied.sha256)
                LOG.warning("%s: %s; read again", self.path(name), error)

    def manifest(self, name: str) -> Manifest:
        """As above; one that is damaged is read again, for the same reason."""
        for _ in range(READ_AGAIN):
            try:
                return super().manifest(name)
            except Broken as error:
                if self.storage.stat(os.path.join(self.path(name), MANIFEST)) is None:
                    raise
                LOG.warning("%s: %s; read again", self.path(name), error)
        return super().manifest(name)
