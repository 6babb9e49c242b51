"""All input and output on mounted paths: `MountIO`, blocking calls that outlive the faults of a mount that can pass.

No process of a training may hold a descriptor or a mapping on such a mount: a mapping dies with SIGBUS when the daemon
does, a hanging read cannot be killed, and a fork with a file open hangs with it. So one helper process does it all
(mount_worker.py), tells how far it is, and is left behind and replaced when it makes no progress. Faults that can pass
are tried again by opening anew, with growing random pauses; all others, and those that last, end in one `MountError`.
"""

from __future__ import annotations

import base64
import errno
import logging
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from axo_flash.errors import UserError
from axo_flash.mount_helper import Fault, Helper, NotStarted
from axo_flash.mounts import Mount, covers, find_mount

LOG = logging.getLogger(__name__)
TIMEOUT = 900.0  # longer than a daemon's restart
STALL_TIMEOUT = 330.0  # beyond the five minutes for which hopsfs-mount itself tries again before it answers
LEAST_PATIENCE = 30.0  # for the last try before `timeout` is up
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
PASSING = frozenset({
    errno.EIO, errno.ENOTCONN, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNABORTED, errno.ECONNRESET, errno.ECONNREFUSED,
    errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ENODEV, errno.EBADF, errno.EPIPE, errno.EHOSTDOWN,
    errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH,
})  # fmt: skip
ADVICE = {
    errno.EACCES: "Check the permissions of the path for this user.",
    errno.EPERM: "Check the permissions of the path for this user, and whether the mount offers what was tried.",
    errno.EROFS: "It is mounted read-only: mount it for writing, or name another path.",
    errno.ENOSPC: "It is full: make room there.",
    errno.EDQUOT: "The quota is used up: make room there, or have it raised.",
    errno.EISDIR: "It is a directory: name the files in it.",
    errno.ENOTDIR: "A part of the path is a file: correct the path.",
    errno.EEXIST: "Nothing on a mount is ever overwritten: remove it, or name another path.",
    errno.ENOENT: "It was removed, or its name is wrong.",
    errno.ECANCELED: "The run is ending: start it again to go on.",
    errno.ENOTCONN: "The daemon behind the mount has died or nothing is mounted: unmount what is left "
    "(`fusermount3 -uz {point}`) and mount it again.",
    errno.ETIMEDOUT: "The daemon or the store behind it hangs: look at its log, and restart it (`fusermount3 -uz "
    "{point}`, then mount again).",
}  # fmt: skip
OTHER_ADVICE = "Look at the file system's own log, and try again."


class FileInfo(NamedTuple):
    """What a path is: bytes, time of the last change, whether it is a directory."""

    size: int
    mtime_ns: int
    is_dir: bool


class CopiedFile(NamedTuple):
    """A file that was carried over, by what was really read of it; mtime_ns is that of the mounted side."""

    size: int
    mtime_ns: int
    sha256: str


class Usage(NamedTuple):
    """Bytes of a file system, as it says itself: s3fs and rclone make them up."""

    total: int
    free: int


class MountError(UserError):
    """A mounted path could not be used; the message says where, which fault, for how long it was tried, what to do.

    `code` is the errno, `path` says where and `offset` how far any try came, in bytes; `tries` and `seconds` say for how
    long it was tried; `passing` tells a fault that may still pass (the time was up) from one that cannot.
    """

    def __init__(self, operation: str, fault: Fault, furthest: int, tries: int, seconds: float, passing: bool):
        self.operation, self.code, self.path = operation, fault.code, fault.path
        self.offset = furthest if fault.offset is None else max(furthest, fault.offset)
        self.tries, self.seconds, self.passing = tries, seconds, passing
        mount = find_mount(fault.path)
        name = errno.errorcode.get(fault.code, f"errno {fault.code}")
        got = f", which got to byte {self.offset:,}," if self.offset else ""
        tried = f"{tries} {'try' if tries == 1 else 'tries'} in {seconds:.1f} s"
        why = "gave up after" if passing else "not tried again:"
        super().__init__(
            f"{operation} of {fault.path}{got} on {mount} failed: {name}, {fault.text} ({why} {tried}). {advice(fault)}"
        )


