"""Training data on a real FUSE mount that fails: the right rows or one clear error, within the stated time."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
import golden_cases as golden

from axo_flash import mount_io
from axo_flash.config import Config, DatasetConfig
from axo_flash.data import mounted
from axo_flash.data import prepared as prepared_module
from axo_flash.data.dataset import DataError, prepare_data
from axo_flash.mount_io import MountError, MountIO
from axo_flash.mounts import find_mount, real_place

TOKENIZER = golden.tiny_tokenizer(plain=False)
ROWS = golden.instruction_rows(golden.ALPACA)
TEXT = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(mounted, "ATTRIBUTE_CACHE_SECONDS", 0.3)
    monkeypatch.setattr(mount_io, "FIRST_PAUSE", 0.02)


@pytest.fixture
def prepared(mount, tmp_path):
    """prepare_data of what lies on the mount, with the keys given."""
    (mount.backing / "train.jsonl").write_bytes(TEXT)

    def run(path="*.jsonl", **keys):
        section = DatasetConfig(path=str(mount.point / path), type="alpaca")
        keys = {"data_timeout": 6.0, "stall_timeout": 1.0, "dataset_num_proc": 1, **keys}
        keys = {"sequence_len": 256, "dataset_prepared_path": str(tmp_path / "prepared"), **keys}
        return prepare_data(Config(base_model="none", learning_rate=1e-4, datasets=[section], **keys), TOKENIZER)

    return run


def right(report):
    return report.rows_read == len(ROWS) and report.sources[0]["sha256"] == hashlib.sha256(TEXT).hexdigest()


def test_the_rows_come_and_nothing_of_the_mount_is_held(mount, prepared):
    report = prepared(data_mount=str(mount.point)).report
    assert right(report) and report.mount == [str(find_mount(mount.point))]
    assert report.transfer.bytes == len(TEXT) and report.transfer.retries == 0
    assert report.sources[0]["mtime_ns"] == (mount.backing / "train.jsonl").stat().st_mtime_ns
    assert str(mount.point) not in Path("/proc/self/maps").read_text()
    assert not any(os.path.realpath(link).startswith(str(mount.point)) for link in Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize(
    "rule",
    [
        *({"op": op, "action": "errno", "errno": "EIO"} for op in ("getattr", "readdir", "open", "read")),
        {"op": "read", "action": "errno", "errno": "ESTALE"},
        {"op": "open", "action": "errno", "errno": "ENOENT", "path": "*.jsonl"},
        {"op": "read", "action": "short"},
        {"op": "read", "action": "errno", "errno": "EIO", "skip": 1},
    ],
    ids=lambda rule: "-".join(str(value) for value in rule.values()),
)
def test_faults_that_pass_leave_no_trace_in_the_rows(mount, prepared, rule):
    mount.fail(rule | {"count": 2})
    report = prepared().report
    assert right(report) and len(mount.faults()) == 2
    assert report.transfer.retries == (0 if rule["action"] == "short" else 2)  # the next read goes on where one ended


@pytest.mark.parametrize("skip", [0, 1, 2, 5])
def test_a_cache_that_does_not_know_a_listed_file_yet(mount, prepared, skip):
    mount.fail(
        {"op": "getattr", "action": "errno", "errno": "ENOENT", "path": "/train.jsonl", "skip": skip, "count": 6}
    )
    assert right(prepared().report)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"op": "read", "errno": "EIO"}, r"copy_in of .*train.jsonl.* on .*mnt \(fuse.faults, faults\) failed: EIO.*gave up"),
        ({"op": "readdir", "errno": "EIO"}, r"failed: EIO.*gave up after \d+ tries in \d"),
        ({"op": "open", "errno": "EACCES", "path": "*.jsonl"}, r"failed: EACCES.*not tried again: 1 try.*permissions"),
        ({"op": "getattr", "errno": "ENOTCONN", "path": "*.jsonl"}, r"ENOTCONN.*gave up.*fusermount3 -uz"),
    ],
)  # fmt: skip
def test_faults_that_last_end_in_one_error(mount, prepared, rule, message):
    mount.fail(rule | {"action": "errno"})
    started = time.monotonic()
    with pytest.raises(MountError, match=message):
        prepared(data_timeout=1.0)
    assert time.monotonic() - started < 5


def test_a_hang_is_left_behind_and_over(mount, prepared):
    mount.fail({"op": "read", "action": "hang", "count": 1})
    report = prepared().report
    assert right(report) and report.transfer.stalls == 1


def test_a_daemon_that_is_frozen_and_thawed(mount, prepared):
    mount.daemon.send_signal(signal.SIGSTOP)
    threading.Timer(2.0, mount.daemon.send_signal, [signal.SIGCONT]).start()
    report = prepared(data_timeout=20.0).report
    assert right(report) and report.transfer.stalls >= 1


def test_a_hang_for_ever_ends_in_time(mount, prepared):
    mount.fail({"op": "open", "action": "hang"})
    started = time.monotonic()
    with pytest.raises(MountError, match="ETIMEDOUT, no progress for 1 s"):
        prepared(data_timeout=2.0)
    assert time.monotonic() - started < 10


def test_a_daemon_that_dies_and_comes_back(mount, prepared):
    """While nothing is mounted, the directory underneath holds other rows: they are not read."""
    mount.fail({"op": "read", "action": "crash", "count": 1})

    def remount():
        mount.daemon.wait()
        mount.stop()
        (mount.point / "train.jsonl").write_text('{"instruction": "wrong", "output": "rows"}\n')
        time.sleep(0.5)
        (mount.point / "train.jsonl").unlink()
        mount.start()

    thread = threading.Thread(target=remount)
    thread.start()
    report = prepared(data_timeout=20.0).report
    thread.join()
    assert right(report) and report.transfer.retries >= 1


def test_a_mount_that_is_not_there_is_not_the_local_disk(mount, prepared):
    mount.stop()
    (mount.point / "train.jsonl").write_bytes(TEXT)
    with pytest.raises(DataError, match=r"is not mounted: .* would be read from .*Mount it first"):
        prepared(data_mount=str(mount.point))


def test_a_size_that_was_stale_is_noticed(mount, prepared):
    """A cache of attributes says half of the size for a while: a read up to there looks whole."""
    mount.fail({"op": "getattr", "action": "half_size", "path": "/train.jsonl"})
    timer = threading.Timer(0.6, mount.fail)
    mounted.ATTRIBUTE_CACHE_SECONDS = 1.5
    timer.start()
    assert right(prepared().report)


def test_a_file_that_never_settles_is_refused(mount, prepared, monkeypatch):
    real = MountIO.copy_in

    def growing(self, *arguments, **keys):
        copied = real(self, *arguments, **keys)
        with open(mount.backing / "train.jsonl", "ab") as file:
            file.write(b"\n")
        return copied

    monkeypatch.setattr(MountIO, "copy_in", growing)
    with pytest.raises(DataError, match=r"keeps changing: read with \d+ bytes, now \d+ bytes"):
        prepared(data_timeout=0.5)


def manifest(mount, content=TEXT, more=""):
    line = f"{hashlib.sha256(content).hexdigest()}  train.jsonl\n"
    (mount.backing / "SHA256SUMS").write_text(line + more)


def test_a_flipped_bit_is_found_by_the_manifest_and_read_again(mount, prepared):
    manifest(mount)
    mount.fail({"op": "read", "action": "flip", "path": "*.jsonl", "count": 1})
    report = prepared().report
    assert right(report) and len(mount.faults()) == 1 and report.transfer.verified == 1


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        (b"other", "", r"is not what its manifest says: its sha256 is \w+ \(read 2 times, \d+ bytes\), expected"),
        (TEXT, f"{'0' * 64}  sub/gone.jsonl\n", r"SHA256SUMS names .*sub/gone.jsonl, which is not there"),
        (TEXT, "train.jsonl\n", r"SHA256SUMS, line 2: got 'train.jsonl', expected the format of sha256sum"),
    ],
)
def test_data_that_is_not_what_the_manifest_says_is_refused(mount, prepared, content, more, message):
    manifest(mount, content, more)
    with pytest.raises(DataError, match=message):
        prepared()


@pytest.mark.parametrize("names", [["more.jsonl"], ["more.jsonl", "SHA256SUMS"]], ids=["plain", "with a manifest"])
def test_a_name_that_a_listing_lacks_is_noticed(mount, prepared, names):
    """Without it there would be fewer rows, and nobody would know."""
    (mount.backing / "more.jsonl").write_bytes(TEXT)
    if "SHA256SUMS" in names:
        digest = hashlib.sha256(TEXT).hexdigest()
        manifest(mount, more=f"{digest}  more.jsonl\n")
    mount.fail(*({"op": "list", "action": "hide", "path": f"*/{name}", "count": 1} for name in names))
    report = prepared().report
    assert report.rows_read == 2 * len(ROWS) and len(mount.faults()) == len(names)


def test_a_file_that_is_never_there_twice_is_refused(mount, prepared, monkeypatch):
    """A directory that others still write to: every listing has a new name."""
    real, made = prepared_module._list, []

    def growing(config, io):
        made.append((mount.backing / f"new-{len(made)}.jsonl").write_bytes(TEXT))
        return real(config, io)

    monkeypatch.setattr(prepared_module, "_list", growing)
    with pytest.raises(DataError, match=r"keep changing: .*new-\d.jsonl came while the others were read"):
        prepared(data_timeout=0.5)


def test_too_little_local_disk_is_said_before_anything_is_read(mount, prepared, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    mount.fail({"op": "open", "action": "errno", "errno": "EIO", "path": "*.jsonl"})
    with pytest.raises(DataError, match=r"has 0.00 GiB free: set dataset_prepared_path"):
        prepared()
    assert not mount.faults()


def test_a_link_that_leads_to_the_mount_is_seen_as_one(mount, prepared, tmp_path):
    (tmp_path / "link").symlink_to(mount.point)
    assert real_place(tmp_path / "link" / "train.jsonl") == str(mount.point / "train.jsonl")
    report = prepared(path=str(tmp_path / "link" / "*.jsonl"), data_mount=str(mount.point)).report
    assert right(report) and report.transfer.files == 1


# -------------------------------------------------------------------------------------------------------- writing there
@pytest.fixture
def io():
    with MountIO(timeout=5, stall_timeout=1) as made:
        yield made


@pytest.fixture
def source(tmp_path):
    (tmp_path / "weights").write_bytes(os.urandom(5 << 20))
    return tmp_path / "weights"


@pytest.mark.parametrize(
    "rule",
    [
        *({"op": op, "action": "errno", "errno": "EIO"} for op in ("create", "write", "flush")),
        {"op": "write", "action": "lost"},
        {"op": "read", "action": "flip"},
        {"op": "read", "action": "short"},
        {"op": "flush", "action": "hang"},
    ],
    ids=lambda rule: f"{rule['op']}-{rule['action']}",
)
def test_what_is_written_is_there_whatever_failed_once(mount, io, source, rule):
    mount.fail(rule | {"count": 1})
    if rule["action"] == "hang":  # the write that hangs has to end before a new one may begin
        threading.Timer(2.0, mount.fail).start()
    copied = io.copy_out(str(source), str(mount.point / "new"))
    assert (mount.backing / "new").read_bytes() == source.read_bytes()
    assert copied.size == 5 << 20 and len(mount.faults()) == 1
    assert io.stats.retries >= (rule["action"] != "short")


def test_a_full_store_is_an_error_at_once(mount, io, source):
    mount.fail({"op": "write", "action": "errno", "errno": "ENOSPC", "skip": 3})
    with pytest.raises(MountError, match=r"copy_out of .*new.*ENOSPC.*not tried again: 1 try.*make room") as error:
        io.copy_out(str(source), str(mount.point / "new"))
    assert error.value.code == errno.ENOSPC and not error.value.passing


def test_folders_and_small_files(mount, io):
    mount.fail(*({"op": op, "action": "errno", "errno": "EIO", "count": 1} for op in ("mkdir", "unlink", "rmdir")))
    io.makedirs(str(mount.point / "a/b"))
    io.write_new(str(mount.point / "a/b/m.json"), b"{}")
    assert io.read_bytes(str(mount.point / "a/b/m.json")) == b"{}" and io.usage(str(mount.point)).total > 0
    io.remove_tree(str(mount.point / "a"))
    assert io.listdir(str(mount.point)) == [] and io.stats.retries == 3
