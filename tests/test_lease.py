"""The lease on an output directory: refused while its owner lives, taken over when it is dead."""

import dataclasses
import json
import os
import subprocess
import sys
import time

import pytest

from axo_flash.checkpoints import CheckpointError
from axo_flash.checkpoints.lease import FOLDER, Lease, this_process
from axo_flash.checkpoints.storage import LocalStorage

FAST = {"heartbeat": 0.05, "silence": 0.5}


def new_lease(root, said=None):
    return Lease(str(root), LocalStorage(), say=(said if said is not None else []).append, **FAST)


def write_owner(root, number=1, **changes):
    folder = root / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    owner = dataclasses.asdict(dataclasses.replace(this_process(), **changes))
    (folder / f"{number:08}.json").write_text(json.dumps(owner))


def test_a_second_run_is_refused_while_the_first_lives(tmp_path):
    first = new_lease(tmp_path)
    first.acquire()
    with pytest.raises(CheckpointError, match=rf"in use by another run: process {os.getpid()} on .*another output_dir"):
        new_lease(tmp_path).acquire()
    first.release()
    second = new_lease(tmp_path)
    second.acquire()
    second.release()
    assert list((tmp_path / FOLDER).iterdir()) == []


def test_a_dead_process_of_this_machine_is_dead_at_once(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    write_owner(tmp_path, pid=process.pid)
    began = time.monotonic()
    lease = new_lease(tmp_path)
    lease.acquire()
    assert time.monotonic() - began < FAST["silence"]
    lease.release()


def test_a_pid_that_another_process_has_now_is_dead(tmp_path):
    write_owner(tmp_path, started="1")
    lease = new_lease(tmp_path)
    lease.acquire()
    lease.release()


@pytest.mark.parametrize("changes", [{"boot": "another"}, {"namespace": "pid:[1]"}])
def test_an_owner_elsewhere_is_dead_when_it_has_been_silent(tmp_path, changes):
    write_owner(tmp_path, host="elsewhere", **changes)
    said, began = [], time.monotonic()
    lease = new_lease(tmp_path, said)
    lease.acquire()
    assert time.monotonic() - began >= FAST["silence"]
    assert "in use by process" in said[0] and "elsewhere" in said[0]
    lease.release()


def test_an_owner_elsewhere_that_gives_a_sign_is_alive(tmp_path):
    write_owner(tmp_path, boot="another")
    record = tmp_path / FOLDER / "00000001.json"
    command = f"import time, shutil; time.sleep(0.2); shutil.copy('{record}', '{record.with_stem('00000002')}')"
    process = subprocess.Popen([sys.executable, "-S", "-c", command])
    with pytest.raises(CheckpointError, match="in use by another run"):
        Lease(str(tmp_path), LocalStorage(), heartbeat=0.05, silence=20).acquire()
    process.wait()


def test_a_torn_record_is_no_proof_of_death(tmp_path):
    write_owner(tmp_path)  # alive: it is this process
    (tmp_path / FOLDER / "00000002.json").write_text('{"host": "a')  # its heartbeat, in the act
    with pytest.raises(CheckpointError, match="in use by another run"):
        new_lease(tmp_path).acquire()


def test_heartbeats_go_on_and_nothing_is_written_over(tmp_path):
    lease = new_lease(tmp_path)
    lease.acquire()
    end = time.monotonic() + 20
    while lease.number < 4 and time.monotonic() < end:
        time.sleep(0.02)
    assert lease.number >= 4
    lease.release()
    assert list((tmp_path / FOLDER).iterdir()) == []


def test_a_lease_that_was_taken_over_is_known_as_lost(tmp_path):
    lease = Lease(str(tmp_path), LocalStorage(), heartbeat=60)
    lease.acquire()
    lease.require()
    write_owner(tmp_path, number=9, boot="another", host="elsewhere")
    lease.beat()
    with pytest.raises(CheckpointError, match="elsewhere"):
        lease.require()
    lease.release()
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == ["00000001.json", "00000009.json"]


def test_a_fault_of_a_heartbeat_is_noted_and_the_next_one_goes_on(tmp_path):
    class Flaky(LocalStorage):
        broken = False

        def listdir(self, path):
            if self.broken:
                raise OSError(5, "Input/output error", path)
            return super().listdir(path)

    storage = Flaky()
    lease = Lease(str(tmp_path), storage, heartbeat=60)
    lease.acquire()
    storage.broken = True
    lease.beat()
    assert "Input/output error" in lease.last_fault
    storage.broken = False
    lease.beat()
    assert lease.last_fault is None and lease.number == 2
    lease.release()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_lease_whose_heartbeats_end_is_known_as_lost(tmp_path):
    """Another run will take it: this one must not go on writing."""
    storage = LocalStorage()
    lease = Lease(str(tmp_path), storage, **FAST)
    lease.acquire()
    storage.listdir = lambda path: 1 / 0
    end = time.monotonic() + 20
    while lease.lost is None and time.monotonic() < end:
        time.sleep(0.02)
    with pytest.raises(CheckpointError, match="no longer renewed: division by zero"):
        lease.require()
    lease.release()


def test_a_damaged_record_names_nobody(tmp_path):
    lease = new_lease(tmp_path)
    lease.acquire()
    record = next((tmp_path / FOLDER).iterdir())
    record.write_text(record.read_text().replace(str(os.getpid()), str(os.getpid() + 1), 1))
    assert lease._read(lease.number) is None
    lease.release()


def test_a_heartbeat_that_failed_and_left_an_empty_file_is_not_another_run(tmp_path):
    """As an upload at close does that fails: the name is there, without content."""

    class Torn(LocalStorage):
        broken = False

        def write_new(self, path, data):
            super().write_new(path, b"" if self.broken else data)
            if self.broken:
                raise OSError(5, "Input/output error", path)

    storage = Torn()
    lease = Lease(str(tmp_path), storage, heartbeat=60)
    lease.acquire()
    storage.broken = True
    lease.beat()
    lease.beat()
    assert "Input/output error" in lease.last_fault
    storage.broken = False
    lease.beat()
    lease.require()
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == [f"{lease.number:08}.json"]
    with pytest.raises(CheckpointError, match="in use by another run: process"):
        new_lease(tmp_path).acquire()
    lease.release()
    assert list((tmp_path / FOLDER).iterdir()) == []
