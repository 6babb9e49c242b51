"""The shards of a data set that is streamed: what they are, and bringing them one after the other to local disk.

A shard is a data file. A thread brings and tokenises the next ones while rows of the present one are trained on: the
file is read once from front to back, by the helper process if it lies on a mount, held against what was listed at the
start, tokenised by a process of its own, and removed when its rows are used up. Local disk holds the present shard and
`streaming_prefetch_shards` more.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import queue
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axo_flash.data.files import DataError, DataFile, LocalCopy, fetch, list_files
from axo_flash.data.mounted import Transfer, bring, manifests
from axo_flash.data.prepared import Origin, Prepared, open_set
from axo_flash.data.tokeniser import Tokeniser
from axo_flash.mount_io import MountIO

if TYPE_CHECKING:
    from axo_flash.config import Config

PREFETCH = 1  # shards, where streaming_prefetch_shards is null
# Local bytes that a byte of a data file takes at most while it is tokenised: its copy, the rows written out where they
# are not lines of JSON (Parquet is compressed, some four times), and 8 bytes for each token of 3 to 4 characters.
DISK_FACTOR = {"json": 5, "csv": 5, "arrow": 5, "parquet": 15}
LOOK_SECONDS = 0.5  # between looks whether to stop waiting


class StreamStopped(Exception):
    """The run was told to stop while it waited for a shard."""


@dataclasses.dataclass
class Shard:
    """One data file as it was listed when the run began; `sha256` is its manifest's, or that of the first reading."""

    file: DataFile
    dataset: int
    size: int
    mtime_ns: int
    sha256: str | None
    in_manifest: bool

    def state(self) -> list[Any]:
        """What a checkpoint keeps of it. What is in a file counts, not where it lies."""
        return [self.dataset, os.path.basename(self.file.path), self.size, self.mtime_ns, self.sha256]

    def differs_from(self, state: list[Any]) -> str | None:
        """How it is another file than the one in a checkpoint, or None. Files whose hashes are known may be newer."""
        dataset, name, size, mtime_ns, sha256 = state
        if (dataset, name) != (self.dataset, os.path.basename(self.file.path)):
            return f"{name} of datasets[{dataset}] has its place taken by {self.file.path}"
        if size != self.size:
            return f"{self.file.path} has {self.size:,} bytes, and had {size:,}"
        if self.in_manifest and sha256 is not None:
            return None if self.sha256 == sha256 else f"{self.file.path} has another sha256 in its manifest"
        return None if self.mtime_ns == mtime_ns else f"{self.file.path} was written anew (its mtime differs)"


@dataclasses.dataclass
class Loaded:
    """A shard on local disk: its documents, and the folder that holds them."""

    epoch: int
    place: int
    index: int
    prepared: Prepared
    folder: Path


def list_shards(config: Config, io: MountIO) -> list[Shard]:
    """Every shard of every dataset, looked at but not read. Raises DataError for what cannot be streamed."""
    shards: list[Shard] = []
    for index, dataset in enumerate(config.datasets):
        files = list_files(dataset, config.data_mount, io)
        if not files:
            raise DataError(
                f"datasets[{index}].path: {dataset.path} is neither a file nor a directory here, and streaming: true reads "
                "files alone. Download the dataset to a directory, or set streaming: false."
            )
        remote = [file for file in files if file.mount.is_remote]
        expected = manifests(remote, io)[0] if remote else {}
        for file in files:
            found = io.stat(file.path, listed=True) if file.mount.is_remote else os.stat(file.path)
            size, mtime_ns = (
                (found.size, found.mtime_ns) if file.mount.is_remote else (found.st_size, found.st_mtime_ns)
            )
            if not size:
                raise DataError(f"{file.path} is empty (0 bytes): it should hold rows in {file.format} format.")
            sha256 = expected.get(file.path)
            shards.append(Shard(file, index, size, mtime_ns, sha256, sha256 is not None))
    return shards


