"""Whole tiny runs that stream their data from a real FUSE mount that fails: the weights of a run that met no fault."""

import contextlib
import hashlib
import os
import sys
import threading
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from streamed_run import KEYS, SHARDS, names_from, same, weights, write_shards
from tiny_run import write_yaml

from axo_flash import mount_io
from axo_flash.config import load_config
from axo_flash.data import mounted
from axo_flash.data.shards import PREFETCH
from axo_flash.data.streaming import StreamRows, shard_order
from axo_flash.train import StreamFailed, train

# every open of a shard is one line in the log: a rule whose action is none that does anything
NOTE_OPENS = {"op": "open", "action": "note", "path": "*.jsonl"}
ORDER = [f"part-{index}.jsonl" for epoch in range(4) for index in shard_order(42, epoch, SHARDS)]


@pytest.fixture(autouse=True)
def apart(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(mounted, "ATTRIBUTE_CACHE_SECONDS", 0.05)
    monkeypatch.setattr(mount_io, "FIRST_PAUSE", 0.02)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("streamed")


@pytest.fixture(scope="module")
def undisturbed(directory):
    """The weights of a run on the same shards on local disk; its checkpoints stay."""
    data = write_shards(directory / "data")
    keys = KEYS | {"datasets": [{"path": str(data), "type": "chat_template"}]}
    train(load_config(write_yaml(directory, output_dir=str(directory / "undisturbed"), **keys)), lambda text: None)
    return weights(directory / "undisturbed")


@pytest.fixture
def run(directory, mount, tmp_path):
    """run(**changes): train on the shards behind the mount; output in tmp_path/out."""
    write_shards(mount.backing / "data")

    def run(**changes):
        keys = {"data_timeout": 20.0, "stall_timeout": 1.0, "data_mount": str(mount.point)}
        keys |= {"datasets": [{"path": str(mount.point / "data"), "type": "chat_template"}]}
        keys = KEYS | keys | {"output_dir": str(tmp_path / "out")} | changes
        return train(load_config(write_yaml(directory, **keys)), lambda text: None)

    return run


def opened(mount):
    """Names of the shards that were opened, in order."""
    return [os.path.basename(line.split()[1]) for line in mount.faults() if " note" in line]


def open_files(pid) -> list[str]:
    """What a living process's descriptors stand for; one that it closed since they were listed is none."""
    held = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            held.append(os.readlink(link))
    return held


def test_a_healthy_mount_each_shard_is_opened_once_an_epoch(mount, run, undisturbed, tmp_path):
    mount.fail(NOTE_OPENS)
    report = run()
    assert same(weights(tmp_path / "out"), undisturbed)
    names = opened(mount)
    assert names == ORDER[: len(names)] and report.data["shards_read"] <= len(names)
    assert len(names) <= report.data["shards_read"] + PREFETCH
    assert report.data["transfer"]["retries"] == 0 and report.data["mount"] == [f"{mount.point} (fuse.faults, faults)"]


def test_nothing_of_the_mount_is_held_while_it_trains(mount, run, undisturbed, tmp_path, monkeypatch):
    looks, real = [], StreamRows.__getitem__

    def look(rows, index):
        row = real(rows, index)
        for pid in ("self", rows.feed.tokeniser._process.pid):
            assert not [place for place in open_files(pid) if place.startswith(str(mount.point))]
            assert str(mount.point) not in Path(f"/proc/{pid}/maps").read_text()
        looks.append(index)
        return row

    monkeypatch.setattr(StreamRows, "__getitem__", look)
    run()
    assert looks == list(range(2 * KEYS["max_steps"])) and same(weights(tmp_path / "out"), undisturbed)


@pytest.mark.parametrize("step", [4, 20])
def test_a_resumed_run_opens_no_shard_that_was_used_up(mount, run, undisturbed, directory, tmp_path, step):
    mount.fail(NOTE_OPENS)
    checkpoint = directory / "undisturbed" / f"checkpoint-{step}"
    # the files behind the mount were written anew: with a manifest their hashes say that they are the same, and without
    # one their times have to
    for path in (directory / "data").iterdir():
        times = path.stat()
        os.utime(mount.backing / "data" / path.name, ns=(times.st_atime_ns, times.st_mtime_ns))
    run(resume_from_checkpoint=str(checkpoint))
    names = opened(mount)
    assert names == names_from(checkpoint)[: len(names)] and names
    assert same(weights(tmp_path / "out"), undisturbed)


@pytest.mark.parametrize(
    "rule",
    [
        *({"op": op, "action": "errno", "errno": "EIO", "count": 2} for op in ("getattr", "open", "read")),
        {"op": "read", "action": "errno", "errno": "ESTALE", "count": 3},
        {"op": "read", "action": "hang", "count": 1},
        {"op": "read", "action": "short", "count": 2},
    ],
    ids=lambda rule: f"{rule['op']}-{rule.get('errno', rule['action'])}",
)
@pytest.mark.parametrize("place", [0, 3])
def test_faults_that_pass(mount, run, undisturbed, tmp_path, rule, place):
    mount.fail(rule | {"path": f"*{ORDER[place]}"})
    run()
    assert len(mount.faults()) == rule["count"] and same(weights(tmp_path / "out"), undisturbed)


def test_a_daemon_that_dies_in_the_middle_and_comes_back(mount, run, undisturbed, tmp_path):
    mount.fail({"op": "read", "action": "crash", "path": f"*{ORDER[2]}", "count": 1})

    def remount():
        mount.daemon.wait()
        mount.stop()
        time.sleep(0.5)
        mount.start()

    thread = threading.Thread(target=remount)
    thread.start()
    report = run()
    thread.join()
    assert same(weights(tmp_path / "out"), undisturbed) and report.data["transfer"]["retries"] >= 1


def test_a_flipped_bit_is_found_by_the_manifest(mount, run, undisturbed, tmp_path):
    files = sorted((mount.backing / "data").iterdir())
    lines = "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files)
    (mount.backing / "data" / "SHA256SUMS").write_text(lines)
    mount.fail({"op": "read", "action": "flip", "path": f"*{ORDER[1]}", "count": 1})
    report = run()
    assert len(mount.faults()) == 1 and same(weights(tmp_path / "out"), undisturbed)
    assert report.data["transfer"]["verified"] == report.data["transfer"]["files"] >= SHARDS


@pytest.mark.parametrize("action", [{"action": "errno", "errno": "EIO"}, {"action": "hang"}], ids=["EIO", "hang"])
def test_a_fault_that_lasts_costs_no_step(mount, run, undisturbed, tmp_path, action):
    mount.fail({"op": "read", "path": f"*{ORDER[3]}", **action})
    with pytest.raises(StreamFailed, match=rf"copy_in of .*{ORDER[3]}.*gave up after.* Step (\d+) is saved"):
        run(data_timeout=2.0, save_steps=100)
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    mount.fail(NOTE_OPENS)
    before = len(opened(mount))
    run(auto_resume_from_checkpoints=True, save_steps=100)
    names = opened(mount)[before:]
    assert names == names_from(checkpoint)[: len(names)] and ORDER[0] not in names[:2]
    assert same(weights(tmp_path / "out"), undisturbed)


def test_data_and_checkpoints_on_one_mount(mount, run, undisturbed):
    output = mount.point / "out"
    with pytest.raises(StreamFailed, match="Step"):
        mount.fail({"op": "read", "action": "errno", "errno": "EIO", "path": f"*{ORDER[4]}"})
        run(output_dir=str(output), data_timeout=2.0)
    mount.fail()
    run(output_dir=str(output), auto_resume_from_checkpoints=True)
    assert same(weights(mount.backing / "out"), undisturbed)