def advice(fault: Fault) -> str:
    """What a person can do about a fault."""
    return ADVICE.get(fault.code, OTHER_ADVICE).format(point=find_mount(fault.path).mount_point)


# not the generator of the `random` module: a training that draws from that must not depend on what a mount does
_RANDOM = random.Random()


def _pause(tries: int) -> float:
    """Seconds to wait after so many tries: anything up to a bound that doubles with each, so that runs do not keep step."""
    return _RANDOM.uniform(0, min(FIRST_PAUSE * 2.0 ** (min(tries, 32) - 1), LONGEST_PAUSE))


@dataclass
class MountStats:
    """What the calls of one MountIO came to: bytes each way, seconds in calls, tries again, helpers left behind."""

    bytes_in: int = 0
    bytes_out: int = 0
    seconds: float = 0.0
    retries: int = 0
    stalls: int = 0


@dataclass
class _Try:
    """What must outlive a single try of an operation."""

    path: str  # on the mount
    writes: bool
    ours: bool = False  # a name that was free when we came: what lies there now is of an earlier try
    local: str | None = None  # the other end of a copy
    retry_missing: bool = False
    progress: Callable[[int], None] | None = None
    number: int = 0
    started: float = field(default_factory=time.monotonic)
    furthest: int = 0
    advanced: float = field(default_factory=time.monotonic)  # when a try last got further than all before it

    def passes(self, error: BaseException) -> bool:
        """Whether it is a fault that can pass; one of the local disk is none."""
        if not isinstance(error, Fault) or (self.local and error.path in (self.local, f"{self.local}.part")):
            return False
        return error.code in PASSING or (error.code == errno.ENOENT and self.retry_missing)

    def heard(self, message: dict[str, Any]) -> None:
        """Take note of what the helper says while it works."""
        self.ours = self.ours or "free" in message
        if message.get("at", 0) > self.furthest:
            self.furthest, self.advanced = message["at"], time.monotonic()
        if self.progress is not None and "at" in message:
            self.progress(message["at"])


