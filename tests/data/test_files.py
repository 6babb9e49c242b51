"""Mounts, file lists and reading: what is found, what is refused and how, and how the file is touched."""

from __future__ import annotations

import errno
import hashlib
import os

import pytest

from axo_flash.config import DatasetConfig
from axo_flash.data import files
from axo_flash.data.files import DataError, DataFile, Mount, fetch, find_mount, list_files, require_mount

MOUNTINFO = r"""22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda rw
40 22 0:35 / /hopsfs rw,nosuid shared:20 master:3 - fuse.hopsfs hopsfs rw,user_id=0
41 22 0:36 / /mnt/my\040data rw - fuse.rclone remote:bu\040cket rw
42 22 0:37 / /mnt rw - tmpfs tmpfs rw
43 40 0:38 / /hopsfs/Models rw - fuse.s3fs s3fs rw
44 22 0:39 / /mnt rw - nfs4 server:/export rw
45 22 0:40 / /mnt/back\134slash rw - xfs /dev/sdb rw
"""


@pytest.fixture
def mountinfo(tmp_path):
    path = tmp_path / "mountinfo"
    path.write_text(MOUNTINFO)
    return str(path)


@pytest.mark.parametrize(
    ("path", "mount"),
    [
        ("/home/x", Mount("/", "ext4", "/dev/vda")),
        ("/hopsfs/Resources/train.jsonl", Mount("/hopsfs", "fuse.hopsfs", "hopsfs")),
        ("/hopsfs/Models/x", Mount("/hopsfs/Models", "fuse.s3fs", "s3fs")),
        ("/hopsfs", Mount("/hopsfs", "fuse.hopsfs", "hopsfs")),
        ("/hopsfsx/y", Mount("/", "ext4", "/dev/vda")),
        ("/mnt/my data/a", Mount("/mnt/my data", "fuse.rclone", "remote:bu cket")),
        ("/mnt/other", Mount("/mnt", "nfs4", "server:/export")),
        ("/mnt/back\\slash/x", Mount("/mnt/back\\slash", "xfs", "/dev/sdb")),
        ("/hopsfs/../home", Mount("/", "ext4", "/dev/vda")),
    ],
)
def test_find_mount(mountinfo, path, mount):
    assert find_mount(path, mountinfo) == mount


def test_fuse_is_told_by_the_type():
    assert (
        Mount("/", "fuse", "x").is_fuse
        and Mount("/", "fuse.hopsfs", "x").is_fuse
        and Mount("/", "fuseblk", "x").is_fuse
    )
    assert not Mount("/", "ext4", "x").is_fuse


def test_this_machines_own_mounts_are_read():
    mount = find_mount("/proc/self/status")
    assert (mount.mount_point, mount.fstype) == ("/proc", "proc")


def test_no_mountinfo_means_nothing_is_known(tmp_path):
    assert find_mount("/x", str(tmp_path / "absent")).fstype == "unknown"


def test_require_mount(mountinfo):
    require_mount("/hopsfs/Resources/a.jsonl", "/hopsfs", mountinfo)
    require_mount("/hopsfs/Resources/a.jsonl", "/hopsfs/", mountinfo)
    with pytest.raises(
        DataError, match=r"data_mount /data is not mounted: /data/a.jsonl would be read from / \(ext4.*rclone mount"
    ):
        require_mount("/data/a.jsonl", "/data", mountinfo)
    with pytest.raises(DataError, match=r"does not lie on data_mount /hopsfs: it lies on / \(ext4"):
        require_mount("/data/a.jsonl", "/hopsfs", mountinfo)


def test_data_mount_is_checked_before_anything_is_touched(tmp_path, monkeypatch):
    def touched(*_):
        raise AssertionError("the path was touched")

    monkeypatch.setattr(files.os, "stat", touched)
    monkeypatch.setattr(files.os, "scandir", touched)
    with pytest.raises(DataError, match="is not mounted"):
        list_files(DatasetConfig(path=str(tmp_path / "sub" / "a.jsonl")), data_mount=str(tmp_path / "sub"))


def make(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}\n")


def listed(folder, **dataset) -> list[str]:
    dataset.setdefault("path", str(folder))
    return [os.path.relpath(file.path, folder) for file in list_files(DatasetConfig(**dataset))]