def refuse_full_disk(shards: list[Shard], ahead: int, folder: Path) -> None:
    """Raise DataError before anything is read if the largest shards that may lie on the disk together cannot."""
    largest = sorted(shards, key=_room, reverse=True)[: ahead + 1]
    wanted, free = sum(map(_room, largest)), shutil.disk_usage(folder).free
    if wanted > free:
        raise DataError(
            f"streaming needs up to {wanted / 2**30:.2f} GiB of local disk, to copy and tokenise the {len(largest)} largest "
            f"files ({largest[0].file.path} has {largest[0].size / 2**30:.2f} GiB). Below {folder} there are "
            f"{free / 2**30:.2f} GiB free. Set dataset_prepared_path to a disk with more room, streaming_prefetch_shards "
            f"(now {ahead}) to fewer, or cut the data into smaller files."
        )


def _room(shard: Shard) -> int:
    return DISK_FACTOR[shard.file.format] * shard.size


# ------------------------------------------------------------------------------------------------------- the local disk
class Workspace:
    """A folder of this process below the directory of prepared sets. What dead processes left there is removed."""

    def __init__(self, root: Path):
        for lock in root.glob(".stream-*.lock"):
            held = self._locked(lock)
            if held is not None:  # nobody else holds it: its process is dead
                shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
                lock.unlink(missing_ok=True)
                os.close(held)
        for folder in root.glob(".stream-*"):  # what a process that outlived its run for a moment wrote there again
            if folder.is_dir() and not folder.with_name(f"{folder.name}.lock").exists():
                shutil.rmtree(folder, ignore_errors=True)
        self._held = None
        while self._held is None or not self._lock.exists():  # another run that looks for dead ones may take it first
            self._lock = root / f".stream-{uuid.uuid4().hex[:12]}.lock"
            self._held = self._locked(self._lock)
        self.folder = self._lock.with_suffix("")
        self.folder.mkdir()

    @staticmethod
    def _locked(path: Path) -> int | None:
        """A descriptor with an exclusive lock, which the kernel takes back when the process ends; None if it is held."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        return descriptor

    def close(self) -> None:
        """Remove it with all in it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.unlink(missing_ok=True)
        os.close(self._held)


