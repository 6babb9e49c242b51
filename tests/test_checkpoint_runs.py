"""Whole tiny runs whose checkpoints are in danger: killed at any moment, terminated, on an output that fails or hangs."""

import errno
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_checkpoints import FaultyStorage
from tiny_run import write_yaml

from axo_flash import cli, train
from axo_flash.checkpoints import CheckpointError, NotPublished, Session, room
from axo_flash.checkpoints import writer as writer_module
from axo_flash.checkpoints.manifest import MANIFEST, Manifest, verify_local
from axo_flash.checkpoints.storage import LocalStorage
from axo_flash.config import load_config
from axo_flash.model import optimizer_bytes
from axo_flash.trainer import RunTrainer

TESTS = Path(__file__).parent
KEYS = {
    "max_steps": 8,
    "lora_dropout": 0.1,
    "save_strategy": None,
    "save_steps": 2,
    "auto_resume_from_checkpoints": True,
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoint-runs")


@pytest.fixture(autouse=True)
def own_staging(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def mounted(monkeypatch):
    """Make the output of train() a place that is copied to, through a storage of the test's own."""

    def use(storage):
        monkeypatch.setattr(train, "Session", functools.partial(Session, storage=storage, lease_storage=LocalStorage()))
        monkeypatch.setattr(writer_module, "FIRST_PAUSE", 0.05)

    return use


def config(directory, name, **changes):
    return load_config(write_yaml(directory, output_dir=str(directory / name), **(KEYS | changes)))


def weights(path):
    return load_file(path / "adapter_model.safetensors")


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.fixture(scope="module")
def undisturbed(directory):
    train.train(config(directory, "undisturbed"), lambda text: None)
    return weights(directory / "undisturbed")


# --------------------------------------------------------------------------------------------------------------- killed


def killed_runs(directory, name, kills, mounted, **changes):
    yaml = write_yaml(directory, output_dir=str(directory / name), **(KEYS | changes))
    options = {"yaml": str(yaml), "mounted": mounted, "kills": kills}
    environment = os.environ | {"PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TESTS / "killed_runs.py"), json.dumps(options)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("mounted", [False, True], ids=["local", "mounted"])
@pytest.mark.parametrize("seed", range(1))
def test_killed_at_any_moment_and_resumed_is_bit_identical(directory, undisturbed, mounted, seed):
    rng = random.Random(seed)
    name = f"killed-{mounted}-{seed}"
    kills = [rng.uniform(0.3, 3.0) for _ in range(3)]
    said = killed_runs(directory, name, kills, mounted)
    assert same(weights(directory / name), undisturbed), said
    for checkpoint in (directory / name).glob("checkpoint-*"):
        verify_local(checkpoint)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("mounted", [False, True], ids=["local", "mounted"])
def test_killed_fifty_times(directory, undisturbed, mounted):
    rng = random.Random(50)
    for batch in range(5):
        name = f"fifty-{mounted}-{batch}"
        said = killed_runs(directory, name, [rng.uniform(0.2, 4.0) for _ in range(10)], mounted)
        assert same(weights(directory / name), undisturbed), said


# ---------------------------------------------------------------------------------------------- an output like a mount


def test_a_healthy_mount_gets_everything_and_staging_is_empty(directory, undisturbed, mounted, tmp_path):
    mounted(LocalStorage())
    report = train.train(config(directory, "healthy", save_total_limit=2), lambda text: None)
    out = directory / "healthy"
    assert same(weights(out), undisturbed)
    manifest = Manifest.from_bytes((out / MANIFEST).read_bytes())
    assert "adapter_model.safetensors" in manifest.files and manifest.step == 8
    assert json.loads((out / "run_report.json").read_text())["status"] == "finished"
    assert (out / "loss.png").exists()
    published = [
        step for step in (2, 4, 6, 8) if step not in report.checkpoints["never_published"]
    ]  # overtaken: a slow disk
    assert sorted(path.name for path in out.glob("checkpoint-*")) == [f"checkpoint-{step}" for step in published[-2:]]
    assert report.checkpoint == str(out / "checkpoint-8")
    assert report.checkpoints["tries_failed"] == 0
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]

    # once more into the same directory: replaced
    train.train(config(directory, "healthy", auto_resume_from_checkpoints=False, max_steps=2), lambda text: None)
    assert Manifest.from_bytes((out / MANIFEST).read_bytes()).step == 2
    assert not same(weights(out), undisturbed)


def test_a_full_mount_does_not_stop_training_and_the_next_run_publishes(
    directory, undisturbed, mounted, tmp_path, capsys
):
    storage = FaultyStorage("copy_out", 20, "for_ever", errno.ENOSPC)
    mounted(storage)
    path = write_yaml(directory, output_dir=str(directory / "full"), **(KEYS | {"checkpoint_timeout": 1}))
    assert cli.main(["train", str(path)]) == cli.UNPUBLISHED
    err = capsys.readouterr().err
    staged = next((tmp_path / "cache").rglob("checkpoint-8"))
    assert f"complete in {staged}" in err and "No space left" in err and err.count("error:") == 1
    assert verify_local(staged).step == 8
    reports = list((tmp_path / "cache").rglob("run_report.json"))
    assert json.loads(reports[0].read_text())["status"] == "unpublished"

    storage.operation = None
    assert cli.main(["train", str(path), "resume_from_checkpoint=true"]) == 0
    assert f"going on from {staged}, verified" in capsys.readouterr().out
    assert same(weights(directory / "full"), undisturbed)
    report = json.loads((directory / "full" / "run_report.json").read_text())
    assert verify_local(Path(report["checkpoint"])).step == 8  # checkpoint-8.2 or so: no name is given twice
    assert Path(report["checkpoint"]).parent == directory / "full"


class Hanging(LocalStorage):
    """A mount that never answers a copy."""

    def copy_out(self, src, dst, progress=None):
        threading.Event().wait()


def test_a_mount_that_hangs_does_not_hold_the_end(directory, mounted, tmp_path):
    mounted(Hanging())
    began = time.monotonic()
    with pytest.raises(NotPublished, match=r"checkpoint 8 could not be published .*complete in .*checkpoint-8"):
        train.train(config(directory, "hangs", checkpoint_timeout=1), lambda text: None)
    assert time.monotonic() - began < 60


# ------------------------------------------------------------------------------------------------ SIGTERM, second runs


def terminated(directory, name, code, **changes):
    """A run in a process of its own, terminated at its first loss; (exit code, output, seconds from then on)."""
    yaml = write_yaml(directory, output_dir=str(directory / name), **(KEYS | changes))
    process = subprocess.Popen(
        [sys.executable, "-c", code, "train", str(yaml)],
        env=os.environ | {"PYTHONPATH": f"{TESTS.parent}:{TESTS}", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("step ") and "loss" in line and "eval" not in line:
            process.send_signal(signal.SIGTERM)
            break
    began = time.monotonic()
    rest = process.stdout.read()
    return process.wait(timeout=60), rest, time.monotonic() - began


RUN = """
import functools, sys
from axo_flash import cli, train
from axo_flash.checkpoints import Session
from axo_flash.checkpoints.storage import LocalStorage
from test_checkpoint_runs import Hanging
train.Session = functools.partial(Session, storage={storage}, lease_storage=LocalStorage())
sys.exit(cli.main())
"""


def test_sigterm_publishes_before_it_leaves(directory, tmp_path):
    name = "terminated"
    code, rest, _ = terminated(directory, name, RUN.format(storage="LocalStorage()"), max_steps=500, save_steps=400)
    assert code == 128 + signal.SIGTERM, rest
    report = json.loads((directory / name / "run_report.json").read_text())
    assert report["status"] == "interrupted"
    assert verify_local(Path(report["checkpoint"])).step == report["steps"]
    assert Path(report["checkpoint"]).parent == directory / name


def test_sigterm_leaves_in_time_when_the_mount_hangs(directory, tmp_path):
    keys = {"max_steps": 500, "save_steps": 400, "preemption_timeout": 4}
    code, rest, seconds = terminated(directory, "stuck", RUN.format(storage="Hanging()"), **keys)
    assert code in (cli.UNPUBLISHED, 128 + signal.SIGTERM), rest
    assert "is complete in" in rest and str(tmp_path / "cache") in rest
    assert seconds < 12


def test_a_second_run_on_one_output_is_refused(directory, undisturbed):
    settings = config(directory, "undisturbed")
    with Session(settings), pytest.raises(CheckpointError, match="in use by another run"):
        train.train(settings, lambda text: None)


# --------------------------------------------------------------------------------------------------------------- resume


def test_resume_refuses_another_configuration_and_other_data(directory, undisturbed):
    with pytest.raises(CheckpointError, match=r"learning_rate: 0\.005 in the checkpoint, 0\.001 in this run"):
        train.train(config(directory, "undisturbed", learning_rate=1e-3), lambda text: None)
    more = directory / "more.jsonl"
    more.write_text((directory / "chats.jsonl").read_text().replace("cat", "cow"))
    datasets = [{"path": str(more), "type": "chat_template"}]
    with pytest.raises(CheckpointError, match="trained on other data"):
        train.train(config(directory, "undisturbed", datasets=datasets), lambda text: None)


def test_resume_of_a_moved_data_set_with_other_logging_is_fine(directory, undisturbed, tmp_path):
    out = directory / "moved"
    shutil.copytree(directory / "undisturbed", out)
    shutil.rmtree(out / "checkpoint-8")
    shutil.copy(directory / "chats.jsonl", tmp_path / "elsewhere.jsonl")
    datasets = [{"path": str(tmp_path / "elsewhere.jsonl"), "type": "chat_template"}]
    said = []
    report = train.train(config(directory, "moved", datasets=datasets, logging_steps=2), said.append)
    assert report.resumed_from == str(out / "checkpoint-6")
    assert same(weights(out), undisturbed)


def test_a_damaged_newest_checkpoint_is_passed_over(directory, undisturbed):
    out = directory / "damaged"
    shutil.copytree(directory / "undisturbed", out)
    (out / "checkpoint-8" / "optimizer.pt").write_bytes(b"")
    said = []
    report = train.train(config(directory, "damaged"), said.append)
    assert report.resumed_from == str(out / "checkpoint-6")
    assert any("skipped" in text and "checkpoint-8: optimizer.pt has 0 bytes" in text for text in said)
    assert same(weights(out), undisturbed)


def test_a_staged_checkpoint_of_a_killed_run_is_not_moved_while_it_is_read(directory, undisturbed, monkeypatch):
    """Sealed, and killed before its rename: the next run goes on from it, however fast its threads publish."""
    out = directory / "staged"
    shutil.copytree(directory / "undisturbed", out)
    shutil.rmtree(out / "checkpoint-8")
    (out / ".staging" / "save-1-1").mkdir(parents=True)
    (out / "checkpoint-6").rename(out / ".staging" / "save-1-1" / "checkpoint-6")
    begin = Session.begin

    def and_wait(self, data):
        begin(self, data)
        assert self.writer.wait(time.monotonic() + 60)

    monkeypatch.setattr(Session, "begin", and_wait)
    report = train.train(config(directory, "staged"), lambda text: None)
    assert report.resumed_from == str(out / "checkpoint-6")
    assert same(weights(out), undisturbed)


def test_a_finished_run_started_again_trains_no_step_more(directory, undisturbed):
    said = []
    report = train.train(config(directory, "undisturbed"), said.append)
    assert (report.steps, report.status) == (8, "finished")
    assert any("nothing left to train" in text for text in said)
    assert same(weights(directory / "undisturbed"), undisturbed)
    assert report.eval_loss_after is not None


def test_resume_true_without_a_checkpoint_is_an_error(directory):
    with pytest.raises(CheckpointError, match="resume_from_checkpoint: true, but there is no complete checkpoint"):
        train.train(config(directory, "nothing", resume_from_checkpoint=True), lambda text: None)


# ----------------------------------------------------------------------------------------------------------- local disk


def test_local_disk_is_looked_at_before_the_first_step(directory, mounted, monkeypatch):
    mounted(LocalStorage())
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 20, 1 << 20, 1000))
    monkeypatch.setattr(RunTrainer, "training_step", None)  # no step is to be taken
    with pytest.raises(
        CheckpointError, match=r"takes about 0\.00 GiB, and the local disk of .* set checkpoint_staging_path"
    ):
        train.train(config(directory, "no-room"), lambda text: None)


def test_local_disk_that_may_get_short_is_said(directory, mounted, monkeypatch):
    asked = []
    require = Session.require_room
    monkeypatch.setattr(Session, "require_room", lambda self, one: (asked.append(one), require(self, one)))
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 0, 2 * asked[-1]))
    mounted(LocalStorage())
    said = []
    train.train(config(directory, "short", adapter=None, learning_rate=1e-4, max_steps=2), said.append)
    assert sum("GiB free, and checkpoints of this run may take" in text for text in said) == 1
    checkpoint = directory / "short" / "checkpoint-2"
    real = sum((checkpoint / name).stat().st_size for name in ("model.safetensors", "optimizer.pt"))
    assert real == pytest.approx(asked[-1], rel=0.1)
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 0, 4 * asked[-1]))
    said.clear()
    Session(config(directory, "short"), said.append).require_room(asked[-1])
    assert not said


@pytest.mark.parametrize(("optimizer", "bytes_each"), [("adamw_torch", 8), ("adamw_bnb_8bit", 2), ("adafactor", 0)])
def test_what_optimizers_keep(optimizer, bytes_each):
    assert optimizer_bytes(optimizer, trained=10, element_size=4) == 10 * bytes_each
