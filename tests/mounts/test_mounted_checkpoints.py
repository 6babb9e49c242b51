"""Whole tiny runs whose output_dir is a real FUSE mount that fails: its weights are those of a run that met no fault."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_run import write_yaml

from axo_flash import mount_io
from axo_flash.checkpoints import CheckpointError, NotPublished, Session
from axo_flash.checkpoints import writer as writer_module
from axo_flash.checkpoints.manifest import verify_local
from axo_flash.config import load_config
from axo_flash.train import train

KEYS = {"max_steps": 6, "save_strategy": None, "save_steps": 2, "auto_resume_from_checkpoints": True}
QUICK = {"data_timeout": 6.0, "stall_timeout": 1.0, "checkpoint_timeout": 30.0}


@pytest.fixture(autouse=True)
def apart(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(mount_io, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(writer_module, "FIRST_PAUSE", 0.1)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("mounted-runs")


@pytest.fixture(scope="module")
def undisturbed(directory):
    train(load_config(write_yaml(directory, output_dir=str(directory / "undisturbed"), **KEYS)), lambda text: None)
    return load_file(directory / "undisturbed" / "adapter_model.safetensors")


def run(directory, mount, **changes):
    keys = KEYS | QUICK | {"output_dir": str(mount.point / "out"), "data_mount": None} | changes
    said = []
    return train(load_config(write_yaml(directory, **keys)), said.append), said


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def check(mount, undisturbed):
    """What lies behind the mount: the weights, and whole checkpoints alone, the last step's among them; their steps."""
    out = mount.backing / "out"
    assert same(load_file(out / "adapter_model.safetensors"), undisturbed)
    assert json.loads((out / "run_report.json").read_text())["status"] == "finished"
    whole = [verify_local(path).step for path in out.glob("checkpoint-*")]
    assert 6 in whole
    return sorted(whole)


def test_a_healthy_mount(directory, mount, undisturbed, tmp_path):
    report, _ = run(directory, mount, save_total_limit=2)
    assert len(check(mount, undisturbed)) <= 2
    assert report.checkpoints["tries_failed"] == 0
    assert not [path for path in (tmp_path / "cache" / "axo_flash" / "checkpoints").rglob("*") if path.is_file()]
    readable = [path for path in (mount.backing / "out").rglob("*") if path.is_file()]
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in readable)


@pytest.mark.parametrize("op", ["create", "write", "flush", "read", "open", "getattr"])
def test_faults_that_pass(directory, mount, undisturbed, op):
    mount.fail({"op": op, "action": "errno", "errno": "EIO", "skip": 3, "count": 4, "path": "*checkpoint-*"})
    report, _ = run(directory, mount, save_total_limit=9)
    assert len(mount.faults()) == 4
    given_up = report.checkpoints["never_published"]  # for a newer one that was there when the mount answered
    assert sorted(check(mount, undisturbed) + given_up) == [2, 4, 6]


def test_a_full_mount_then_room(directory, mount, undisturbed):
    mount.fail({"op": "write", "action": "errno", "errno": "ENOSPC", "skip": 6, "path": "*checkpoint-*"})
    with pytest.raises(NotPublished, match=r"checkpoint 6 could not be published(.|\n)*ENOSPC(.|\n)*complete in"):
        run(directory, mount, checkpoint_timeout=3.0)
    mount.fail()
    _, said = run(directory, mount)
    assert any("going on from" in text and "checkpoint-6" in text for text in said)
    check(mount, undisturbed)


def test_a_second_run_is_refused(directory, mount, undisturbed):
    settings = load_config(write_yaml(directory, **(KEYS | QUICK | {"output_dir": str(mount.point / "out")})))
    with Session(settings), pytest.raises(CheckpointError, match="in use by another run"):
        train(settings, lambda text: None)
    assert os.listdir(mount.backing / "out" / ".lease") == []


def test_the_training_process_never_touches_the_mount(directory, mount, undisturbed, tmp_path):
    """Of all processes that ask the mount for anything, at any time of a run and of one that goes on from it, none is
    the one that trains: neither our code there, nor that of transformers, peft or datasets."""
    data = mount.backing / "data"
    data.mkdir()
    (data / "chats.jsonl").write_bytes((directory / "chats.jsonl").read_bytes())
    keys = {"datasets": [{"path": str(mount.point / "data" / "*.jsonl"), "type": "chat_template"}]}
    keys |= {"data_mount": str(mount.point), "dataset_prepared_path": str(tmp_path / "prepared"), "save_total_limit": 1}
    run(directory, mount, **keys)
    for path in (mount.backing / "out").glob("checkpoint-6*/manifest.json"):
        path.write_bytes(b"{}")  # the one before it is gone: this one is looked at, and refused
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        run(directory, mount, **keys)
    os.listdir(mount.point / "data")  # here, the control: this process is known when it does touch it
    assert os.getpid() in mount.callers()
    (mount.folder / "log.callers").unlink()
    run(directory, mount, **(keys | {"auto_resume_from_checkpoints": False}))
    assert os.getpid() not in mount.callers() and mount.callers()


def test_a_write_that_hangs_for_ever_does_not_keep_the_next_checkpoint_away(directory, mount, undisturbed):
    mount.fail({"op": "flush", "action": "hang", "path": "*/checkpoint-2/optimizer.pt", "count": 1})
    report, _ = run(directory, mount, save_total_limit=9, data_timeout=1.0, stall_timeout=0.4, checkpoint_timeout=20.0)
    mount.fail()
    assert {2} <= set(report.checkpoints["never_published"]) <= {2, 4}
    out = mount.backing / "out"  # what the call that hangs holds of checkpoint-2 may be there still, without a manifest
    assert verify_local(out / "checkpoint-6").step == 6 and not (out / "checkpoint-2" / "manifest.json").exists()
    assert same(load_file(out / "adapter_model.safetensors"), undisturbed)


@pytest.mark.parametrize("path", ["*/optimizer.pt", "*/manifest.json"])
def test_bits_that_turn_on_the_way_back_are_read_again(directory, mount, undisturbed, path):
    run(directory, mount, save_total_limit=9, max_steps=6)
    mount.fail({"op": "read", "action": "flip", "path": path, "count": 1})
    report, said = run(directory, mount)
    assert len(mount.faults()) == 1 and not any("skipped" in text for text in said)
    assert report.resumed_from == str(mount.point / "out" / "checkpoint-6")


@pytest.mark.parametrize("rule", [{"op": "read", "action": "flip"}, {"op": "list", "action": "hide"}])
def test_a_lease_that_is_misread_is_not_another_run(directory, mount, undisturbed, rule):
    mount.fail(rule | {"path": "*/.lease/*", "count": 2})
    run(directory, mount)
    assert len(mount.faults()) == 2
    check(mount, undisturbed)
