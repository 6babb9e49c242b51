"""Data files from mounts to local disk: each read once from front to back, by the helper process, and checked.

A file is as long as it declared before and after it was read, and still the same once no cache of attributes can have
answered for it; where a manifest in the format of `sha256sum` lies beside the data, its bytes are those named there.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import shutil
import time
from pathlib import Path

from axo_flash.data.files import (
    FORMAT_OF_EXTENSION,
    DataError,
    DataFile,
    LocalCopy,
    copy_path,
    progress_bar,
)
from axo_flash.mount_io import MountIO

LOG = logging.getLogger(__name__)
MANIFESTS = ("SHA256SUMS", "SHA256SUMS.txt", "sha256sums.txt", "sha256sum.txt")
MANIFEST_BYTES = 64 << 20
# hopsfs-mount answers from its cache of attributes for 5 s: a size that it had wrong, it has wrong until then
ATTRIBUTE_CACHE_SECONDS = 6.0


@dataclasses.dataclass
class Transfer:
    """What it took to bring the files of a run from their mounts: for the report.

    `verified` counts the files whose sha256 a manifest named; `complete` says that manifests name these files and no
    other that is there, so that no name can have been missing from a listing; `seconds` is wall time, checks and waiting
    included; `retries` counts calls that were tried again, `stalls` those among them that hung.
    """

    files: int
    bytes: int
    seconds: float
    retries: int
    stalls: int
    verified: int
    complete: bool = False


@dataclasses.dataclass
class _Job:
    """One file on its way."""

    file: DataFile
    target: Path
    size: int
    sha256: str | None = None  # what the manifest says
    copy: LocalCopy | None = None
    copied_at: float = 0.0


MORE_ROOM = "set dataset_prepared_path to a local disk with more room, or name fewer files"


def bring(
    files: list[tuple[DataFile, Path]],
    io: MountIO,
    expected: dict[str, str] | None = None,
    more_room: str = MORE_ROOM,
) -> tuple[list[LocalCopy], Transfer]:
    """Copy every file into the directory named with it, in the order given.

    `expected` are the hashes that `manifests` found for a data set of which these files are a part; None: look for them.
    `more_room` says what to do if the local disk is too small.
    Raises DataError for files that keep changing, do not fit on the local disk or are not what their manifest says, and
    MountError for a mount that fails for longer than `data_timeout`.
    """
    started = time.monotonic()
    unlisted: set[str] = set()
    if expected is None:
        expected, unlisted = manifests([file for file, _ in files], io)
    jobs = []
    for file, directory in files:
        size = io.stat(file.path, listed=True).size
        jobs.append(_Job(file, copy_path(file, directory), size, expected.get(file.path)))
    _refuse_full_disk(jobs, more_room)
    for job in jobs:
        _copy(job, io)
    _settle(jobs, io)
    transfer = Transfer(
        files=len(jobs),
        bytes=sum(job.copy.size for job in jobs),
        seconds=time.monotonic() - started,
        retries=io.stats.retries,
        stalls=io.stats.stalls,
        verified=sum(job.sha256 is not None for job in jobs),
        complete=not unlisted and all(job.sha256 is not None for job in jobs),
    )
    return [job.copy for job in jobs], transfer


def _refuse_full_disk(jobs: list[_Job], more_room: str) -> None:
    """Raise DataError before the first byte is read if the copies cannot fit."""
    wanted, directory = sum(job.size for job in jobs), jobs[0].target.parent
    free = shutil.disk_usage(directory).free
    if wanted > free:
        files = (
            f"{jobs[0].file.path} and what comes with it ({len(jobs)} files)" if len(jobs) > 1 else jobs[0].file.path
        )
        raise DataError(
            f"{files} needs {wanted / 2**30:.2f} GiB, and the local disk below {directory.parent} has "
            f"{free / 2**30:.2f} GiB free: {more_room}."
        )


def _copy(job: _Job, io: MountIO) -> None:
    """One pass over the file; a second one decides whether a hash that is not the manifest's was a fault on the way."""
    seen: set[str] = set()
    while True:
        with progress_bar(job.file.path, job.size) as bar:
            # not durable: the next run reads it anew, and what is tokenised is flushed when it is published
            copied = io.copy_in(
                job.file.path, str(job.target), lambda at: bar.update(at - bar.n), listed=True, durable=False
            )
        job.copy = LocalCopy(job.target, copied.sha256, copied.size, copied.mtime_ns)
        job.copied_at = time.monotonic()
        if job.sha256 in (None, copied.sha256):
            return
        if copied.sha256 in seen:
            raise DataError(
                f"{job.file.path} on {job.file.mount} is not what its manifest says: its sha256 is {copied.sha256} "
                f"(read {len(seen) + 1} times, {copied.size} bytes), expected {job.sha256}. The file is damaged or the "
                "manifest out of date: upload the file again, or make the manifest anew with sha256sum."
            )
        seen.add(copied.sha256)
        if len(seen) > 8:
            raise DataError(
                f"{job.file.path} on {job.file.mount} was read {len(seen)} times with other bytes each time, never "
                f"those of its manifest (sha256 {job.sha256}): the mount hands out wrong data; look at its log."
            )
        LOG.warning("%s: sha256 %s is not the manifest's: read again", job.file.path, copied.sha256)


