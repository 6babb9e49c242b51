"""The life of a checkpoint on an output that fails: the n-th call once, for ever, torn, or as the last thing that happens.

As SQLite does: for every operation fail its n-th call, for n = 1, 2, ... until a run meets no fault. After each run,
whatever was reported as published is there and whole, and a resume takes the newest whole one, never a broken one.
"""

import contextlib
import errno
import json
import os
import random
import shutil
from pathlib import Path

import pytest

from axo_flash.checkpoints.manifest import MANIFEST, Broken, Identity, Manifest, read_local, seal, verify_local
from axo_flash.checkpoints.output import STARTED, LocalOutput, MountedOutput
from axo_flash.checkpoints.resume import (
    CheckpointError,
    checkpoint_at,
    clear_staging,
    newest_complete,
    require_same_config,
    require_same_data,
    survey,
)
from axo_flash.checkpoints.shelf import Shelf, next_generation
from axo_flash.checkpoints.storage import LocalStorage

IDENTITY = Identity({"learning_rate": 1.0}, "hash", "data")
OPERATIONS = ("stat", "listdir", "copy_in", "copy_out", "read_bytes", "write_new", "makedirs", "remove_tree")
WRITES = ("copy_out", "write_new")
STEPS, LIMIT = (10, 20, 30, 40), 2


@pytest.fixture(autouse=True)
def synced(monkeypatch):
    """Counts what is flushed to disk instead of waiting for the disk thousands of times."""
    flushed = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    return flushed


class Crash(BaseException):
    """The process dies: nothing catches it, nothing is cleaned up."""


