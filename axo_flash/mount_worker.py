"""The helper process that touches mounted paths in the trainer's place: `mount_io` starts this file as a program.

It reads one JSON request a line on stdin and answers on stdout with lines of progress and one of result or fault. It
needs the standard library alone and does nothing by itself: no retries, no waiting. A call that hangs hangs here, where
the trainer can leave it behind. It ends when its stdin does.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import fnmatch
import hashlib
import json
import os
import re
import stat
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

# A read that is in flight and the block that is hashed and written fit in a core's cache together: with 4 MiB the copy
# takes half as long again and more (scripts/bench/NOTES.md). No FUSE request is larger than 1 MiB.
BLOCK_BYTES = 512 << 10
REPORT_SECONDS = 0.05  # between two reports of how far a copy is: each wakes the parent
# What some file systems answer to fsync and fadvise, which they do not have. Whether data is stored, close() decides.
NOT_OFFERED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)

# gets {"at": bytes} as work goes on, with "storing": bytes before a long silence; {"free": true} when a name was free
Report = Callable[[dict[str, Any]], None]


class Fault(Exception):
    """A system call that failed, or bytes that cannot be right: errno, its text, the path and the offset if known."""

    def __init__(self, code: int, text: str, path: str, offset: int | None = None):
        at = "" if offset is None else f" at byte {offset:,}"
        super().__init__(f"{errno.errorcode.get(code, code)}, {text}{at}")
        self.code, self.text, self.path, self.offset = code, text, path, offset


@contextlib.contextmanager
def naming(path: str, offset: int | None = None) -> Iterator[None]:
    """An OSError of the block becomes a Fault at `path`: os.read and os.close do not say which file they were at."""
    try:
        yield
    except OSError as error:
        raise Fault(error.errno or errno.EIO, error.strerror or str(error), path, offset) from error


# ----------------------------------------------------------------------------------------------------- looking around
def stat_path(report: Report, path: str, listed: bool = False) -> list | None:
    """[size, mtime_ns, is_dir], or None if there is nothing: os.path.exists would say so of a dead mount too.

    `listed`: a listing names it, and its absence is a fault.
    """
    with naming(path):
        try:
            found = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            if listed:
                raise
            return None
    return [found.st_size, found.st_mtime_ns, stat.S_ISDIR(found.st_mode)]


def listdir(report: Report, path: str) -> list[str]:
    with naming(path):
        return sorted(os.listdir(path))


def walk(report: Report, path: str) -> list[str]:
    """Every file below `path`, hidden names and names with a leading `_` left out: one scandir a folder, no stat."""
    files, folders = [], [path]
    while folders:
        folder = folders.pop()
        for name, is_dir, is_link in _entries(folder):
            if name.startswith((".", "_")):
                continue
            if not is_dir:
                files.append(os.path.join(folder, name))
            elif not is_link:  # a link to a folder could lead in a circle
                folders.append(os.path.join(folder, name))
        report({"at": len(files)})
    return sorted(files)


def glob_path(report: Report, pattern: str) -> list[tuple[str, bool]]:
    """(path, is_dir) of all that matches, as glob.glob(recursive=True), which takes every error for "no match"."""
    found = [("/" if pattern.startswith("/") else "", True)]
    for part in (part for part in pattern.split("/") if part):
        if part == "**":
            found = [below for place, is_dir in found if is_dir for below in _all_below(report, place)]
        elif re.search(r"[*?[]", part):
            matches = re.compile(fnmatch.translate(part)).match
            found = [
                (os.path.join(place, name), is_dir)
                for place, holds in found if holds
                for name, is_dir, _ in _entries(place or ".")
                if matches(name) and (part.startswith(".") or not name.startswith("."))
            ]  # fmt: skip
        else:
            places = [os.path.join(place, part) for place, is_dir in found if is_dir]
            found = [(place, info[2]) for place in places if (info := stat_path(report, place)) is not None]
        report({"at": len(found)})
    return sorted(set(found))


def _all_below(report: Report, place: str) -> Iterator[tuple[str, bool]]:
    yield place, True
    for name, is_dir, is_link in _entries(place or "."):
        if not name.startswith("."):
            report({"at": 0})
            below = os.path.join(place, name)
            if is_dir and not is_link:
                yield from _all_below(report, below)
            else:
                yield below, is_dir


def _entries(folder: str) -> list[tuple[str, bool, bool]]:
    """(name, is_dir, is_symlink) of a folder, sorted."""
    found = []
    with naming(folder), os.scandir(folder) as entries:
        for entry in entries:
            is_dir, is_link = entry.is_dir(), entry.is_symlink()
            # where a listing does not tell types, is_dir looks, and takes what a cache does not know yet for no folder
            if not (is_dir or is_link or entry.is_file()):
                try:
                    os.lstat(entry.path)
                except FileNotFoundError:
                    raise Fault(errno.ESTALE, "it is listed, and is not there", entry.path) from None
            found.append((entry.name, is_dir, is_link))
    return sorted(found)


def usage(report: Report, path: str) -> list[int]:
    """[total, free] bytes as the file system gives them; s3fs and rclone make them up."""
    with naming(path):
        found = os.statvfs(path)
    return [found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize]


# ------------------------------------------------------------------------------------------------------------- reading
def copy_in(report: Report, src: str, dst: str, durable: bool) -> list:
    """Copy `src` to the local `dst` in one pass; [size, mtime_ns, sha256]. `dst` appears whole or not at all.

    `durable`: it is on the disk before its name is there, so that a power cut leaves it whole too.
    """
    part = f"{dst}.part"
    with naming(part), contextlib.suppress(FileNotFoundError):
        os.unlink(part)  # a new file, not the old one cut: a helper that was left behind may still have that open
    with _opened(src, os.O_RDONLY) as source, _opened(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600) as target:
        with naming(src):
            _if_offered(os.posix_fadvise, source, 0, 0, os.POSIX_FADV_SEQUENTIAL)  # as cp: reads ahead twice as far
            before = os.fstat(source)
        if stat.S_ISDIR(before.st_mode):
            raise Fault(errno.EISDIR, os.strerror(errno.EISDIR), src)
        digest, offset = hashlib.sha256(), 0
        for block in _blocks(source, src):
            _write(target, block, part, offset)
            digest.update(block)
            offset += len(block)
            report({"at": offset})
        with naming(part):
            if durable:
                os.fsync(target)
    with naming(src):
        after = os.stat(src)
    if offset != before.st_size:
        raise Fault(errno.EIO, f"read {offset} bytes of a file that declared {before.st_size}", src, offset)
    if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise Fault(errno.ESTALE, f"it changed while it was read, from {before.st_size} to {after.st_size} bytes", src)
    with naming(dst):
        os.replace(part, dst)
    return [offset, before.st_mtime_ns, digest.hexdigest()]


def read_bytes(report: Report, path: str, limit: int) -> str:
    """The content of a small file, in base64; EFBIG if it is larger than `limit`."""
    with _opened(path, os.O_RDONLY) as source:
        with naming(path):
            size = os.fstat(source).st_size
        if size > limit:
            raise Fault(errno.EFBIG, f"it has {size} bytes, and at most {limit} are wanted", path)
        content = b"".join(bytes(block) for block in _blocks(source, path))
    if len(content) != size:
        raise Fault(errno.EIO, f"read {len(content)} bytes of a file that declared {size}", path, len(content))
    return base64.b64encode(content).decode()


def _blocks(descriptor: int, path: str) -> Iterator[memoryview]:
    """The file in blocks at explicit offsets; the next one is read while the last is hashed and written.

    A block is good until the next one is asked for: two buffers take turns, as memory that is new for every block costs
    more than the hash.
    """

    def read(offset: int, buffer: memoryview) -> int:
        with naming(path, offset):
            return os.preadv(descriptor, [buffer], offset)

    buffer, other = (memoryview(bytearray(BLOCK_BYTES)) for _ in range(2))
    with ThreadPoolExecutor(1) as ahead:
        offset, pending = 0, ahead.submit(read, 0, buffer)
        while size := pending.result():
            offset += size
            pending = ahead.submit(read, offset, other)
            yield buffer[:size]
            buffer, other = other, buffer


# ------------------------------------------------------------------------------------------------------------- writing
def copy_out(report: Report, src: str, dst: str, ours: bool, device: str | None = None) -> list:
    """Copy the local `src` to the new name `dst`; [size, mtime_ns, sha256], each as read back.

    `ours`: the name was free at an earlier try, so what lies there is that try's remains. `device` ("major:minor") is
    that of the mount: nothing is made on another one, which is the directory underneath if the mount has just gone.
    """
    with _opened(src, os.O_RDONLY) as source:
        return _write_verified(report, dst, _blocks(source, src), ours, device)


def write_new(report: Report, path: str, content: str, ours: bool, device: str | None = None) -> list:
    """The same for the few bytes in `content` (base64)."""
    return _write_verified(report, path, [base64.b64decode(content)], ours, device)


def _write_verified(
    report: Report, dst: str, blocks: Iterable[bytes | memoryview], ours: bool, device: str | None
) -> list:
    _claim(report, dst, ours)
    digest, offset = hashlib.sha256(), 0
    # 0o644: the project's other members are to read it, and chmod is no matter of course on object stores
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with _folder(os.path.dirname(dst), device) as folder, _opened(dst, flags, 0o644, folder) as target:
        for block in blocks:
            _write(target, block, dst, offset)
            digest.update(block)
            offset += len(block)
            report({"at": offset})
        report({"at": offset, "storing": offset})  # fsync or close may upload it all, and say nothing meanwhile
        with naming(dst, offset):
            _if_offered(os.fsync, target)
    report({"at": offset})
    stored, mtime_ns = _read_back(report, dst)
    if stored != (offset, digest.hexdigest()):
        raise Fault(
            errno.EIO, f"read back {stored[0]} bytes with sha256 {stored[1][:12]}..., written were {offset} bytes "
            f"with sha256 {digest.hexdigest()[:12]}...", dst,
        )  # fmt: skip
    return [offset, mtime_ns, digest.hexdigest()]


def _claim(report: Report, dst: str, ours: bool) -> None:
    """See that nothing is at `dst`, and say so; if the name is ours, remove what an earlier try left."""
    with naming(dst):
        if ours:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(dst)
            return
        try:
            os.lstat(dst)
        except FileNotFoundError:
            report({"free": True})
            return
    raise Fault(errno.EEXIST, os.strerror(errno.EEXIST), dst)


def _read_back(report: Report, path: str) -> tuple[tuple[int, str], int]:
    """((size, sha256), mtime_ns) of what a fresh open finds."""
    digest, size = hashlib.sha256(), 0
    with _opened(path, os.O_RDONLY) as descriptor:
        with naming(path):
            _if_offered(os.posix_fadvise, descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # ask the store, not the page cache
            found = os.fstat(descriptor)
        for block in _blocks(descriptor, path):
            digest.update(block)
            size += len(block)
            report({"at": size})
    if found.st_size != size:
        raise Fault(errno.EIO, f"read back {size} bytes of a file that declares {found.st_size}", path, size)
    return (size, digest.hexdigest()), found.st_mtime_ns


def makedirs(report: Report, path: str, device: str | None = None) -> None:
    """The directory with its parents, as far as they are not there. os.makedirs trusts isdir, blind to errors.

    `device`: as for copy_out. A directory left underneath would be hidden by the next mount, or keep it from coming.
    """
    missing = []
    while (info := stat_path(report, path)) is None:
        missing.append(path)
        path = os.path.dirname(path)
    if not info[2]:
        raise Fault(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
    for made in reversed(missing):
        with _folder(os.path.dirname(made), device) as folder, naming(made), contextlib.suppress(FileExistsError):
            os.mkdir(os.path.basename(made), 0o755, dir_fd=folder)


@contextlib.contextmanager
def _folder(path: str, device: str | None) -> Iterator[int]:
    """A descriptor of a directory that lies on `device`: what is made through it lies there too, or nowhere."""
    with _opened(path, os.O_PATH | os.O_DIRECTORY) as folder:  # O_PATH asks the daemon for nothing
        with naming(path):
            found = os.fstat(folder).st_dev
        if device not in (None, f"{os.major(found)}:{os.minor(found)}"):
            raise Fault(errno.ENOTCONN, "the mount has gone: this is the directory underneath", path)
        yield folder


def remove_tree(report: Report, path: str) -> None:
    """`path` with everything in it; what is not there any more is as wanted. Links are removed, not followed."""
    with naming(path):
        try:
            is_dir = stat.S_ISDIR(os.lstat(path).st_mode)
        except FileNotFoundError:
            return
        if is_dir:
            for name in os.listdir(path):
                remove_tree(report, os.path.join(path, name))
        with contextlib.suppress(FileNotFoundError):
            (os.rmdir if is_dir else os.unlink)(path)
    report({"at": 1})


@contextlib.contextmanager
def _opened(path: str, flags: int, mode: int = 0, folder: int | None = None) -> Iterator[int]:
    """A descriptor whose close() is checked: many stores upload there, and its result alone says whether they could.

    `folder`: a descriptor of the directory to open it in; its name there is the last part of `path`.
    """
    with naming(path):
        name = path if folder is None else os.path.basename(path)
        descriptor = os.open(name, flags | os.O_CLOEXEC, mode, dir_fd=folder)
    try:
        yield descriptor
    except BaseException:
        with contextlib.suppress(OSError):  # what failed first is the cause, and is on its way up
            os.close(descriptor)
        raise
    with naming(path):
        os.close(descriptor)


def _write(descriptor: int, block: bytes | memoryview, path: str, offset: int) -> None:
    view = memoryview(block)
    with naming(path, offset):
        while view:
            view = view[os.write(descriptor, view) :]


def _if_offered(call: Callable, *arguments: Any) -> None:
    try:
        call(*arguments)
    except OSError as error:
        if error.errno not in NOT_OFFERED:
            raise


# ------------------------------------------------------------------------------------------------------------- serving
OPERATIONS: dict[str, Callable] = {
    "stat": stat_path, "listdir": listdir, "walk": walk, "glob": glob_path, "usage": usage,
    "copy_in": copy_in, "read_bytes": read_bytes,
    "copy_out": copy_out, "write_new": write_new, "makedirs": makedirs, "remove_tree": remove_tree,
}  # fmt: skip


def serve() -> None:
    """Answer requests until stdin ends. A fault is an answer too; so is the traceback of a mistake in this file."""

    def say(message: dict[str, Any]) -> None:
        line = memoryview(json.dumps(message).encode() + b"\n")
        while line:
            line = line[os.write(1, line) :]

    said = 0.0

    def report(message: dict[str, Any]) -> None:
        nonlocal said
        if message.keys() != {"at"} or time.monotonic() - said >= REPORT_SECONDS:
            said = time.monotonic()
            say(message)

    os.umask(0o022)
    say({"ready": True})
    for line in sys.stdin.buffer:
        request = json.loads(line)
        try:
            say({"result": OPERATIONS[request.pop("operation")](report, **request)})
        except Fault as fault:
            say({"fault": [fault.code, fault.text, fault.path, fault.offset]})
        except Exception:  # handed to the parent, which raises it
            say({"bug": traceback.format_exc()})


if __name__ == "__main__":
    try:
        serve()
    except BrokenPipeError:  # the parent is gone, and nobody is left to tell
        os._exit(1)