def _settle(jobs: list[_Job], io: MountIO) -> None:
    """See that files without a hash to go by still have the size and mtime they were read with; read again if not."""
    waiting = [job for job in jobs if job.sha256 is None]
    deadline = time.monotonic() + io.timeout + ATTRIBUTE_CACHE_SECONDS
    while waiting:
        job = waiting.pop(0)
        time.sleep(max(0.0, job.copied_at + ATTRIBUTE_CACHE_SECONDS - time.monotonic()))
        info = io.stat(job.file.path, listed=True)
        if (info.size, info.mtime_ns) == (job.copy.size, job.copy.mtime_ns):
            continue
        if time.monotonic() > deadline:
            raise DataError(
                f"{job.file.path} on {job.file.mount} keeps changing: read with {job.copy.size} bytes, now {info.size} "
                "bytes. Wait until it is written, or give the data a name of its own."
            )
        LOG.warning("%s has changed, from %d to %d bytes: read again", job.file.path, job.copy.size, info.size)
        _copy(job, io)
        waiting.append(job)


# ------------------------------------------------------------------------------------------------------------ manifest
def manifests(files: list[DataFile], io: MountIO) -> tuple[dict[str, str], set[str]]:
    """(path -> sha256, data files named there that are not among `files`), from `sha256sum` manifests in the folders of
    the files and the folder that holds them all."""
    folders = {os.path.dirname(file.path) for file in files}
    folders.add(os.path.commonpath(folders))
    mine = {file.path for file in files}
    expected: dict[str, str] = {}
    unlisted: set[str] = set()
    for folder in sorted(folders, key=len):  # the manifest that lies nearest to a file decides
        # asked for by name too: a listing that is out of date may lack what decides whether it is
        there = (name for name in MANIFESTS if io.stat(os.path.join(folder, name)) is not None)
        names = sorted({*io.listdir(folder), *there})
        singles = {f"{os.path.basename(path)}.sha256" for path in mine if os.path.dirname(path) == folder}
        for name in names:
            if name in MANIFESTS or name in singles:
                manifest = os.path.join(folder, name)
                entries = _parsed(manifest, io.read_bytes(manifest, MANIFEST_BYTES))
                unlisted |= {path for path in set(entries) - mine if Path(path).suffix in FORMAT_OF_EXTENSION}
                _refuse_missing(manifest, unlisted, io)
                expected |= {path: sha256 for path, sha256 in entries.items() if path in mine}
    return expected, unlisted


def _parsed(manifest: str, content: bytes) -> dict[str, str]:
    """The lines of a manifest: 64 hexadecimal digits, a space, a space or `*`, a name relative to its folder."""
    entries = {}
    for number, line in enumerate(content.decode("utf-8", "surrogateescape").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        found = re.fullmatch(r"([0-9a-fA-F]{64}) [ *](.+)", line)
        if not found:
            raise DataError(
                f"{manifest}, line {number}: got {line[:80]!r}, expected the format of sha256sum, 64 hexadecimal digits, "
                "two spaces and a file name. Make it anew with `sha256sum FILES > SHA256SUMS`, or remove it."
            )
        entries[os.path.normpath(os.path.join(os.path.dirname(manifest), found[2]))] = found[1].lower()
    return entries


def _refuse_missing(manifest: str, unlisted: set[str], io: MountIO) -> None:
    """Raise DataError for a data file that the manifest names and that is not there: rows would be missing."""
    for path in sorted(unlisted):
        if io.stat(path) is None:
            raise DataError(
                f"{manifest} names {path}, which is not there: the data is incomplete, or a listing of the mount is out "
                "of date. Upload it, or take its line out of the manifest."
            )
