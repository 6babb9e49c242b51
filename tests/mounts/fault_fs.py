"""A small FUSE file system that passes everything through to a directory and fails as its rules say.

    python fault_fs.py BACKING MOUNT_POINT RULES.json LOG [cached]

RULES.json holds a list of rules and is read again when it changes:
{"op": "read", "action": "errno", "errno": "EIO", "skip": 1, "count": 1, "path": "*.jsonl"}; `op` may be a list, `p` is the
probability that a matching call fails, drawn with `seed`. Actions: errno; delay (`seconds`); hang (until the rule is
gone); short (half of the bytes of a read); flip (one bit of a read); zeros (a read gives NULs); half_size (getattr says
half of the size); lost (a write that stores nothing and says it did); torn (a write that stores half and says all); full
(a write is ENOSPC once `bytes` were written since the rule came); hide (for the op `list`: a name is left out of a
listing); crash (the daemon ends); note (nothing). Every fault is one line in LOG;
every process that calls, by its id, one in LOG.callers.

It behaves as hopsfs-mount in what matters here: direct_io, no links, fsync that does nothing, and what is written is
stored by close() alone: a close that fails leaves an empty file, a daemon that dies leaves one too. With `cached` the
kernel's page cache stands before it, as before s3fs or rclone.
"""

import dataclasses
import errno
import fnmatch
import json
import os
import random
import sys
import tempfile
import threading
import time

import mfusepy


class Rules:
    """The rules with their counts, exact under a lock."""

    def __init__(self, path, log):
        self.path, self.log, self.guard = path, log, threading.Lock()
        self.stamp, self.rules, self.seen, self.fired, self.drawn, self.written = None, [], {}, {}, {}, 0

    def read(self):
        found = os.stat(self.path)
        stamp = (found.st_mtime_ns, found.st_ino)
        if stamp != self.stamp:
            with open(self.path) as file:
                self.rules, self.stamp = json.load(file), stamp
            self.seen, self.fired, self.written = {}, {}, 0
            self.drawn = {index: random.Random(rule.get("seed", 0)) for index, rule in enumerate(self.rules)}

    def fires(self, index, rule, size):
        """Whether a rule that matches fires at this call of it; `size` is what a write brings."""
        self.seen[index] = number = self.seen.get(index, 0) + 1
        if number <= rule.get("skip", 0) or self.fired.get(index, 0) >= rule.get("count", 1 << 60):
            return False
        if rule["action"] == "full" and self.written + size <= rule["bytes"]:
            return False
        if self.drawn[index].random() >= rule.get("p", 1.0):
            return False
        self.fired[index] = self.fired.get(index, 0) + 1
        return True

    def due(self, op, path, size=0):
        """The rule that fires at this call, if any."""
        with self.guard:
            self.read()
            for index, rule in enumerate(self.rules):
                ops = [rule["op"]] if isinstance(rule["op"], str) else rule["op"]
                if op in ops and fnmatch.fnmatch(path, rule.get("path", "*")) and self.fires(index, rule, size):
                    with open(self.log, "a") as log:
                        log.write(f"{op} {path} {rule['action']} {rule.get('errno', '')}\n")
                    return rule
            self.written += size
        return {"action": None}

    def stands(self, rule):
        with self.guard:
            self.read()
            return rule in self.rules


@dataclasses.dataclass
class Stage:
    """What is written to a file that is open for writing, until close() stores it."""

    content: int  # descriptor of a file without a name: gone with the daemon
    users: int = 0
    dirty: bool = False


