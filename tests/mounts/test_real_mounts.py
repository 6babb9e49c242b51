"""Data and checkpoints on real mounts of real S3 servers, whose daemons and stores are killed or frozen and come back."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from real_mounts import NEEDS, PATIENCE, Stack, wait_for, why_not
from safetensors.torch import load

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
import golden_cases as golden
from tiny_run import write_chats, write_yaml

from axo_flash import mount_io
from axo_flash.checkpoints import writer as writer_module
from axo_flash.checkpoints.manifest import Broken, verify_local
from axo_flash.config import Config, DatasetConfig, load_config
from axo_flash.data.dataset import prepare_data
from axo_flash.mount_io import MountError, MountIO
from axo_flash.train import train

REQUIRED = os.environ.get("REAL_MOUNTS") == "required"  # what has been installed for these tests is not to be missing
STEPS = 8
KEYS = {"max_steps": STEPS, "save_strategy": None, "save_steps": 2, "save_total_limit": 1}
KEYS |= {"auto_resume_from_checkpoints": True}
QUICK = {"data_timeout": 60.0, "stall_timeout": 20.0, "checkpoint_timeout": 90.0}
MIDDLE = 8 << 20
LARGE = random.Random(0).randbytes(24 << 20)


# --dist loadgroup: all tests of a kind in one worker, which starts its stack once
@pytest.fixture(scope="module", params=[pytest.param(kind, marks=pytest.mark.xdist_group(kind)) for kind in NEEDS])
def stack(request, tmp_path_factory):
    if reason := why_not(request.param):
        (pytest.fail if REQUIRED else pytest.skip)(reason)
    made = Stack(request.param, tmp_path_factory.mktemp(request.param))
    try:
        made.store.start()
        made.mount()
        yield made
    finally:
        made.stop()


@pytest.fixture
def real(stack, monkeypatch, tmp_path):
    """The stack, up; and the caches and pauses of a test."""
    stack.revive()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(mount_io, "FIRST_PAUSE", 0.1)
    monkeypatch.setattr(mount_io, "LONGEST_PAUSE", 1.0)
    monkeypatch.setattr(writer_module, "FIRST_PAUSE", 0.2)
    return stack


# what happens to a stack in the middle of things; frozen: no call is answered, and none fails
BLOWS = ["daemon killed", "store killed", "daemon frozen", "store frozen"]
FROZEN, STALL = 4.0, 1.5  # seconds that a freeze lasts, and after which a helper is left behind then


class Blow:
    """Kills or freezes the daemon or the store of a stack, once, and brings it back after a while."""

    def __init__(self, real, what):
        self.real, self.thread = real, None
        victim, _, how = what.partition(" ")
        self.victim, self.freezes = (real.daemon if victim == "daemon" else real.store.daemon), how == "frozen"

    @property
    def stall_timeout(self):
        """Shorter than a freeze, so that helpers are left behind in it."""
        return STALL if self.freezes else 20.0

    def fall(self, at=MIDDLE):
        """For a copy that has come to byte `at`."""
        if self.thread is None and at >= MIDDLE:
            if self.freezes:
                self.victim.signal(signal.SIGSTOP)
            else:
                self.victim.kill()
            self.thread = threading.Thread(target=self._mend)
            self.thread.start()

    def _mend(self):
        time.sleep(FROZEN if self.freezes else 1.0)
        if self.freezes:
            self.victim.signal(signal.SIGCONT)
        self.real.revive()

    def over(self):
        assert self.thread is not None, "nothing was killed"
        self.thread.join()


def manifest_of(files):
    return "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in files.items()).encode()


def test_data_that_another_client_stored(real, tmp_path):
    """Its rows come with the sha256 of what is stored, with a manifest and without, and nothing of the mount is held."""
    rows = golden.instruction_rows(golden.ALPACA)
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    for folder in ("plain", "listed"):
        real.put(f"data/{folder}/train.jsonl", text)
    real.put("data/listed/SHA256SUMS", manifest_of({"train.jsonl": text}))
    for folder in ("plain", "listed"):
        section = DatasetConfig(path=str(real.point / "data" / folder / "*.jsonl"), type="alpaca")
        keys = {"data_mount": str(real.point), "dataset_prepared_path": str(tmp_path / folder), **QUICK}
        keys |= {"base_model": "none", "learning_rate": 1e-4, "sequence_len": 256, "dataset_num_proc": 1}
        keys.pop("checkpoint_timeout")
        report = prepare_data(Config(datasets=[section], **keys), golden.tiny_tokenizer(plain=False)).report
        assert report.rows_read == len(rows) and report.sources[0]["sha256"] == hashlib.sha256(text).hexdigest()
        assert report.transfer.verified == (folder == "listed")
        assert report.mount[0].startswith(f"{real.point} (fuse.")
    assert str(real.point) not in Path("/proc/self/maps").read_text()
    assert not any(os.path.realpath(link).startswith(str(real.point)) for link in Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize("what", BLOWS)
def test_a_copy_in_whose_mount_breaks_in_the_middle(real, tmp_path, what):
    name = f"in-{what.replace(' ', '-')}"
    real.put(name, LARGE)
    blow = Blow(real, what)
    with MountIO(timeout=90, stall_timeout=blow.stall_timeout) as io:
        # at the first word of it, half a MiB: progress is told now and then, and all of it may be there the next time
        copied = io.copy_in(str(real.point / name), str(tmp_path / "local"), lambda at: blow.fall(), listed=True)
        blow.over()
    assert (tmp_path / "local").read_bytes() == LARGE
    assert copied.sha256 == hashlib.sha256(LARGE).hexdigest()
    assert "store" in what or io.stats.retries >= 1
    assert what != "daemon frozen" or io.stats.stalls >= 1


@pytest.mark.parametrize("what", BLOWS)
def test_a_copy_out_whose_mount_breaks_in_the_middle(real, tmp_path, what):
    (tmp_path / "local").write_bytes(LARGE)
    folder, blow = f"out-{what.replace(' ', '-')}", Blow(real, what)
    with MountIO(timeout=90, stall_timeout=blow.stall_timeout) as io:
        io.makedirs(str(real.point / folder))
        copied = io.copy_out(str(tmp_path / "local"), str(real.point / folder / "new"), blow.fall)
        blow.over()
    assert copied.sha256 == hashlib.sha256(LARGE).hexdigest()
    # a write cache answers the reading back: what it holds is stored soon after
    wait_for(lambda: real.store.objects(folder).get("new") == LARGE, "it is in the store")


# ------------------------------------------------------------------------------------------------------- training there
@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("real-runs")


@pytest.fixture(scope="module")
def undisturbed(directory):
    train(load_config(write_yaml(directory, output_dir=str(directory / "undisturbed"), **KEYS)), lambda text: None)
    return load((directory / "undisturbed" / "adapter_model.safetensors").read_bytes())


def yaml_of(directory, real, name, **changes):
    """A run with its data and its output on the mount."""
    text = write_chats(directory / "chats.jsonl").read_bytes()
    real.put(f"{name}-data/chats.jsonl", text)
    real.put(f"{name}-data/SHA256SUMS", manifest_of({"chats.jsonl": text}))
    data = [{"path": str(real.point / f"{name}-data" / "chats.jsonl"), "type": "chat_template"}]
    keys = KEYS | QUICK | {"datasets": data, "output_dir": str(real.point / name), "data_mount": str(real.point)}
    return write_yaml(directory, **(keys | changes))


def checkpoints_in(objects, folder):
    """The steps of the checkpoints among stored objects; each is held against its manifest."""
    for name, content in objects.items():
        if name.startswith("checkpoint-"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
    return sorted(verify_local(path).step for path in folder.glob("checkpoint-*"))


def check(real, name, undisturbed, tmp_path):
    """What is in the store in the end, past the mount: an undisturbed run's weights and last checkpoint."""

    def arrived():
        objects = real.store.objects(name)
        # a write cache that was killed uploads files anew that were removed since, of a checkpoint that never was complete
        if real.kind == "rclone-full":
            whole = {key.split("/")[0] for key in objects if key.endswith("/manifest.json")}
            objects = {
                key: content
                for key, content in objects.items()
                if not key.startswith("checkpoint-") or key.split("/")[0] in whole
            }
        if json.loads(objects.get("run_report.json", "{}")).get("status") != "finished":
            return False
        try:
            with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
                steps = checkpoints_in(objects, Path(folder))
        except Broken:
            return False
        weights = load(objects["adapter_model.safetensors"])
        same = weights.keys() == undisturbed.keys() and all(
            torch.equal(weights[key], undisturbed[key]) for key in weights
        )
        # those before the last one went, save_total_limit is 1; and the lease is given back
        return same and steps == [STEPS] and not any(key.startswith(".lease/0") for key in objects)

    # a write cache uploads later, and in an order of its own
    wait_for(arrived, "all is in the store", PATIENCE if real.kind == "rclone-full" else 10)


