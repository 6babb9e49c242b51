"""A real FUSE mount of the fault-injecting file system (fault_fs.py): start it, set its rules, count its faults."""

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from axo_flash.mounts import find_mount

FUSERMOUNT = shutil.which("fusermount3") or shutil.which("fusermount")


class NoMount(RuntimeError):
    """FUSE cannot be mounted on this machine."""


def why_not():
    """Why no FUSE mount can be made here, or None."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "/dev/fuse is missing or may not be opened"
    if FUSERMOUNT is None:
        return "fusermount3 is missing (apt-get install fuse3)"
    if importlib.util.find_spec("mfusepy") is None:
        return "mfusepy is missing (pip install mfusepy)"
    return None


@dataclasses.dataclass
class FaultMount:
    """The mount at `point`, the directory `backing` behind it, and its rules. `cached`: with the kernel's page cache."""

    backing: Path
    point: Path
    folder: Path
    cached: bool = False
    daemon: subprocess.Popen | None = None

    @classmethod
    def below(cls, folder, cached=False):
        """A mount with all that belongs to it in `folder`; not started."""
        made = cls(folder / "backing", folder / "mnt", folder / "control", cached)
        for part in (made.backing, made.point, made.folder):
            part.mkdir(parents=True)
        made.fail()
        return made

    def start(self):
        """Mount it and wait until it is in the kernel's table."""
        command = [sys.executable, str(Path(__file__).with_name("fault_fs.py"))]
        command += [str(self.backing), str(self.point), str(self.folder / "rules.json"), str(self.folder / "log")]
        command += ["cached"] * self.cached
        self.daemon = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
        for _ in range(600):
            if find_mount(self.point).mount_point == str(self.point):
                return
            if self.daemon.poll() is not None:
                raise NoMount(f"FUSE cannot be mounted here: {self.daemon.stderr.read().decode()[-300:]}")
            time.sleep(0.05)
        raise AssertionError("the mount did not appear in 30 s")

    def fail(self, *rules):
        """From now on these rules hold; none: no faults."""
        staging = self.folder / "rules.new"
        staging.write_text(json.dumps(rules))
        staging.replace(self.folder / "rules.json")

    def faults(self):
        """One line for every fault that was injected."""
        log = self.folder / "log"
        return log.read_text().splitlines() if log.exists() else []

    def callers(self):
        """The ids of all processes that ever asked the mount for anything."""
        return {int(line) for line in (self.folder / "log.callers").read_text().split()}

    def stop(self):
        """Thaw it, detach it, end the daemon."""
        self.fail()
        self.detach()

    def detach(self):
        """End the daemon and unmount, the rules left as they are."""
        subprocess.run([FUSERMOUNT, "-uz", str(self.point)], check=False, stderr=subprocess.DEVNULL)
        if self.daemon is not None:
            self.daemon.kill()
            self.daemon.wait(timeout=20)
