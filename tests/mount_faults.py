"""The worker of mount_io in this process, and system calls that fail by number."""

import errno
import os

from axo_flash import mount_worker


class FaultyOS:
    """`os` for the worker: the n-th call that has to do with the mount fails, once or from then on."""

    CALLS = ("open", "preadv", "write", "fstat", "stat", "lstat", "close", "fsync", "unlink", "rmdir", "mkdir", "listdir",
             "scandir", "statvfs")  # fmt: skip

    def __init__(self, mount, n=0, code=errno.EIO, forever=False):
        self.mount, self.n, self.code, self.forever = str(mount), n, code, forever
        self.calls, self.faults, self.descriptors = [], 0, set()

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in self.CALLS:
            return real

        def call(first, *rest, **keys):
            folder = keys.get("dir_fd")
            if not (first in self.descriptors or folder in self.descriptors or str(first).startswith(self.mount)):
                return real(first, *rest, **keys)
            self.calls.append(name)
            if name == "close":
                self.descriptors.discard(first)
            if self.n and (len(self.calls) == self.n or (self.forever and len(self.calls) > self.n)):
                self.faults += 1
                if name == "close":  # Linux closes the descriptor, whatever close() answers
                    real(first)
                raise OSError(self.code, os.strerror(self.code))
            result = real(first, *rest, **keys)
            if name == "open":
                self.descriptors.add(result)
            return result

        return call


class InlineHelper:
    """The worker's operations in this process."""

    usable = True

    def call(self, operation, arguments, heard, stall_timeout, path):
        return mount_worker.OPERATIONS[operation](heard, **arguments)

    def close(self):
        """Nothing to end."""