def test_a_run_that_is_killed_and_resumed(real, directory, undisturbed, tmp_path):
    path = yaml_of(directory, real, "killed")
    command = [sys.executable, "-m", "axo_flash", "train", str(path)]
    with open(tmp_path / "log", "wb") as log:
        killed = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def saved():
        assert killed.poll() is None, (tmp_path / "log").read_text()[-2000:]
        return any(key.endswith("/manifest.json") for key in real.store.objects("killed"))

    wait_for(saved, "a checkpoint is in the store", 120)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait(timeout=20)
    said = []
    train(load_config(path), said.append)
    assert any("going on from" in text for text in said), said
    check(real, "killed", undisturbed, tmp_path)


@pytest.mark.parametrize("what", BLOWS[:3])
def test_a_run_whose_mount_breaks(real, directory, undisturbed, tmp_path, monkeypatch, what):
    """While the first checkpoint is copied. Training goes on, and in the end all is there."""
    name, blow, plain = what.replace(" ", "-"), Blow(real, what), MountIO.copy_out

    def copy_out(self, source, target, *arguments):
        if "checkpoint-" in target and "safetensors" in target:
            blow.fall()
        return plain(self, source, target, *arguments)

    monkeypatch.setattr(MountIO, "copy_out", copy_out)
    path = yaml_of(directory, real, name, stall_timeout=blow.stall_timeout)
    report = train(load_config(path), lambda text: None)
    blow.over()
    assert report.status == "finished"
    check(real, name, undisturbed, tmp_path)


# last, since the store has to be started again after it
def test_a_store_that_stays_away_is_one_error_in_time(real, tmp_path):
    real.put("unread", LARGE)
    real.store.daemon.kill()
    started = time.monotonic()
    with MountIO(timeout=5, stall_timeout=10) as io, pytest.raises(MountError) as error:
        io.copy_in(str(real.point / "unread"), str(tmp_path / "local"), listed=True)
    assert time.monotonic() - started < 60
    assert f"unread on {real.point} (fuse." in str(error.value) and "gave up after" in str(error.value)
    assert not (tmp_path / "local").exists()