class Feed:
    """Shards in a given order, each on local disk and tokenised, the next ones made ready ahead by a thread."""

    def __init__(self, config: Config, shards: list[Shard], io: MountIO, tokeniser: Tokeniser, folder: Path):
        self.shards, self.io, self.folder = shards, io, folder
        self.ahead = config.streaming_prefetch_shards or PREFETCH
        self.tokeniser = tokeniser
        self.transfer: Transfer | None = None
        self.waited = 0.0  # seconds that training stood still for a shard
        self._ready: queue.Queue[Loaded | BaseException] = queue.Queue()
        self._room = threading.Semaphore(self.ahead + 1)
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def started(self) -> bool:
        """Whether shards are on their way."""
        return self._thread is not None

    def start(self, order: Iterator[tuple[int, int, int]]) -> None:
        """Begin with the first (epoch, place in it, index of the shard) of `order`."""
        self._thread = threading.Thread(target=self._bring_all, args=(order,), name="bring shards", daemon=True)
        self._thread.start()

    def next(self, stopped: Callable[[], bool]) -> Loaded:
        """The next shard, waited for. Raises what bringing it raised, and StreamStopped if `stopped` says so."""
        started = time.monotonic()
        try:
            while True:
                with contextlib.suppress(queue.Empty):
                    found = self._ready.get(timeout=LOOK_SECONDS)
                    if isinstance(found, BaseException):
                        self._ready.put(found)  # no shard comes after it: whoever asks again is told the same
                        raise found
                    return found
                if stopped():
                    raise StreamStopped
        finally:
            self.waited += time.monotonic() - started

    def release(self, folder: Path) -> None:
        """The rows of a shard are used up: its place on the disk is for another one."""
        shutil.rmtree(folder)
        self._room.release()

    def close(self) -> None:
        """Stop the thread and the processes. A mount that hangs is not waited for."""
        self._closing.set()
        self._room.release()
        self.io.stop()
        self.tokeniser.close()
        if self._thread is not None:
            self._thread.join(1.0)  # it may sleep out a cache of attributes; what it does then, it does in vain
        self.io.close()

    # ----------------------------------------------------------------------------------------------------- the thread
    def _bring_all(self, order: Iterator[tuple[int, int, int]]) -> None:
        try:
            for number, (epoch, place, index) in enumerate(order):
                self._room.acquire()
                if self._closing.is_set():
                    return
                folder = self.folder / str(number)
                self._ready.put(Loaded(epoch, place, index, self._load(self.shards[index], folder), folder))
        except BaseException as error:  # raised by the `next` that would have had the shard
            self._ready.put(error)

    def _load(self, shard: Shard, folder: Path) -> Prepared:
        """Copy, check, tokenise; only the tokens stay."""
        folder.mkdir()
        wanted, free = _room(shard), shutil.disk_usage(folder).free
        if wanted > free:
            raise DataError(
                f"the next shard, {shard.file.path}, needs up to {wanted / 2**30:.2f} GiB of local disk, and below "
                f"{self.folder} there are {free / 2**30:.2f} GiB free now. Make room there, or set dataset_prepared_path."
            )
        copy = self._copy(shard, folder)
        origin = Origin(shard.dataset, shard.file.path, copy.size, copy.sha256, str(shard.file.mount), shard.file, copy)
        self.tokeniser.make([origin], folder)
        for path in folder.iterdir():
            if path.name != "set":
                path.unlink()
        prepared = open_set(folder / "set", [origin])
        if prepared is None:
            raise DataError(f"the tokens in {folder / 'set'} cannot be read back: is the disk full or failing?")
        return prepared

    def _copy(self, shard: Shard, folder: Path) -> LocalCopy:
        """The shard as it was listed; DataError if it is another file by now."""
        if shard.file.mount.is_remote:
            expected = {shard.file.path: shard.sha256} if shard.in_manifest else {}
            (copy,), transfer = bring([(shard.file, folder)], self.io, expected)
            self._count(transfer)
            mtime_ns = copy.mtime_ns
        else:
            copy = fetch(shard.file, folder)
            mtime_ns = os.stat(shard.file.path).st_mtime_ns
        changed = copy.size != shard.size or (not shard.in_manifest and mtime_ns != shard.mtime_ns)
        if changed or shard.sha256 not in (None, copy.sha256):
            raise DataError(
                f"{shard.file.path} on {shard.file.mount} has changed since it was first looked at: it has {copy.size:,} "
                f"bytes with sha256 {copy.sha256[:12]}..., expected are {shard.size:,} with "
                f"{(shard.sha256 or 'the same mtime')[:14]}. Data that are streamed must stay as they are until the run has "
                "ended: restore the file, or start afresh with another output_dir."
            )
        shard.sha256 = copy.sha256
        return copy

    def _count(self, transfer: Transfer) -> None:
        before = self.transfer or Transfer(0, 0, 0.0, 0, 0, 0)
        self.transfer = Transfer(
            files=before.files + transfer.files,
            bytes=before.bytes + transfer.bytes,
            seconds=before.seconds + transfer.seconds,
            retries=transfer.retries,  # of all calls so far: `io` counts them
            stalls=transfer.stalls,
            verified=before.verified + transfer.verified,
        )


def make_feed(config: Config, encoders: list, root: Path, stack: contextlib.ExitStack) -> Feed:
    """The feed of a run, nothing brought yet; `stack` closes it and removes its folder."""
    io = MountIO(config.data_timeout, config.stall_timeout)
    stack.callback(io.close)
    shards = list_shards(config, io)
    refuse_full_disk(shards, config.streaming_prefetch_shards or PREFETCH, root)
    workspace = Workspace(root)
    stack.callback(workspace.close)
    feed = Feed(config, shards, io, Tokeniser(config, encoders), workspace.folder)
    stack.callback(feed.close)
    return feed