class MountIO:
    """Blocking file operations on mounted paths, done by a helper process. A context manager.

    Calls from several threads take turns: what must not wait for a long copy opens a MountIO of its own. The helper
    starts with the first call. Every operation raises MountError.

    Args:
        timeout: seconds for which faults that can pass are tried again; they count from the moment when a try last got
            further than all before it, so that a long copy has them all after a fault near its end.
        stall_timeout: seconds without progress after which the helper is left behind and replaced.
        start_helper: makes a helper; tests put their own here.
    """

    def __init__(
        self,
        timeout: float = TIMEOUT,
        stall_timeout: float = STALL_TIMEOUT,
        start_helper: Callable[[], Any] = Helper,
    ):
        self.timeout, self.stall_timeout = timeout, stall_timeout
        self.stats = MountStats()
        self._start_helper, self._helper = start_helper, None
        self._left_behind: list[tuple[Any, str | None]] = []  # (helper, the path that it may still write to)
        self._mount_points: set[str] = set()
        self._lock = threading.RLock()
        self._stopped = threading.Event()

    def __enter__(self) -> MountIO:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the helper. One that hangs is not waited for."""
        with self._lock:
            if self._helper is not None:
                self._helper.close()
                self._helper = None

    def stop(self) -> None:
        """From any thread: the call that runs, and every later one, raises MountError (ECANCELED) within a second.

        For a process that has to leave now. What was being written is incomplete then.
        """
        self._stopped.set()
        helper = self._helper
        if helper is not None:
            helper.cancel()

    def expect_mount(self, mount_point: str) -> None:
        """From now on a path below `mount_point` is only touched while something is mounted there."""
        self._mount_points.add(os.path.abspath(mount_point))

    # ----------------------------------------------------------------------------------------------------- operations
    def stat(self, path: str, listed: bool = False) -> FileInfo | None:
        """What is at `path`; None if it is known that there is nothing (a mount that is dead raises).

        `listed`: a listing names the path, so that its absence may be a fault that passes; None is never the answer.
        """
        found = self._run("stat", _Try(os.fspath(path), writes=False, retry_missing=listed), listed=listed)
        return None if found is None else FileInfo(*found)

    def listdir(self, path: str) -> list[str]:
        """The names in a directory, sorted."""
        return self._run("listdir", path)

    def walk(self, path: str) -> list[str]:
        """Every file below a directory, sorted; names with a leading `.` or `_` are left out."""
        return self._run("walk", path)

    def glob(self, pattern: str) -> list[tuple[str, bool]]:
        """(path, is_dir) of all that matches, sorted, `**` included; a folder that cannot be read is an error."""
        return [(path, is_dir) for path, is_dir in self._run("glob", pattern, name="pattern")]

    def copy_in(
        self,
        src_on_mount: str,
        local_dst: str,
        progress: Callable[[int], None] | None = None,
        listed: bool = False,
        durable: bool = True,
    ) -> CopiedFile:
        """Copy a file to local disk in one sequential pass, and again from the start if it changed meanwhile.

        `local_dst` appears whole or not at all. `progress` gets the bytes that are there, now and then and at the
        end; after a fault it starts again.
        `listed`: a listing names the file, so that its absence may be a fault that passes. `durable`: flushed to the
        disk (fsync); needless for a copy that this process alone will read.
        """
        local = os.path.abspath(local_dst)
        state = _Try(os.fspath(src_on_mount), writes=False, local=local, retry_missing=listed, progress=progress)
        copied = CopiedFile(*self._run("copy_in", state, name="src", dst=local, durable=durable))
        self.stats.bytes_in += copied.size
        if progress is not None:
            progress(copied.size)
        return copied

    def copy_out(self, local_src: str, dst_on_mount: str, progress: Callable[[int], None] | None = None) -> CopiedFile:
        """Copy a local file to a name that does not exist, and read it back: size and sha256 are those found there.

        A name that is taken is an error at once. On an error something incomplete may lie there: never use the name
        again. `progress` gets bytes written, then bytes read back.
        """
        local = os.path.abspath(local_src)
        state = _Try(os.fspath(dst_on_mount), writes=True, local=local, progress=progress)
        copied = CopiedFile(*self._run("copy_out", state, name="dst", src=local))
        self.stats.bytes_out += copied.size
        return copied

    def read_bytes(self, path: str, limit: int = 16 << 20) -> bytes:
        """The content of a small file; an error if it has more than `limit` bytes."""
        return base64.b64decode(self._run("read_bytes", path, limit=limit))

    def write_new(self, path: str, data: bytes) -> CopiedFile:
        """`copy_out` for a few bytes."""
        state = _Try(os.fspath(path), writes=True)
        return CopiedFile(*self._run("write_new", state, content=base64.b64encode(data).decode()))

    def makedirs(self, path: str) -> None:
        """Make a directory with its parents; that it exists already is fine."""
        self._run("makedirs", _Try(os.fspath(path), writes=True))

    def remove_tree(self, path: str) -> None:
        """Remove a file, or a directory with all in it; that it is gone already is fine."""
        self._run("remove_tree", _Try(os.fspath(path), writes=True))

    def usage(self, path: str) -> Usage:
        """The size and the free space of the file system, by its own account."""
        return Usage(*self._run("usage", path))

    # ------------------------------------------------------------------------------------------------------ the tries
    def _run(self, operation: str, target: str | _Try, name: str = "path", **arguments: Any) -> Any:
        """One operation with its retries; `name` is what the worker calls the path on the mount."""
        import tenacity

        state = target if isinstance(target, _Try) else _Try(os.fspath(target), writes=False)
        state.path = os.path.abspath(state.path)
        arguments[name] = state.path

        def pause_over_deadline(retry: tenacity.RetryCallState) -> bool:
            return time.monotonic() + retry.upcoming_sleep - state.advanced >= self.timeout

        def before_pause(retry: tenacity.RetryCallState) -> None:
            self.stats.retries += 1
            fault, pause = retry.outcome.exception(), retry.next_action.sleep
            LOG.warning(
                "%s: try %d of %s failed, %s; again in %.1f s", state.path, state.number, operation, fault, pause
            )

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(state.passes),
            wait=lambda retry: _pause(retry.attempt_number),
            stop=pause_over_deadline,
            before_sleep=before_pause,
            sleep=self._stopped.wait,
            reraise=True,
        )
        with self._lock:
            state.started = state.advanced = time.monotonic()
            try:
                return retrying(self._try, operation, state, arguments)
            except Fault as fault:
                seconds = time.monotonic() - state.started
                raise MountError(
                    operation, fault, state.furthest, state.number, seconds, state.passes(fault)
                ) from fault
            finally:
                self.stats.seconds += time.monotonic() - state.started

    def _try(self, operation: str, state: _Try, arguments: dict[str, Any]) -> Any:
        """One try; the mount must be there before it, and be the same one after it."""
        state.number += 1
        mount = self._mounted(state.path)
        if state.writes:
            self._refuse_beside_a_late_writer(operation, state.path)
        if operation in ("copy_out", "write_new"):
            arguments = {**arguments, "ours": state.ours}
        if operation in ("copy_out", "write_new", "makedirs") and mount.is_remote:
            arguments = {**arguments, "device": mount.device}
        try:
            result = self._ask(operation, state, arguments)
        except Fault as fault:
            if fault.path not in (state.local, f"{state.local}.part") and fault.code != errno.ECANCELED:
                self._require_same_mount(state.path, mount)  # what the directory underneath answered says nothing
            raise
        self._require_same_mount(state.path, mount)
        return result

    @staticmethod
    def _require_same_mount(path: str, before: Mount) -> None:
        after = find_mount(path)
        if after.identity != before.identity:
            raise Fault(errno.ENOTCONN, f"the mount went away meanwhile; now there is {after}", path)

    def _mounted(self, path: str) -> Mount:
        """The mount below `path`. Without its mount it would be a path of the local disk underneath."""
        mount = find_mount(path)
        for point in self._mount_points:
            if covers(point, path) and not covers(point, mount.mount_point):
                raise Fault(errno.ENOTCONN, f"nothing is mounted at {point} now", path)
        if mount.is_remote:
            self._mount_points.add(mount.mount_point)
        return mount

    def _refuse_beside_a_late_writer(self, operation: str, path: str) -> None:
        """A helper that was left behind in a write may yet finish it, over what a new try has stored in the place.

        What lies above its place is free, but for removing it: one file that hangs does not close a whole directory.
        """
        self._left_behind = [(helper, place) for helper, place in self._left_behind if not helper.has_ended()]
        late = [place for _, place in self._left_behind if place is not None]
        if any(covers(place, path) or (operation == "remove_tree" and covers(path, place)) for place in late):
            raise Fault(errno.ETIMEDOUT, "the write of an earlier try still hangs there", path)

    def _ask(self, operation: str, state: _Try, arguments: dict[str, Any]) -> Any:
        """Have the helper do it; leave the helper behind if it hangs, or if we are interrupted meanwhile."""
        if self._helper is None:
            try:
                self._helper = self._start_helper()
            except NotStarted as error:
                raise Fault(errno.EPIPE, str(error), state.path) from error
        if self._stopped.is_set():  # looked at with the helper in its place: `stop` sees either the one or the other
            raise Fault(errno.ECANCELED, "it was told to stop", state.path)
        left = self.timeout - (time.monotonic() - state.advanced)
        patience = min(self.stall_timeout, max(left, LEAST_PATIENCE))
        try:
            return self._helper.call(operation, arguments, state.heard, patience, state.path)
        except Fault as fault:
            if self._helper.usable:
                raise
            self._leave_behind(state)
            self.stats.stalls += fault.code == errno.ETIMEDOUT
            raise
        except BaseException:  # the answer to this request must not be taken for that to the next
            self._leave_behind(state)
            raise

    def _leave_behind(self, state: _Try) -> None:
        helper, self._helper = self._helper, None
        helper.kill()
        self._left_behind.append((helper, state.path if state.writes else None))
