"""Which mount a path really leads to, links on local disks followed and none on a mount."""

import os

import pytest

from axo_flash import mounts
from axo_flash.mounts import Mount, covers, real_place


@pytest.mark.parametrize(("fstype", "remote"), [("fuse.hopsfs", True), ("fuse", True), ("nfs4", True), ("cifs", True),
                                                ("ext4", False), ("overlay", False), ("tmpfs", False)])  # fmt: skip
def test_what_is_remote(fstype, remote):
    assert Mount("/x", fstype, "x").is_remote is remote


def test_a_remount_is_another_identity_of_an_equal_mount():
    assert Mount("/x", "fuse", "x", "30 0:40") == Mount("/x", "fuse", "x", "31 0:41")


def test_covers():
    assert covers("/", "/a") and covers("/a", "/a") and covers("/a/", "/a/b") and not covers("/a", "/ab")


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A directory that passes for a mount, and must not be touched."""
    point = tmp_path / "mount"
    point.mkdir()
    real_islink = os.path.islink

    def islink(path):
        assert not covers(str(point), str(path)), f"{path} was touched"
        return real_islink(path)

    real = mounts.find_mount
    fuse = Mount(str(point), "fuse.test", "test")
    monkeypatch.setattr(mounts, "find_mount", lambda path, *rest: fuse if covers(str(point), path) else real(path))
    monkeypatch.setattr(mounts.os.path, "islink", islink)
    return point


def test_real_place(remote, tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "data").symlink_to("../mount/Resources")
    (tmp_path / "far").symlink_to(tmp_path / "home" / "data")
    for link in ("home/data", "far", "mount/Resources"):
        assert real_place(tmp_path / link / "a.jsonl") == str(remote / "Resources" / "a.jsonl")
    assert real_place(tmp_path / "home" / "absent") == str(tmp_path / "home" / "absent")
    monkeypatch.chdir(tmp_path / "home")
    assert real_place("data") == str(remote / "Resources")


def test_links_in_a_circle(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert real_place(tmp_path / "a" / "x") == str(tmp_path / "a" / "x")
