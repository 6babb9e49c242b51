"""From listing to local copies with every n-th system call on the mount failing: the right bytes, or one clear error."""

from __future__ import annotations

import errno
import hashlib
import os

import pytest
from mount_faults import FaultyOS, InlineHelper

from axo_flash import mount_io, mount_worker, mounts
from axo_flash.config import DatasetConfig
from axo_flash.data import files, mounted
from axo_flash.data.files import DataError, list_files
from axo_flash.data.mounted import bring
from axo_flash.mount_io import MountError, MountIO
from axo_flash.mounts import Mount

CONTENTS = {"a.jsonl": b'{"a": 1}\n' * 500_000, "sub/b.jsonl": b'{"b": 2}\n', "c.jsonl": b""}


@pytest.fixture
def mount(tmp_path, monkeypatch):
    """A directory that passes for a FUSE mount, with data and a manifest of one file."""
    point = tmp_path / "mount"
    (point / "sub").mkdir(parents=True)
    (tmp_path / "local").mkdir()
    for name, content in CONTENTS.items():
        (point / name).write_bytes(content)
    (point / "SHA256SUMS").write_text(f"# made by hand\n{hashlib.sha256(CONTENTS['a.jsonl']).hexdigest()} *./a.jsonl\n")
    real = mounts.find_mount

    def find(path, *rest):
        path = os.path.abspath(path)
        return Mount(str(point), "fuse.test", "test", "1") if mounts.covers(str(point), path) else real(path, *rest)

    for module in (mounts, mount_io, files):
        monkeypatch.setattr(module, "find_mount", find)
    monkeypatch.setattr(mounted, "ATTRIBUTE_CACHE_SECONDS", 0.001)
    monkeypatch.setattr(mount_io, "FIRST_PAUSE", 0.0005)
    return point


def read(mount, timeout):
    """(path -> bytes of the local copies, transfer)."""
    io = MountIO(timeout, start_helper=InlineHelper)
    found = list_files(DatasetConfig(path=str(mount / "**/*.jsonl")), str(mount), io)
    local = mount.parent / "local"
    copies, transfer = bring([(file, local) for file in found], io)
    assert all(hashlib.sha256(copy.path.read_bytes()).hexdigest() == copy.sha256 for copy in copies)
    return {
        os.path.relpath(file.path, mount): copy.path.read_bytes() for file, copy in zip(found, copies, strict=True)
    }, transfer


def test_without_a_fault(mount):
    contents, transfer = read(mount, 5.0)
    assert contents == CONTENTS and (transfer.files, transfer.verified, transfer.retries) == (3, 1, 0)


@pytest.mark.parametrize("forever", [False, True], ids=["once", "for ever"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOTCONN, errno.EACCES])
def test_the_nth_call_fails(mount, monkeypatch, code, forever):
    n = faults = 0
    while True:
        n += 1
        faulty = FaultyOS(mount, n, code, forever)
        monkeypatch.setattr(mount_worker, "os", faulty)
        try:
            contents, transfer = read(mount, 0.005 if forever else 5.0)
        except MountError as error:
            assert (forever or code == errno.EACCES) and error.code == code and error.passing == (code != errno.EACCES)
        else:
            assert contents == CONTENTS and transfer.retries == faulty.faults
            assert not (faulty.faults and code == errno.EACCES)
        monkeypatch.setattr(mount_worker, "os", os)
        faults += faulty.faults
        if not faulty.faults:
            break
    assert n > 30 and faults >= n - 1


def test_data_that_is_gone_after_it_was_listed(mount, monkeypatch):
    real = MountIO.walk
    monkeypatch.setattr(MountIO, "walk", lambda io, path: [*real(io, path), str(mount / "gone.jsonl")])
    io = MountIO(0.01, start_helper=InlineHelper)
    found = list_files(DatasetConfig(path=str(mount)), None, io)
    with pytest.raises(DataError, match=r"gone.jsonl was listed and is not there any more"):
        bring([(file, mount.parent / "local") for file in found], io)
