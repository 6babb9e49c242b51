"""One run at a time on an output directory: a lease that a second run sees, and that does not outlive its owner.

The lease is a row of small numbered files in `.lease`; the highest number rules. A heartbeat adds the next number and
removes the last, so nothing is ever written over. An owner on this machine (same boot, same process namespace) is dead
when its process is; one elsewhere when its number has not risen for `silence` seconds of our own clock: clocks of two
machines are never compared.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from axo_flash.checkpoints.resume import CheckpointError
from axo_flash.checkpoints.storage import FAULTS, Storage

FOLDER = ".lease"
READ_AGAIN = 3
HEARTBEAT, SILENCE = 20.0, 90.0  # seconds; the second is more than four of the first


@dataclass(frozen=True)
class Owner:
    """A process, so that another one can tell whether it lives."""

    host: str
    boot: str
    namespace: str
    pid: int
    started: str  # of the process, in clock ticks since the boot: a pid is used again, this is not
    time: str = ""

    @property
    def machine(self) -> tuple[str, str]:
        """Where pids mean the same: one boot of a kernel, and one process namespace (a container has its own)."""
        return self.boot, self.namespace

    def is_process_alive(self) -> bool:
        """For an owner on this machine."""
        return process_start(self.pid) == self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (last sign of life {self.time})"


def this_process() -> Owner:
    """The owner that this process is."""
    return Owner(
        host=socket.gethostname(),
        boot=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        namespace=os.readlink("/proc/self/ns/pid"),
        pid=os.getpid(),
        started=process_start(os.getpid()) or "",
        time=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    )


def process_start(pid: int) -> str | None:
    """When a process of this machine started, in ticks since the boot; None if there is none, or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields[19]


def _owner(content: bytes) -> Owner | None:
    """The owner in a lease file; None if it is not whole."""
    try:
        values = json.loads(content)
        stated = values.pop("sha256", None)  # earlier versions wrote none
        return Owner(**values) if stated in (None, _digest(values)) else None
    except (ValueError, TypeError, AttributeError):
        return None


def _digest(values: dict[str, str | int]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


class Lease:
    """The right to write to an output directory; `acquire`, then `release`. `lost` says that another run took it."""

    def __init__(
        self,
        root: str,
        storage: Storage,
        beat_storage: Storage | None = None,
        *,
        heartbeat: float = HEARTBEAT,
        silence: float = SILENCE,
        say: Callable[[str], None] = lambda text: None,
    ):
        self.root, self.folder, self.storage = root, os.path.join(root, FOLDER), storage
        self.heartbeat, self.silence, self.say = heartbeat, silence, say
        self.beat_storage = beat_storage or storage  # one that gives up soon: another heartbeat follows
        self.number: int | None = None
        self._tried: set[int] = set()  # numbers of heartbeats: one that failed may have left a file that says nothing
        self.lost: str | None = None
        self.last_fault: str | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the lease, after waiting `silence` seconds for an owner elsewhere that may be dead.

        Raises CheckpointError if another run lives there.
        """
        self.storage.makedirs(self.folder)
        newest = self._newest()
        if newest:
            self._await_death(newest, self._ruler())
        try:
            self._write(newest + 1)
        except FAULTS as error:
            if self._newest() > newest and not self._is_mine(newest + 1):
                raise self._refusal(self._read(newest + 1)) from error
            raise
        newest = max(self._newest(), newest + 1)  # a listing may not show yet what has just been written
        if not self._is_mine(newest):
            raise self._refusal(self._read(newest))
        self.number = newest
        self._remove_below(self.number)
        self.storage = self.beat_storage
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give it back; the files go."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=self.heartbeat)
        if self.number is not None and self.lost is None:
            self._remove_below(self.number + 1)
        self.number = None

    def require(self) -> None:
        """Raise CheckpointError if another run has taken the lease."""
        if self.lost:
            raise CheckpointError(self.lost)

    def _ruler(self) -> Owner | None:
        """The owner by the highest number that can be read: a torn one may be a heartbeat in the act."""
        owners = (self._read(number) for number in reversed(self._numbers()))
        return next((owner for owner in owners if owner is not None), None)

    def _await_death(self, number: int, owner: Owner | None) -> None:
        me = this_process()
        if owner is not None and owner.machine == me.machine:
            if owner.is_process_alive():
                raise self._refusal(owner)
            return
        self.say(
            f"{self.root} was in use by {owner or 'somebody'}: waiting {self.silence:.0f} s to see whether it is still alive"
        )
        end = time.monotonic() + self.silence
        while time.monotonic() < end:
            time.sleep(min(self.heartbeat / 4, max(0.01, end - time.monotonic())))
            if self._newest() > number:
                raise self._refusal(self._read(self._newest()) or owner)
            if self._newest() < number:
                return  # released

    def _refusal(self, owner: Owner | None) -> CheckpointError:
        return CheckpointError(
            f"output_dir {self.root} is in use by another run: {owner or 'unknown'}. Two runs would remove each other's "
            f"checkpoints. Wait for it, stop it, or set another output_dir."
        )

    def _numbers(self) -> list[int]:
        names = self.storage.listdir(self.folder)
        return sorted(int(name.removesuffix(".json")) for name in names if name.removesuffix(".json").isdecimal())

    def _newest(self) -> int:
        return max(self._numbers(), default=0)

    def _path(self, number: int) -> str:
        return os.path.join(self.folder, f"{number:08}.json")

    def _read(self, number: int) -> Owner | None:
        """Who wrote a number; None if it is torn (its writer died in the act) or gone."""
        for _ in range(READ_AGAIN):  # bytes that a mount turned on the way must not name an owner who never was
            if self.storage.stat(self._path(number)) is None:
                return None
            owner = _owner(self.storage.read_bytes(self._path(number), 1 << 16))
            if owner is not None:
                return owner
        return None

    def _write(self, number: int) -> None:
        values = asdict(this_process())
        self.storage.write_new(self._path(number), json.dumps(values | {"sha256": _digest(values)}).encode())

    def _is_mine(self, number: int) -> bool:
        owner, me = self._read(number), this_process()
        return owner is not None and (owner.machine, owner.pid, owner.started) == (me.machine, me.pid, me.started)

    def _remove_below(self, number: int) -> None:
        for old in self._numbers():
            if old < number:
                self.storage.remove_tree(self._path(old))

    def _beat(self) -> None:
        try:
            while not self._stop.wait(self.heartbeat):
                self.beat()
        except BaseException as error:  # without heartbeats another run will take the lease: this one must know
            self.lost = f"the lease on {self.root} is no longer renewed: {error}"
            raise

    def beat(self) -> None:
        """One sign of life. A fault is noted and tried again at the next one: the mount may be away for a while."""
        try:
            newest = self._newest()
            if newest > self.number and newest not in self._tried and not self._is_mine(newest):
                self.lost = str(self._refusal(self._read(newest)))
                self._stop.set()
                return
            number = max(newest, self.number) + 1
            self._tried.add(number)
            self._write(number)
            self.number = number
            self._remove_below(self.number)
            self.last_fault = None
        except FAULTS as error:
            self.last_fault = str(error)
