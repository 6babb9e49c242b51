"""Which mount holds a path, told by the kernel's table alone: a mount whose daemon died or hangs is never touched."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field

MOUNTINFO = "/proc/self/mountinfo"
NETWORK_TYPES = {
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "ceph", "lustre", "gpfs", "beegfs", "glusterfs", "afs", "orangefs", "pvfs2",
}  # fmt: skip
MAX_LINKS = 40  # as the kernel's own limit


@dataclass(frozen=True)
class Mount:
    """One line of mountinfo: where a file system is mounted, its type (`fuse.hopsfs`, `ext4`, ...) and its source.

    `identity` (mount id and device) differs after a remount; it does not count when mounts are compared.
    """

    mount_point: str
    fstype: str
    source: str
    identity: str = field(default="", compare=False)

    @property
    def device(self) -> str:
        """major:minor, as st_dev has it of what lies there."""
        return self.identity.partition(" ")[2]

    @property
    def is_fuse(self) -> bool:
        return self.fstype.startswith("fuse")

    @property
    def is_remote(self) -> bool:
        """Whether a daemon or a server stands behind it, so that any call may fail for a while or hang."""
        return self.is_fuse or self.fstype in NETWORK_TYPES

    def __str__(self) -> str:
        return f"{self.mount_point} ({self.fstype}, {self.source})"


def find_mount(path: str | os.PathLike, mountinfo: str = MOUNTINFO) -> Mount:
    """The mount that holds `path`, by the longest mount point that is a prefix; never touches `path` itself.

    The path is taken as written (made absolute, `..` folded): following symbolic links would mean touching the mount.
    """
    path, best = os.path.abspath(path), Mount("", "unknown", "unknown")
    try:
        with open(mountinfo, encoding="utf-8", errors="surrogateescape") as lines:
            for line in lines:
                # "36 35 98:0 /root /mount/point options [optional fields ...] - fstype source options": proc(5)
                left, _, right = line.rstrip("\n").partition(" - ")
                number, _, device, _, escaped = left.split(" ")[:5]
                mount_point, (fstype, source) = _unescape(escaped), right.split(" ")[:2]
                # >=: of two mounts on one point the later hides the earlier
                if covers(mount_point, path) and len(mount_point) >= len(best.mount_point):
                    best = Mount(mount_point, fstype, _unescape(source), f"{number} {device}")
    except FileNotFoundError:  # not Linux: nothing is known about mounts
        return Mount("/", "unknown", "unknown")
    return best


def covers(directory: str, path: str) -> bool:
    """Whether the absolute `path` is `directory` or lies below it, by their names."""
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def real_place(path: str | os.PathLike, mountinfo: str = MOUNTINFO) -> str:
    """`path` made absolute with the symbolic links on local disks followed, and none that lies on a remote mount.

    So a link in a home directory that leads to a FUSE mount is known for what it is, and the mount is not touched.
    """
    todo, done, links = os.path.abspath(path).split("/")[1:], "/", 0
    while todo:
        name = todo.pop(0)
        if name in ("", "."):
            continue
        if name == "..":  # from a link's target: of the directory that we are really in
            done = os.path.dirname(done)
            continue
        here = os.path.join(done, name)
        if find_mount(here, mountinfo).is_remote or not os.path.islink(here):
            done = here
            continue
        links += 1
        if links > MAX_LINKS:
            return os.path.abspath(path)  # a loop: opening it says so
        target = os.readlink(here)
        todo = target.split("/") + todo
        done = "/" if os.path.isabs(target) else done
    return done


def _unescape(name: str) -> str:
    """mountinfo writes space, tab, newline and backslash as octal: `\\040` is a space."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), name)
