"""A small FUSE file system that passes everything through to a directory and fails as its rules say.

    python fault_fs.py BACKING MOUNT_POINT RULES.json LOG

RULES.json holds a list of rules and is read again when it changes:
{"op": "read", "action": "errno", "errno": "EIO", "skip": 1, "count": 1, "path": "*.jsonl"}. Actions: errno; hang (until
the rule is gone); short (half of the bytes of a read); flip (one bit of a read); half_size (getattr says half of the
size); lost (a write that stores nothing and says it did); crash (the daemon ends); note (nothing). Every call that a
rule fires at is one line in LOG.
It behaves as hopsfs-mount in what matters here: direct_io, no links, and fsync that does nothing.
"""

import errno
import fnmatch
import json
import os
import sys
import threading
import time

import mfusepy


class Rules:
    """The rules with their counts, exact under a lock."""

    def __init__(self, path, log):
        self.path, self.log, self.guard = path, log, threading.Lock()
        self.stamp, self.rules, self.seen = None, [], {}

    def read(self):
        found = os.stat(self.path)
        stamp = (found.st_mtime_ns, found.st_ino)
        if stamp != self.stamp:
            with open(self.path) as file:
                self.rules, self.seen, self.stamp = json.load(file), {}, stamp

    def due(self, op, path):
        """The rule that fires at this call, if any."""
        with self.guard:
            self.read()
            for index, rule in enumerate(self.rules):
                if rule["op"] == op and fnmatch.fnmatch(path, rule.get("path", "*")):
                    self.seen[index] = number = self.seen.get(index, 0) + 1
                    skip = rule.get("skip", 0)
                    if skip < number <= skip + rule.get("count", 1 << 60):
                        with open(self.log, "a") as log:
                            log.write(f"{op} {path} {rule['action']} {rule.get('errno', '')}\n")
                        return rule
        return {"action": None}

    def stands(self, rule):
        with self.guard:
            self.read()
            return rule in self.rules


class FaultFS(mfusepy.Operations):
    """Every call asks the rules first."""

    use_ns = True

    def __init__(self, root, rules):
        self.root, self.rules = root, rules

    def meet(self, op, path):
        rule = self.rules.due(op, path)
        if rule["action"] == "errno":
            raise mfusepy.FuseOSError(getattr(errno, rule["errno"]))
        if rule["action"] == "crash":
            os._exit(9)
        while rule["action"] == "hang" and self.rules.stands(rule):
            time.sleep(0.02)
        return rule["action"]

    def getattr(self, path, fh=None):
        action = self.meet("getattr", path)
        found = os.lstat(self.root + path)
        result = {key: getattr(found, key) for key in ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size")}
        result |= {"st_mtime": found.st_mtime_ns, "st_ctime": found.st_ctime_ns, "st_atime": found.st_atime_ns}
        if action == "half_size":
            result["st_size"] //= 2
        return result

    def readdir(self, path, fh):
        self.meet("readdir", path)
        return [".", "..", *os.listdir(self.root + path)]

    def statfs(self, path):
        self.meet("statfs", path)
        found = os.statvfs(self.root + path)
        return {key: getattr(found, key) for key in ("f_bavail", "f_bfree", "f_blocks", "f_bsize", "f_frsize")}

    def open(self, path, flags):
        self.meet("open", path)
        return os.open(self.root + path, flags & ~getattr(os, "O_DIRECT", 0))

    def create(self, path, mode, fi=None):
        self.meet("create", path)
        return os.open(self.root + path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, mode)

    def read(self, path, size, offset, fh):
        action = self.meet("read", path)
        content = os.pread(fh, size, offset)
        if action == "short":
            content = content[: len(content) // 2]
        if action == "flip" and content:
            content = bytes([content[0] ^ 1]) + content[1:]
        return content

    def write(self, path, data, offset, fh):
        return len(data) if self.meet("write", path) == "lost" else os.pwrite(fh, data, offset)

    def truncate(self, path, length, fh=None):
        self.meet("truncate", path)
        os.truncate(self.root + path, length)

    def flush(self, path, fh):
        self.meet("flush", path)
        return 0

    def fsync(self, path, datasync, fh):
        return 0

    def release(self, path, fh):
        os.close(fh)
        return 0

    def mkdir(self, path, mode):
        self.meet("mkdir", path)
        os.mkdir(self.root + path, mode)

    def rmdir(self, path):
        self.meet("rmdir", path)
        os.rmdir(self.root + path)

    def unlink(self, path):
        self.meet("unlink", path)
        os.unlink(self.root + path)


if __name__ == "__main__":
    backing, point, rules_path, log_path = sys.argv[1:]
    mfusepy.FUSE(
        FaultFS(backing, Rules(rules_path, log_path)), point, foreground=True, nothreads=False, fsname="faults",
        subtype="faults", direct_io=True, attr_timeout=0, entry_timeout=0, negative_timeout=0,
    )  # fmt: skip
