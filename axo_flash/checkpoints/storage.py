"""What checkpoints need of a file system (`Storage`), and the plain implementation on one that can be trusted."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from axo_flash.errors import UserError
from axo_flash.mount_worker import BLOCK_BYTES

FAULTS = (OSError, UserError)  # how a Storage fails: errno as it came, or after its own retries with what to do
Progress = Callable[[int], None]


class FileInfo(Protocol):
    """What `Storage.stat` says of a path."""

    size: int
    mtime_ns: int
    is_dir: bool


class CopiedFile(Protocol):
    """What a verified copy was: the size and hash of the bytes that arrived."""

    size: int
    sha256: str


class Storage(Protocol):
    """Blocking file operations on the output path. Each succeeds as a whole or raises one of FAULTS.

    Nothing here renames, appends, truncates or writes over an existing name: a mounted object store does none of that
    safely. An implementation may retry inside.
    """

    def stat(self, path: str) -> FileInfo | None:
        """What is at `path`, or None if it is known that nothing is."""
        ...

    def listdir(self, path: str) -> list[str]:
        """Names in a directory."""
        ...

    def copy_in(self, src: str, dst: str, progress: Progress | None = None) -> CopiedFile:
        """Copy a file to local disk."""
        ...

    def copy_out(self, src: str, dst: str, progress: Progress | None = None) -> CopiedFile:
        """Copy a local file to a name that does not exist, and read it back."""
        ...

    def read_bytes(self, path: str, limit: int) -> bytes:
        """The contents of a file of `limit` bytes at most."""
        ...

    def write_new(self, path: str, data: bytes) -> object:
        """Write a file that does not exist yet, and read it back."""
        ...

    def makedirs(self, path: str) -> None:
        """Make a directory and those above it, where missing."""
        ...

    def remove_tree(self, path: str) -> None:
        """Remove a file, or a directory with all below it; nothing there is fine."""
        ...


@dataclass(frozen=True)
class LocalInfo:
    """A FileInfo of a local path."""

    size: int
    mtime_ns: int
    is_dir: bool


@dataclass(frozen=True)
class LocalCopy:
    """A CopiedFile of a local path."""

    size: int
    mtime_ns: int
    sha256: str


class LocalStorage:
    """Storage on a file system of this machine, in this process, without retries."""

    def stat(self, path: str) -> LocalInfo | None:
        """What is at `path`, or None; any other fault than its absence is raised."""
        try:
            found = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return LocalInfo(found.st_size, found.st_mtime_ns, os.path.isdir(path))

    def listdir(self, path: str) -> list[str]:
        """Names in a directory, sorted."""
        return sorted(os.listdir(path))

    def copy_in(self, src: str, dst: str, progress: Progress | None = None) -> LocalCopy:
        """Copy a file to local disk; `dst` may exist."""
        with open(src, "rb") as source, open(dst, "wb") as target:
            return self._copy(source, target, dst, progress)

    def copy_out(self, src: str, dst: str, progress: Progress | None = None) -> LocalCopy:
        """Copy a local file to a name that does not exist, and read it back; OSError if it is not the same."""
        with open(src, "rb") as source, open(dst, "xb") as target:
            written = self._copy(source, target, dst, progress)
        arrived = sha256_of(dst)
        if arrived != written.sha256:
            raise OSError(f"{dst}: what is read back ({arrived[:12]}) is not what was written ({written.sha256[:12]})")
        return written

    def read_bytes(self, path: str, limit: int) -> bytes:
        """The contents of a file of `limit` bytes at most."""
        with open(path, "rb") as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise OSError(f"{path}: larger than {limit} bytes")
        return data

    def write_new(self, path: str, data: bytes) -> None:
        """Write a file that does not exist yet."""
        with open(path, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def makedirs(self, path: str) -> None:
        """Make a directory and those above it, where missing."""
        os.makedirs(path, exist_ok=True)

    def remove_tree(self, path: str) -> None:
        """Remove a file, or a directory with all below it; nothing there is fine."""
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            Path(path).unlink(missing_ok=True)

    @staticmethod
    def _copy(source, target, dst: str, progress: Progress | None) -> LocalCopy:
        digest, size = hashlib.sha256(), 0
        while block := source.read(BLOCK_BYTES):
            target.write(block)
            digest.update(block)
            size += len(block)
            if progress is not None:
                progress(size)
        target.flush()
        os.fsync(target.fileno())
        return LocalCopy(size, os.stat(dst).st_mtime_ns, digest.hexdigest())


def sha256_of(path: str | os.PathLike) -> str:
    """The sha256 of a local file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: str | os.PathLike) -> None:
    """fsync a local file or directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