class FaultyStorage(LocalStorage):
    """Local storage in which one operation's n-th call goes wrong: `how` is once, for_ever, torn, crash, or crash_after.

    torn: half of the file arrives, and then the call fails, once. crash: it dies half way; crash_after: right after.
    """

    def __init__(self, operation=None, number=0, how="once", code=errno.EIO):
        self.operation, self.number, self.how, self.code = operation, number, how, code
        self.calls, self.faults = 0, 0

    def _fault(self):
        self.faults += 1
        return OSError(self.code, os.strerror(self.code), self.operation)

    def call(self, name, *arguments, **options):
        real = getattr(LocalStorage, name)
        if name != self.operation:
            return real(self, *arguments, **options)
        self.calls += 1
        if self.calls < self.number or (self.calls > self.number and self.how != "for_ever"):
            return real(self, *arguments, **options)
        if self.how in ("torn", "crash"):
            self._half(name, *arguments)
        if self.how == "crash":
            self.faults += 1
            raise Crash
        if self.how == "crash_after":
            real(self, *arguments, **options)
            self.faults += 1
            raise Crash
        raise self._fault()

    def _half(self, name, *arguments):
        if name == "copy_out":
            data = Path(arguments[0]).read_bytes()
            Path(arguments[1]).write_bytes(data[: len(data) // 2])
        elif name == "write_new":
            Path(arguments[0]).write_bytes(arguments[1][: len(arguments[1]) // 2])
        elif name == "remove_tree" and os.path.isdir(arguments[0]):
            for file in sorted(os.listdir(arguments[0]))[:1]:
                os.remove(os.path.join(arguments[0], file))


for _name in OPERATIONS:
    setattr(FaultyStorage, _name, lambda self, *a, _name=_name, **k: self.call(_name, *a, **k))


def write_checkpoint(staging, step, number=None):
    """What the trainer leaves in staging: a few files, their content that of the step."""
    directory = staging / f"save-1-{number or step}" / f"checkpoint-{step}"
    directory.mkdir(parents=True)
    for name in ("model.safetensors", "optimizer.pt", "trainer_state.json"):
        (directory / name).write_bytes(random.Random(f"{step} {name}").randbytes(3000))
    return directory


def is_whole(directory, step):
    """Whether a directory has just what was saved at a step: the oracle, which reads no manifest."""
    return all(
        (directory / name).read_bytes() == random.Random(f"{step} {name}").randbytes(3000)
        for name in ("model.safetensors", "optimizer.pt", "trainer_state.json")
    )


def new_shelf(root, staging, storage, generation=1):
    return Shelf(MountedOutput(str(root), storage), staging, LIMIT, generation, IDENTITY)


def life(root, staging, storage, promised, tries=3, steps=STEPS):
    """A run that saves at `steps` and tries to publish each; `promised` gets what is reported, even if it crashes."""
    shelf = new_shelf(root, staging, storage)
    for step in steps:
        shelf.seal(write_checkpoint(staging, step))
        promised["sealed"] = step
        for _ in range(tries):
            if shelf.publish():
                break
        if shelf.status.published_step is not None:
            promised["published"] = shelf.status.published_step
        assert len(list(staging.glob("save-*/checkpoint-*"))) <= 2
    return shelf


def check_promises(root, staging, promised):
    """A healthy file system again: the invariant."""
    output = MountedOutput(str(root), LocalStorage())
    clear_staging(staging)
    found = newest_complete(output, staging)
    newest = max(promised.get("sealed", 0), promised.get("published", 0))
    if newest == 0:
        return
    assert found is not None
    assert found.manifest.step >= newest
    assert is_whole(found.local, found.manifest.step)
    if "published" in promised:  # what was reported as published is there, or a newer one is
        whole = [m.step for name, m in output.survey()[0].items() if is_whole(root / name, m.step)]
        assert max(whole) >= promised["published"]


def sweep(tmp_path, operation, how):
    """Run `life` with the n-th call going wrong, for n = 1, 2, ... until it does not; the number of runs with a fault."""
    for number in range(1, 500):
        root, staging = tmp_path / "mount" / str(number), tmp_path / "staging" / str(number)
        root.mkdir(parents=True)
        storage, promised = FaultyStorage(operation, number, how), {}
        try:
            shelf = life(root, staging, storage, promised)
            if how != "for_ever":
                assert shelf.status.published_step == STEPS[-1]
        except Crash:
            pass
        check_promises(root, staging, promised)
        if storage.faults == 0:
            return number - 1
    raise AssertionError("no run without a fault")


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name != "copy_in"])
@pytest.mark.parametrize("how", ["once", "for_ever", "torn", "crash", "crash_after"])
def test_the_nth_call_fails_while_saving(tmp_path, operation, how):
    assert sweep(tmp_path, operation, how) >= len(STEPS)


@pytest.mark.parametrize("operation", ["stat", "listdir", "copy_in", "read_bytes"])
@pytest.mark.parametrize("how", ["once", "for_ever"])
def test_the_nth_call_fails_while_resuming(tmp_path, operation, how):
    """A whole checkpoint, maybe an older one with the reason why; or an error. Never nothing, never a broken one."""
    root, staging = tmp_path / "mount", tmp_path / "staging"
    root.mkdir()
    life(root, staging, LocalStorage(), {})
    shutil.rmtree(staging)
    for number in range(1, 200):
        storage = FaultyStorage(operation, number, how)
        try:
            found = newest_complete(MountedOutput(str(root), storage), staging)
            assert found is not None
            assert is_whole(found.local, found.manifest.step)
            assert found.manifest.step == STEPS[-1] or found.skipped
        except (CheckpointError, OSError):
            assert storage.faults
        if storage.faults == 0:
            return
    raise AssertionError("no run without a fault")


@pytest.mark.parametrize("how", ["crash", "crash_after"])
@pytest.mark.parametrize("operation", [*WRITES, "remove_tree", "listdir"])
def test_lives_that_end_in_a_crash_one_after_another(tmp_path, operation, how):
    """Each run resumes the one before, on what it left; in the end all is there, and nothing unfinished stays."""
    root, staging, step = tmp_path / "mount", tmp_path / "staging", 0
    root.mkdir()
    for number in range(1, 15):
        output = MountedOutput(str(root), LocalStorage())
        clear_staging(staging)
        found = newest_complete(output, staging)
        assert (found.manifest.step if found else 0) >= step
        step = found.manifest.step if found else 0
        seen = [candidate.manifest for candidate in survey(output, staging)[0]]
        generation = next_generation(seen)
        shelf = new_shelf(root, staging, FaultyStorage(operation, number, how), generation)
        if found is not None and found.local.parent.parent == staging and found.local.parent.name != "resume":
            shelf.adopt(found.local, None)
        try:
            for save in range(3):
                shelf.seal(write_checkpoint(staging, step + 10, f"{number}-{save}"))
                step += 10
                shelf.publish()
        except Crash:
            continue
        step = shelf.status.published_step
    shelf = new_shelf(root, staging, LocalStorage(), next_generation([]) + 100)
    shelf.seal(write_checkpoint(staging, step + 10, "last"))
    assert shelf.publish()
    names = MountedOutput(str(root), LocalStorage()).names()
    assert len(names) == LIMIT, names
    assert not list(root.glob(f"*/{STARTED}"))


def test_an_outage_keeps_the_newest_in_staging_and_publishes_when_it_is_over(tmp_path):
    root, staging = tmp_path / "mount", tmp_path / "staging"
    root.mkdir()
    storage = FaultyStorage("copy_out", 7, "for_ever", errno.ENOSPC)  # each checkpoint is three files: the third fails
    shelf = life(root, staging, storage, {}, tries=1)
    assert shelf.status.published_step == 20
    assert "checkpoint 40 only in" in shelf.status.notice()
    assert "No space left" in shelf.status.last_error
    assert shelf.status.never_published == [30]
    assert [path.name for path in staging.glob("save-*/*")] == ["checkpoint-40"]
    assert newest_complete(shelf.output, staging).manifest.step == 40
    storage.operation = None
    assert shelf.publish()
    assert shelf.status.notice() == ""
    assert list(shelf.output.survey()[0]) == ["checkpoint-40.2", "checkpoint-20"]
    shelf.forget_staged()
    assert not list(staging.glob("save-*/*"))


# ------------------------------------------------------------------------------------------------------------ rotation


def test_rotation_keeps_the_newest_and_what_is_not_ours(tmp_path):
    root, staging = tmp_path / "mount", tmp_path / "staging"
    (root / "checkpoint-5").mkdir(parents=True)
    (root / "checkpoint-5" / "trainer_state.json").write_text("{}")  # stock Trainer's: no manifest, and no trace of us
    (root / "checkpoint-6").mkdir()
    (root / "checkpoint-6" / STARTED).write_text("{}")  # of a run that died
    shelf = life(root, staging, LocalStorage(), {})
    assert sorted(shelf.output.names()) == ["checkpoint-30", "checkpoint-40", "checkpoint-5"]


def test_a_run_started_afresh_is_newer_than_what_it_found(tmp_path):
    root, staging = tmp_path / "mount", tmp_path / "staging"
    root.mkdir()
    life(root, staging, LocalStorage(), {})
    shutil.rmtree(staging)
    shelf = new_shelf(root, staging, LocalStorage(), generation=2)
    for number, step in enumerate((10, 40)):
        shelf.seal(write_checkpoint(staging, step, f"again-{number}"))
        assert shelf.publish()
    assert newest_complete(shelf.output, staging).manifest.generation == 2
    assert sorted(shelf.output.names()) == ["checkpoint-10", "checkpoint-40.2"]


def test_nothing_is_removed_if_the_listing_does_not_show_the_newest(tmp_path):
    root, staging = tmp_path / "mount", tmp_path / "staging"
    root.mkdir()
    shelf = life(root, staging, LocalStorage(), {})
    assert shelf.output.rotate(1, newest="checkpoint-50") == []


# -------------------------------------------------------------------------------------------------------------- resume


def published(tmp_path):
    root, staging = tmp_path / "mount", tmp_path / "staging"
    root.mkdir()
    life(root, staging, LocalStorage(), {})
    shutil.rmtree(staging)
    return root, staging, MountedOutput(str(root), LocalStorage())


def damage_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda d: (d / "optimizer.pt").unlink(), "optimizer.pt is missing"),
        (lambda d: (d / "optimizer.pt").write_bytes(b""), "optimizer.pt has 0 bytes, its manifest says 3,000"),
        (lambda d: damage_byte(d / "model.safetensors"), "model.safetensors is damaged"),
        (lambda d: (d / MANIFEST).unlink(), "no manifest.json: never completed"),
        (lambda d: (d / MANIFEST).write_bytes((d / MANIFEST).read_bytes()[:100]), "manifest.json is damaged"),
        (lambda d: damage_byte(d / MANIFEST), "manifest.json is damaged"),
        (lambda d: (d / MANIFEST).write_text("[]"), "manifest.json is damaged"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path, damage, reason):
    root, staging, output = published(tmp_path)
    damage(root / "checkpoint-40")
    found = newest_complete(output, staging)
    assert found.manifest.step == 30
    assert [one.path for one in found.skipped] == [str(root / "checkpoint-40")]
    assert reason in found.skipped[0].reason
    with pytest.raises(CheckpointError, match=r"checkpoint-40 holds no complete checkpoint.*checkpoint-30"):
        checkpoint_at(str(root / "checkpoint-40"), output, output, staging)
    assert checkpoint_at(str(root / "checkpoint-30"), output, output, staging).manifest.step == 30


def test_if_all_are_damaged_the_run_does_not_start_afresh(tmp_path):
    root, staging, output = published(tmp_path)
    for name in output.names():
        damage_byte(root / name / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"no checkpoint in .* can be used:(.|\n)*checkpoint-40(.|\n)*checkpoint-30"
    ):
        newest_complete(output, staging)


def test_a_first_save_that_never_ended_is_no_checkpoint(tmp_path):
    (tmp_path / "mount" / "checkpoint-10").mkdir(parents=True)
    (tmp_path / "mount" / "checkpoint-10" / STARTED).write_text("{}")
    assert newest_complete(MountedOutput(str(tmp_path / "mount"), LocalStorage()), tmp_path / "staging") is None
    (tmp_path / "mount" / "checkpoint-10" / STARTED).unlink()
    (tmp_path / "mount" / "checkpoint-10" / "trainer_state.json").write_text("{}")  # not a save of ours
    with pytest.raises(CheckpointError, match="never completed"):
        newest_complete(MountedOutput(str(tmp_path / "mount"), LocalStorage()), tmp_path / "staging")


def test_an_output_that_is_not_there_yet(tmp_path):
    assert newest_complete(MountedOutput(str(tmp_path / "no"), LocalStorage()), tmp_path / "staging") is None


def test_another_configuration_or_data_set_is_refused_with_the_difference(tmp_path):
    _, staging, output = published(tmp_path)
    found = newest_complete(output, staging)
    require_same_config(found, IDENTITY)
    require_same_data(found, IDENTITY)
    with pytest.raises(CheckpointError, match=r"learning_rate: 1\.0 in the checkpoint, 2\.0 in this run"):
        require_same_config(found, Identity({"learning_rate": 2.0}, "other", "data"))
    with pytest.raises(CheckpointError, match=r"other data: .* fingerprint new, the checkpoint says data"):
        require_same_data(found, Identity(IDENTITY.config, "hash", "new"))


# ------------------------------------------------------------------------------------------------------------ the rest


def test_local_output_renames(tmp_path):
    root, staging = tmp_path / "out", tmp_path / "out" / ".staging"
    root.mkdir()
    shelf = Shelf(LocalOutput(str(root)), staging, LIMIT, 1, IDENTITY)
    for step in STEPS:
        inode = os.stat(write_checkpoint(staging, step) / "optimizer.pt").st_ino
        shelf.seal(staging / f"save-1-{step}" / f"checkpoint-{step}")
        assert shelf.publish()
        assert os.stat(root / f"checkpoint-{step}" / "optimizer.pt").st_ino == inode
    assert sorted(shelf.output.names()) == ["checkpoint-30", "checkpoint-40"]
    assert verify_local(root / "checkpoint-40").step == 40


def test_sealing_flushes_every_file_and_both_directories(tmp_path, synced):
    seal(write_checkpoint(tmp_path, 10), 10, 1, 1, IDENTITY)
    assert len(synced) == 3 + 1 + 1 + 1  # files, their directory, the manifest, the directory that holds it now


def test_tries_that_fail_leave_one_directory_at_most(tmp_path):
    root, staging = tmp_path / "mount", tmp_path / "staging"
    root.mkdir()
    storage = FaultyStorage("copy_out", 2, "for_ever", errno.ENOSPC)
    shelf = life(root, staging, storage, {}, tries=5)
    assert len(shelf.output.names()) == 1
    storage.operation = None
    assert shelf.publish()
    assert len(shelf.output.names()) == 1
    assert verify_local(root / shelf.output.names()[0]).step == 40


def test_a_manifest_is_what_it_was(tmp_path):
    directory = write_checkpoint(tmp_path, 10)
    (directory / "below").mkdir()
    (directory / "below" / "more.bin").write_bytes(b"more")
    manifest = seal(directory, 10, 3, 1, IDENTITY)
    assert manifest.files["below/more.bin"].size == 4
    assert read_local(directory) == manifest == Manifest.from_bytes(manifest.to_bytes())
    assert json.loads((directory / MANIFEST).read_text())["step"] == 10
    with pytest.raises(Broken, match="already"):
        seal(directory, 10, 3, 1, IDENTITY)
    for position in range(0, len(manifest.to_bytes()), 7):
        flipped = bytearray(manifest.to_bytes())
        flipped[position] ^= 4
        with contextlib.suppress(Broken):
            assert Manifest.from_bytes(bytes(flipped)) == manifest  # white space