class FaultFS(mfusepy.Operations):
    """Every call asks the rules first."""

    use_ns = True

    def __init__(self, root, rules):
        self.root, self.rules = root, rules
        self.guard = threading.RLock()
        self.stages, self.handles = {}, {}  # path -> Stage, for its size and for who opens it next; handle -> Stage
        self.threads = set()

    def heard_of(self, thread):
        """Note the process of a thread that calls, while it waits for its answer and is there to be looked at."""
        if thread not in self.threads:
            self.threads.add(thread)
            with open(f"/proc/{thread}/status") as status, open(f"{self.rules.log}.callers", "a") as callers:
                callers.write(next(line for line in status if line.startswith("Tgid")).split()[1] + "\n")

    def meet(self, op, path, size=0):
        thread = mfusepy.fuse_get_context()[2]
        if thread:  # 0: the kernel itself, or a process of another namespace
            self.heard_of(thread)
        rule = self.rules.due(op, path, size)
        if rule["action"] == "errno":
            raise mfusepy.FuseOSError(getattr(errno, rule["errno"]))
        if rule["action"] == "full":
            raise mfusepy.FuseOSError(errno.ENOSPC)
        if rule["action"] == "crash":
            os._exit(9)
        if rule["action"] == "delay":
            time.sleep(rule["seconds"])
        while rule["action"] == "hang" and self.rules.stands(rule):
            time.sleep(0.02)
        return rule["action"]

    # ------------------------------------------------------------------------------------------------------ names
    def getattr(self, path, fh=None):
        action = self.meet("getattr", path)
        found = os.lstat(self.root + path)
        result = {key: getattr(found, key) for key in ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size")}
        result |= {"st_mtime": found.st_mtime_ns, "st_ctime": found.st_ctime_ns, "st_atime": found.st_atime_ns}
        with self.guard:
            if path in self.stages:
                result["st_size"] = os.fstat(self.stages[path].content).st_size
        if action == "half_size":
            result["st_size"] //= 2
        return result

    def readdir(self, path, fh):
        self.meet("readdir", path)
        names = os.listdir(self.root + path)
        return [".", "..", *(name for name in names if self.meet("list", os.path.join(path, name)) != "hide")]

    def statfs(self, path):
        self.meet("statfs", path)
        found = os.statvfs(self.root + path)
        return {key: getattr(found, key) for key in ("f_bavail", "f_bfree", "f_blocks", "f_bsize", "f_frsize")}

    def mkdir(self, path, mode):
        self.meet("mkdir", path)
        os.mkdir(self.root + path, mode)

    def rmdir(self, path):
        self.meet("rmdir", path)
        os.rmdir(self.root + path)

    def unlink(self, path):
        self.meet("unlink", path)
        os.unlink(self.root + path)
        with self.guard:
            self.stages.pop(path, None)  # its handles keep it

    def rename(self, old, new):
        self.meet("rename", old)
        with self.guard:
            os.rename(self.root + old, self.root + new)
            self.stages.pop(new, None)
            if old in self.stages:
                self.stages[new] = self.stages.pop(old)

    def chmod(self, path, mode):
        self.meet("chmod", path)
        os.chmod(self.root + path, mode)

    def utimens(self, path, times=None):
        self.meet("utimens", path)
        os.utime(self.root + path, ns=times)

    # ---------------------------------------------------------------------------------------------------- content
    def open(self, path, flags):
        self.meet("open", path)
        writes = flags & os.O_ACCMODE != os.O_RDONLY
        handle = os.open(self.root + path, os.O_RDWR if writes else os.O_RDONLY)
        if writes:
            self.stage(path, handle, empty=bool(flags & os.O_TRUNC))
        return handle

    def create(self, path, mode, fi=None):
        self.meet("create", path)
        handle = os.open(self.root + path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, mode)
        self.stage(path, handle, empty=True)
        return handle

    def stage(self, path, handle, empty):
        """Have a handle write to what close() stores: a copy of what is there, or nothing."""
        with self.guard:
            made = self.stages.get(path)
            if made is None:
                with tempfile.TemporaryFile() as content:
                    made = self.stages[path] = Stage(os.dup(content.fileno()))
                if not empty:
                    self.copy(handle, made.content)
            self.handles[handle] = made
            made.users += 1

    @staticmethod
    def copy(source, target):
        os.ftruncate(target, 0)
        offset = 0
        while block := os.pread(source, 1 << 20, offset):
            os.pwrite(target, block, offset)
            offset += len(block)

    def read(self, path, size, offset, fh):
        action = self.meet("read", path)
        stage = self.handles.get(fh)
        content = os.pread(fh if stage is None else stage.content, size, offset)
        if action == "short":
            content = content[: len(content) // 2]
        if action == "flip" and content:
            content = bytes([content[0] ^ 1]) + content[1:]
        if action == "zeros":
            content = bytes(len(content))
        return content

    def write(self, path, data, offset, fh):
        action = self.meet("write", path, len(data))
        stage = self.handles[fh]
        stage.dirty = True
        if action != "lost":
            os.pwrite(stage.content, data[: len(data) // 2] if action == "torn" else data, offset)
        return len(data)

    def truncate(self, path, length, fh=None):
        self.meet("truncate", path)
        with self.guard:
            stage = self.handles.get(fh) or self.stages.get(path)
            if stage is None:
                os.truncate(self.root + path, length)
            else:
                os.ftruncate(stage.content, length)
                stage.dirty = True

    def flush(self, path, fh):
        stage = self.handles.get(fh)
        if stage is not None and stage.dirty:
            os.ftruncate(fh, 0)  # an upload begins by taking the old content away
        self.meet("flush", path)
        if stage is not None and stage.dirty:
            self.copy(stage.content, fh)
            stage.dirty = False
        return 0

    def fsync(self, path, datasync, fh):
        return 0

    def release(self, path, fh):
        with self.guard:
            stage = self.handles.pop(fh, None)
            os.close(fh)
            if stage is not None:
                stage.users -= 1
                if not stage.users:
                    os.close(stage.content)
                    self.stages = {name: other for name, other in self.stages.items() if other is not stage}
        return 0


if __name__ == "__main__":
    backing, point, rules_path, log_path, *options = sys.argv[1:]
    mfusepy.FUSE(
        FaultFS(backing, Rules(rules_path, log_path)), point, foreground=True, nothreads=False, fsname="faults",
        subtype="faults", direct_io="cached" not in options, attr_timeout=0, entry_timeout=0, negative_timeout=0,
    )  # fmt: skip
