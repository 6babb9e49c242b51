"""The trainer's end of the helper process: start it, ask it, notice when it hangs or dies, let it go."""

from __future__ import annotations

import errno
import json
import logging
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from axo_flash import mount_worker
from axo_flash.mount_worker import Fault

LOG = logging.getLogger(__name__)
START_SECONDS = 60.0  # for Python to start, on a machine that is busy
WARN_SECONDS = 60.0
STORING_BYTES_PER_SECOND = 8 << 20  # a slow upload at close, which shows no progress, is not taken for a hang
LOOK_SECONDS = 0.5  # between looks whether to stop
PIPE_BYTES = 1 << 16


class NotStarted(Exception):
    """A helper that was killed, or had no time to come up, before it could be asked anything: another one may do better."""


class Helper:
    """One running mount_worker.py. `usable` turns False when it hangs or has died."""

    def __init__(self) -> None:
        # -I -S: nothing of the user's environment, and only the standard library. The cwd may lie on the mount, and a
        # Ctrl-C of the terminal is for the trainer alone, which may still have a checkpoint to store.
        command = [sys.executable, "-I", "-S", mount_worker.__file__]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, cwd="/", start_new_session=True
        )
        self.usable = True
        self._cancelled = False
        self._buffer = b""
        self._selector = selectors.DefaultSelector()
        self._selector.register(self.process.stdout, selectors.EVENT_READ)
        if self._line(START_SECONDS) is None:
            code = self.process.poll()
            self.kill()
            what = f"the helper process for mounted paths did not start ({' '.join(command)}, exit code {code})"
            if code is None or code < 0:
                raise NotStarted(what)
            raise RuntimeError(f"{what}; run that command to see why")

    def call(
        self,
        operation: str,
        arguments: dict[str, Any],
        heard: Callable[[dict[str, Any]], None],
        stall_timeout: float,
        path: str,
    ) -> Any:
        """The result of an operation; `heard` gets its messages. Raises Fault, ETIMEDOUT if there is no progress."""
        request = memoryview(json.dumps({"operation": operation, **arguments}).encode() + b"\n")
        try:
            while request:  # a signal may cut a write to a pipe short
                request = request[self.process.stdin.write(request) :]
        except BrokenPipeError:
            self._died(path, None)
        offset, allowed = None, stall_timeout
        while True:
            message = self._line(allowed, f"{operation} of {path}")
            if self._cancelled:
                self.usable = False
                raise Fault(errno.ECANCELED, "it was told to stop", path, offset)
            if message is None and self.process.poll() is not None:
                self._died(path, offset)
            if message is None:
                self.usable = False
                raise Fault(errno.ETIMEDOUT, f"no progress for {allowed:.3g} s", path, offset)
            if "result" in message:
                return message["result"]
            if "fault" in message:
                raise Fault(*message["fault"])
            if "bug" in message:
                raise RuntimeError(f"a mistake in mount_worker.py:\n{message['bug']}")
            offset = message.get("at", offset)
            allowed = stall_timeout + message.get("storing", 0) / STORING_BYTES_PER_SECOND
            heard(message)

    def cancel(self) -> None:
        """From another thread: the call that runs raises Fault (ECANCELED) within half a second, hanging or not."""
        self._cancelled = True

    def has_ended(self) -> bool:
        """Whether the process is gone, and its files are closed with it."""
        return self.process.poll() is not None

    def kill(self) -> None:
        """Have it end as soon as the call that it hangs in lets it: it runs no instruction of its own any more."""
        self.usable = False
        self.process.kill()
        self._selector.close()
        for pipe in (self.process.stdin, self.process.stdout):
            pipe.close()

    def close(self) -> None:
        """End it in peace, by the end of its stdin."""
        self.process.stdin.close()
        try:
            self.process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            LOG.warning("the helper process %d for mounted paths does not end: left behind", self.process.pid)
        self.kill()

    def _died(self, path: str, offset: int | None) -> None:
        self.usable = False
        raise Fault(errno.EPIPE, f"the helper process ended with {self.process.wait()}", path, offset)

    def _line(self, seconds: float, doing: str = "") -> dict[str, Any] | None:
        """The next message; None if there is none for so long, if the process has ended, or to stop."""
        started, warned = time.monotonic(), False
        while b"\n" not in self._buffer:
            if self._cancelled:
                return None
            waited = time.monotonic() - started
            if waited >= seconds:
                return None
            if waited >= WARN_SECONDS and not warned:
                LOG.warning("%s: no progress for %.0f s; waiting up to %.0f s", doing, waited, seconds)
                warned = True
            if not self._selector.select(min(seconds - waited, LOOK_SECONDS)):
                continue
            chunk = os.read(self.process.stdout.fileno(), PIPE_BYTES)
            if not chunk:
                self.process.wait()  # closed its end: it is dead, or about to be
                return None
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)
