"""Whole tiny runs on streamed data: resumed to the bit, saved when the data end, killed at any moment."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from streamed_run import KEYS, names_from, same, weights, write_shards
from tiny_run import write_yaml

from axo_flash import cli
from axo_flash.checkpoints import CheckpointError
from axo_flash.config import load_config
from axo_flash.data import shards as shards_module
from axo_flash.data.dataset import DataError
from axo_flash.data.shards import Feed
from axo_flash.train import Interrupted, StreamFailed, train

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streaming-runs")
    write_shards(folder / "data")
    return folder


def config(directory, name, **changes):
    keys = KEYS | {"datasets": [{"path": str(directory / "data"), "type": "chat_template"}]} | changes
    return load_config(write_yaml(directory, output_dir=str(directory / name), **keys))


def run(directory, name, **changes):
    return train(config(directory, name, **changes), lambda text: None)


@pytest.fixture(scope="module")
def undisturbed(directory):
    return run(directory, "undisturbed"), weights(directory / "undisturbed")


@pytest.fixture
def reads(monkeypatch):
    """The names of the files that are read from now on, in order."""
    names, real = [], shards_module.fetch
    monkeypatch.setattr(
        shards_module, "fetch", lambda file, into: names.append(os.path.basename(file.path)) or real(file, into)
    )
    return names


def test_what_a_run_says_of_its_data(undisturbed):
    report, _ = undisturbed
    assert report.data["shards"] == 5 and report.data["shards_read"] > 5  # into the second epoch
    assert 1 < report.epochs < 4 and report.steps == 24
    assert report.speed.tokens < report.data["tokens"]
    assert len(report.data["sources"]) == 5 and all(len(source["sha256"]) == 64 for source in report.data["sources"])


@pytest.mark.parametrize("step", [2, 12, 20])
def test_a_resumed_run_is_bit_identical_and_reads_nothing_used_up(directory, undisturbed, reads, step):
    checkpoint = directory / "undisturbed" / f"checkpoint-{step}"
    report = run(directory, f"resumed-{step}", resume_from_checkpoint=str(checkpoint))
    assert same(weights(directory / f"resumed-{step}"), undisturbed[1])
    losses = [[row["loss"] for row in one.history if "loss" in row] for one in (report, undisturbed[0])]
    assert losses[0] == losses[1]
    assert reads and reads == names_from(checkpoint)[: len(reads)]


def test_unpacked_rows_and_more_of_them_in_a_batch(directory):
    keys = {"sample_packing": False, "micro_batch_size": 3, "max_steps": 12, "streaming_prefetch_shards": 2}
    run(directory, "padded", **keys)
    checkpoint = directory / "padded" / "checkpoint-6"
    run(directory, "padded-resumed", resume_from_checkpoint=str(checkpoint), **keys | {"streaming_prefetch_shards": 1})
    assert same(weights(directory / "padded"), weights(directory / "padded-resumed"))


def test_nothing_left_to_train(directory, undisturbed, reads):
    checkpoint = directory / "undisturbed" / "checkpoint-24"
    report = run(directory, "done", resume_from_checkpoint=str(checkpoint))
    assert report.steps == 24 and same(weights(directory / "done"), undisturbed[1])


@pytest.mark.parametrize("changes", [{"streaming_multipack_buffer_size": 3}, {"streaming": None}, {"seed": 1}])
def test_another_order_of_the_data_is_refused(directory, undisturbed, changes):
    checkpoint = str(directory / "undisturbed" / "checkpoint-2")
    with pytest.raises(CheckpointError, match=f"another configuration:\n  {next(iter(changes))}: "):
        run(directory, "refused", resume_from_checkpoint=checkpoint, **changes)


def test_other_data_are_refused(directory, undisturbed, tmp_path):
    write_shards(tmp_path / "data")
    (tmp_path / "data" / "part-5.jsonl").write_text("{}\n")
    keys = {"datasets": [{"path": str(tmp_path / "data"), "type": "chat_template"}]}
    with pytest.raises(DataError, match=r"data are not those that it was trained on: 6 shards, and were 5"):
        run(directory, "refused", resume_from_checkpoint=str(directory / "undisturbed" / "checkpoint-2"), **keys)


def test_rows_to_evaluate_on(directory, undisturbed):
    entry = {"path": str(directory / "data" / "part-1.jsonl"), "type": "chat_template"}
    keys = {"test_datasets": [entry], "eval_steps": 6, "max_steps": 12}
    packed = run(directory, "evaluated", **keys)
    padded = run(directory, "evaluated-padded", eval_sample_packing=False, **keys)
    losses = [[row["eval_loss"] for row in report.history if "eval_loss" in row] for report in (packed, padded)]
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0][0] == packed.eval_loss_before > packed.eval_loss_after
    assert packed.data["eval_documents"] == 12 and packed.data["eval_tokens"] > 0
    checkpoint = str(directory / "evaluated" / "checkpoint-6")
    resumed = run(directory, "evaluated-resumed", resume_from_checkpoint=checkpoint, **keys)
    assert resumed.eval_loss_after == packed.eval_loss_after


def failing(monkeypatch, number, action):
    """The `number`th shard from now on does not come: `action` is called in its place."""
    real, count = Feed._load, iter(range(1, 1 << 30))
    monkeypatch.setattr(Feed, "_load", lambda *rest: action() if next(count) == number else real(*rest))


@pytest.mark.parametrize("number", [3, 7])
def test_data_that_end_in_an_error_cost_no_step(directory, undisturbed, monkeypatch, number):
    def fail():
        raise DataError("the mount is gone.")

    name = f"failed-{number}"
    with monkeypatch.context() as patch:
        failing(patch, number, fail)
        with pytest.raises(
            StreamFailed, match=r"the mount is gone. Step \d+ is saved; .*resume_from_checkpoint"
        ) as caught:
            run(directory, name, save_steps=100)
    step = int(str(caught.value).split("Step ")[1].split()[0])
    assert step > 1 and [path.name for path in (directory / name).glob("checkpoint-*")] == [f"checkpoint-{step}"]
    report = run(directory, name, save_steps=100, auto_resume_from_checkpoints=True)
    assert report.resumed_from.endswith(f"checkpoint-{step}")
    assert same(weights(directory / name), undisturbed[1])


def test_data_that_fail_before_the_first_step(directory, monkeypatch):
    failing(monkeypatch, 1, lambda: Path("/nowhere/at/all").read_text())
    with pytest.raises(FileNotFoundError):
        run(directory, "never")
    assert not list((directory / "never").glob("checkpoint-*"))


def test_terminated_while_it_waits_for_data(directory, undisturbed, monkeypatch):
    def hang():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(3)
        raise DataError("too late")

    with monkeypatch.context() as patch:
        failing(patch, 4, hang)
        with pytest.raises(Interrupted) as caught:
            run(directory, "terminated", save_steps=100)
    assert caught.value.signal_number == signal.SIGTERM and caught.value.report.steps > 1
    assert caught.value.report.checkpoint.endswith(f"checkpoint-{caught.value.report.steps}")
    run(directory, "terminated", save_steps=100, resume_from_checkpoint=True)
    assert same(weights(directory / "terminated"), undisturbed[1])


def test_killed_at_any_moment(directory, undisturbed):
    rng = random.Random(0)
    keys = {"datasets": [{"path": str(directory / "data"), "type": "chat_template"}], **KEYS}
    keys |= {"auto_resume_from_checkpoints": True, "output_dir": str(directory / "killed")}
    options = {"yaml": str(write_yaml(directory, **keys)), "mounted": False}
    options["kills"] = [rng.uniform(1.0, 6.0) for _ in range(4)]
    environment = os.environ | {"PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TESTS / "killed_runs.py"), json.dumps(options)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert same(weights(directory / "killed"), undisturbed[1])
    assert not list((directory / "prepared").glob(".stream-*"))


def test_no_process_outlives_the_run(directory):
    run(directory, "alone", max_steps=1)
    assert not [thread for thread in threading.enumerate() if thread.name == "bring shards"]
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    commands = [Path(f"/proc/{pid}/cmdline").read_text() for pid in children]
    assert not [command for command in commands if "tokeniser" in command or "mount_worker" in command]


def test_check_shows_the_first_shard(directory, capsys):
    keys = {"datasets": [{"path": str(directory / "data"), "type": "chat_template"}]}
    yaml = write_yaml(directory, **(KEYS | keys))
    assert cli.main(["check", str(yaml)]) == 0
    shown = capsys.readouterr().out
    assert "--- document 3:" in shown and "5, read one by one while training" in shown and "12 of 12 used" in shown