def test_a_file_a_directory_a_glob(tmp_path):
    make(tmp_path, "b.jsonl", "a.jsonl", "sub/c.jsonl", ".hidden.jsonl", "_SUCCESS", "_tmp/x.jsonl", "notes.txt")
    assert listed(tmp_path, path=str(tmp_path / "b.jsonl")) == ["b.jsonl"]
    assert listed(tmp_path) == ["a.jsonl", "b.jsonl", "sub/c.jsonl"]
    assert listed(tmp_path, path=f"{tmp_path}/*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert listed(tmp_path, path=f"{tmp_path}/[!_]*/**/*.jsonl") == ["sub/c.jsonl"]
    assert listed(tmp_path, path=f"{tmp_path}/su*") == ["sub/c.jsonl"]
    assert listed(tmp_path, data_files=["sub/c.jsonl", "a.jsonl"]) == ["sub/c.jsonl", "a.jsonl"]
    assert listed(tmp_path, data_files="*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert listed(tmp_path, name="sub") == ["sub/c.jsonl"]
    assert listed(tmp_path, path="json", data_files=str(tmp_path / "a.jsonl")) == ["a.jsonl"]


def test_a_name_with_brackets_is_a_file_first(tmp_path):
    make(tmp_path, "a[1].jsonl")
    assert listed(tmp_path, path=str(tmp_path / "a[1].jsonl")) == ["a[1].jsonl"]


def test_splits_of_a_directory_are_kept_apart(tmp_path):
    make(tmp_path, "train-0.jsonl", "train-1.jsonl", "test.jsonl", "data/validation/x.jsonl", "contest.jsonl")
    assert listed(tmp_path) == ["train-0.jsonl", "train-1.jsonl"]
    assert listed(tmp_path, split="train[:10]") == ["train-0.jsonl", "train-1.jsonl"]
    assert listed(tmp_path, split="test") == ["test.jsonl"]
    assert listed(tmp_path, split="validation") == ["data/validation/x.jsonl"]
    make(tmp_path, "plain/part-0.jsonl")
    with pytest.raises(DataError, match=r"has no split 'test', only train"):
        listed(tmp_path / "plain", split="test")


def test_the_folder_above_does_not_mark_a_split(tmp_path):
    make(tmp_path, "test/rows.jsonl")
    assert listed(tmp_path / "test") == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("name", "ds_type", "expected"),
    [("a.json", None, "json"), ("a.jsonl", None, "json"), ("a.ndjson", None, "json"), ("a.csv", None, "csv"),
     ("a.parquet", None, "parquet"), ("a.arrow", None, "arrow"), ("a.txt", "json", "json"), ("a", "csv", "csv"),
     ("a.json", "jsonl", "json")],
)  # fmt: skip
def test_format_by_ds_type_or_extension(tmp_path, name, ds_type, expected):
    make(tmp_path, name)
    assert list_files(DatasetConfig(path=str(tmp_path / name), ds_type=ds_type))[0].format == expected


@pytest.mark.parametrize(
    ("names", "dataset", "message"),
    [
        (["a.jsonl"], {"path": "b.jsonl"}, r"there is no file or directory .*/b.jsonl. .* exists and holds a.jsonl"),
        (
            ["a.jsonl"],
            {"path": "x/y/b.jsonl"},
            r"there is no file or directory .*/x/y/b.jsonl. .* exists and holds a.jsonl",
        ),
        (["a.jsonl"], {"path": "*.csv"}, r"no file matches .*\*.csv. .* exists and holds a.jsonl"),
        (["a.txt"], {"path": ""}, r"is a directory without data files .*; it holds a.txt"),
        (["a.txt"], {"path": "a.txt"}, r"cannot be told from its extension '.txt': set ds_type"),
        (["a.json.gz"], {"path": "a.json.gz"}, r"extension '.gz': .* unpacked"),
        (["a.json", "b.csv"], {"path": ""}, r"several formats \(csv, json\)"),
        (["a.json"], {"path": "a.json", "ds_type": "xml"}, r"ds_type 'xml' is not supported; use one of json"),
    ],
)
def test_wrong_paths_give_one_clear_error(tmp_path, names, dataset, message):
    make(tmp_path, *names)
    with pytest.raises(DataError, match=message):
        list_files(DatasetConfig(**dataset | {"path": os.path.join(tmp_path, dataset["path"])}))


def test_a_name_that_could_be_on_the_hub_is_left_to_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert list_files(DatasetConfig(path="tatsu-lab/alpaca")) == []
    make(tmp_path, "tatsu-lab/alpaca/rows.jsonl")
    assert len(list_files(DatasetConfig(path="tatsu-lab/alpaca"))) == 1
    with pytest.raises(DataError, match="there is no file"):
        list_files(DatasetConfig(path="data/train.jsonl"))


def test_fetch_copies_and_hashes_in_order_through_one_reader(tmp_path, monkeypatch):
    content = os.urandom(9 << 20)
    source = tmp_path / "a.jsonl"
    source.write_bytes(content)
    (tmp_path / "local").mkdir()
    opened, reads = [], []
    real_open, real_pread = os.open, os.pread
    monkeypatch.setattr(files.os, "open", lambda path, *args: opened.append(os.fspath(path)) or real_open(path, *args))
    monkeypatch.setattr(files.os, "pread", lambda fd, n, at: reads.append((n, at)) or real_pread(fd, n, at))
    copy = fetch(DataFile(str(source), "json", find_mount(source)), tmp_path / "local")
    assert copy.sha256 == hashlib.sha256(content).hexdigest() and copy.size == len(content)
    assert copy.path.read_bytes() == content
    assert opened == [str(source)]
    assert reads == [(files.BLOCK_BYTES, at) for at in range(0, (9 << 20) + 1, files.BLOCK_BYTES)]


def test_a_short_read_is_an_error(tmp_path, monkeypatch):
    source = tmp_path / "a.jsonl"
    source.write_bytes(b"x" * 100)
    real = os.pread
    monkeypatch.setattr(files.os, "pread", lambda fd, n, at: real(fd, n, at)[:40] if at == 0 else b"")
    with pytest.raises(DataError, match="EIO, read 40 bytes of a file that declared 100"):
        fetch(DataFile(str(source), "json", find_mount(source)), tmp_path)


@pytest.mark.parametrize(
    ("code", "advice"),
    [(errno.ENOTCONN, "daemon behind the mount has died"), (errno.EACCES, "permissions"), (errno.EIO, "own log")],
)
def test_read_errors_name_path_mount_errno_and_advice(tmp_path, monkeypatch, code, advice):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    source = tmp_path / "a.jsonl"
    source.write_bytes(b"x")
    monkeypatch.setattr(files.os, "pread", fail)
    with pytest.raises(DataError, match=f"cannot read {source} on .*: {errno.errorcode[code]}.*{advice}"):
        fetch(DataFile(str(source), "json", find_mount(source)), tmp_path)
