"""Data files: which files a dataset means, that they lie on the mount that was asked for, and reading local ones.

A FUSE mount (HopsFS, s3fs, rclone, ...) punishes small random reads, a `stat` per sample and every `mmap` (SIGBUS when
the daemon dies). So a file is read once, whole, from front to back in blocks by one reader, hashed on the way and
copied to local disk; everything after that works on the local copy. Files on a local disk are read here (`fetch`); what
touches a mount, listing included, is left to the helper process of `MountIO` (see mounted.py).
"""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axo_flash import mount_worker
from axo_flash.mount_io import FileInfo, MountIO
from axo_flash.mounts import MOUNTINFO, Mount, find_mount, real_place

if TYPE_CHECKING:
    from axo_flash.config import DatasetConfig

BLOCK_BYTES = mount_worker.BLOCK_BYTES
SHOWN_BYTES = 64 << 20  # of larger files one sees how far they are read
FORMAT_OF_EXTENSION = {
    ".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow",
}  # fmt: skip
FORMAT_OF_DS_TYPE = {"json": "json", "jsonl": "json", "csv": "csv", "parquet": "parquet", "arrow": "arrow"}
# How `datasets` names splits in a directory: the keyword stands alone between separators, in a folder or file name.
SPLIT_KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
DATASETS_METADATA = {"state.json", "dataset_info.json", "dataset_dict.json"}  # written by `Dataset.save_to_disk`


class DataError(ValueError):
    """The data cannot be used as the configuration asks: says what was got, what was expected and what to do."""


@dataclass(frozen=True)
class DataFile:
    """A file to read: absolute path, record format (json, csv, parquet, arrow) and the mount that holds it."""

    path: str
    format: str
    mount: Mount


@dataclass(frozen=True)
class LocalCopy:
    """A file brought to local disk, with the hash of the bytes that were read and, from a mount, their mtime there."""

    path: Path
    sha256: str
    size: int
    mtime_ns: int | None = None


def require_mount(path: str | os.PathLike, mount_point: str, mountinfo: str = MOUNTINFO) -> None:
    """Raise DataError unless `path` lies on the file system mounted at `mount_point`; touches neither of them."""
    path, wanted = real_place(path, mountinfo), real_place(mount_point, mountinfo)
    there = find_mount(path, mountinfo)
    if there.mount_point == wanted:
        return
    if find_mount(wanted, mountinfo).mount_point == wanted:
        raise DataError(
            f"{path} does not lie on data_mount {wanted}: it lies on {there}. "
            f"Give a path under {wanted}, or correct data_mount (null switches the check off)."
        )
    raise DataError(
        f"data_mount {wanted} is not mounted: {path} would be read from {there}. Mount it first, for instance "
        f"`rclone mount REMOTE:BUCKET {wanted} --daemon` (in Hopsworks /hopsfs is mounted for every job of a project), "
        "or correct data_mount (null switches the check off)."
    )


def list_files(dataset: DatasetConfig, data_mount: str | None = None, io: MountIO | None = None) -> list[DataFile]:
    """The files that `path`, `data_files`, `ds_type` and `split` of a dataset mean, in sorted order.

    `path` is a file, a directory (searched recursively; hidden names and names with a leading `_` are left out) or a
    glob. `name` is a directory in it; `data_files` names files or globs, taken relative to `path` where that is a
    directory. A directory whose names mark splits (`train.jsonl`, `test/part-0.parquet`, ...) gives only the files of
    the split asked for, "train" by default. With `data_mount`, every path must lie on that mount; this is checked
    before anything on it is touched. What lies on a mount is listed through `io` (None: one for this call alone).

    Raises DataError if nothing is there or a format is not known, MountError if a mount does not answer.
    Returns [] if `path` is no local path at all (it may name a dataset on the Hub, see `looks_like_hub_id`).
    """
    if io is None:
        with MountIO() as io:
            return list_files(dataset, data_mount, io)
    patterns, root = _patterns(dataset)
    if data_mount:
        for pattern in patterns:
            require_mount(_fixed_part(pattern), data_mount)
        io.expect_mount(real_place(data_mount))
    if not dataset.data_files and looks_like_hub_id(dataset.path):
        place = _real_pattern(dataset.path)
        if _tree(place, io).stat(place) is None:
            return []
    paths: list[str] = []
    for pattern in map(_real_pattern, patterns):
        tree = _tree(pattern, io)
        info = tree.stat(pattern)
        if root is None and info is not None and info.is_dir:
            root = pattern
        paths += [path for path in _expand(pattern, info, tree) if path not in paths]
    if root is not None and not dataset.data_files:
        paths = _of_split(paths, root, split_name(dataset.split))
    formats = {path: _format(path, dataset.ds_type) for path in paths}
    if len(set(formats.values())) > 1:
        raise DataError(
            f"{dataset.path} holds files of several formats ({', '.join(sorted(set(formats.values())))}): "
            "name the ones to read with data_files, or give a glob such as /path/*.jsonl."
        )
    places = {path: _real_pattern(os.path.abspath(path)) for path in paths}  # a link may lead to a mount
    return [DataFile(place, formats[path], find_mount(place)) for path, place in places.items()]


def looks_like_hub_id(path: str) -> bool:
    """Whether `path` could name a dataset on the Hub: `name` or `owner/name`, without the extension of a data file."""
    return bool(re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path)) and Path(path).suffix not in FORMAT_OF_EXTENSION


def split_name(split: str | None) -> str:
    """`train[:500]` -> `train`; None -> `train`."""
    return (split or "train").partition("[")[0]


def read_blocks(path: str | os.PathLike) -> Iterator[bytes]:
    """Yield the whole file in blocks, in order, through one descriptor: every read of data comes here.

    Explicit offsets (pread), no mmap, no readahead advice (sshfs refuses it). A file that ends before the size that it
    declared raises OSError(EIO): a silent short read would be silently fewer rows.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size, offset = os.fstat(descriptor).st_size, 0
        while block := os.pread(descriptor, BLOCK_BYTES, offset):
            offset += len(block)
            yield block
        if offset != size:
            raise OSError(errno.EIO, f"read {offset} bytes of a file that declared {size}", os.fspath(path))
    finally:
        os.close(descriptor)


def fetch(file: DataFile, directory: Path) -> LocalCopy:
    """Copy `file` into the local `directory` in one sequential pass, hashing it on the way. Raises DataError."""
    digest, size = hashlib.sha256(), 0
    target = copy_path(file, directory)
    try:
        total = os.stat(file.path).st_size
        with open(target, "wb") as copy, progress_bar(file.path, total) as progress:
            for block in read_blocks(file.path):
                copy.write(block)
                digest.update(block)
                size += len(block)
                progress.update(len(block))
    except OSError as error:
        raise _explained(error, file.path) from error
    return LocalCopy(target, digest.hexdigest(), size)


def copy_path(file: DataFile, directory: Path) -> Path:
    """Where in `directory` the local copy of `file` goes."""
    name = hashlib.sha256(file.path.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return directory / f"{name}.{file.format}"


def progress_bar(path: str, total: int) -> Any:
    """A tqdm bar of bytes for reading `path`; small files have none."""
    from tqdm.auto import tqdm

    hidden = None if total > SHOWN_BYTES else True
    return tqdm(total=total, unit="B", unit_scale=True, desc=f"Reading {os.path.basename(path)}", disable=hidden)


class _Disk:
    """The looking around of MountIO, done in this process: for local disks, whose calls neither hang nor pass."""

    def stat(self, path: str) -> FileInfo | None:
        found = self._do(mount_worker.stat_path, path)
        return found and FileInfo(*found)

    def listdir(self, path: str) -> list[str]:
        return self._do(mount_worker.listdir, path)

    def walk(self, path: str) -> list[str]:
        return self._do(mount_worker.walk, path)

    def glob(self, pattern: str) -> list[tuple[str, bool]]:
        return self._do(mount_worker.glob_path, pattern)

    def _do(self, operation: Callable, path: str) -> Any:
        try:
            return operation(lambda message: None, path)
        except mount_worker.Fault as fault:
            raise _explained(OSError(fault.code, fault.text), fault.path) from fault


_DISK = _Disk()


def _tree(path: str, io: MountIO) -> MountIO | _Disk:
    """What may look at `path`: the helper process if it lies on a mount that can hang."""
    return io if find_mount(_fixed_part(path)).is_remote else _DISK


def _real_pattern(pattern: str) -> str:
    """The pattern with its fixed part as `real_place`, if that leads to a mount; as it is written if not."""
    fixed = _fixed_part(pattern)
    place = real_place(fixed)
    return place + pattern[len(fixed) :] if find_mount(place).is_remote and fixed != "." else pattern


def _patterns(dataset: DatasetConfig) -> tuple[list[str], str | None]:
    """(paths or globs that the dataset names, the directory that data_files are relative to or None)."""
    if not dataset.data_files:
        return [os.path.join(dataset.path, dataset.name) if dataset.name else dataset.path], None
    names = [dataset.data_files] if isinstance(dataset.data_files, str) else list(dataset.data_files)
    if dataset.path in FORMAT_OF_DS_TYPE:  # Axolotl's `path: json` with data_files: the path names the format
        return names, None
    return [name if os.path.isabs(name) else os.path.join(dataset.path, name) for name in names], dataset.path


def _fixed_part(pattern: str) -> str:
    """The leading part of a glob that holds no wildcard: what decides on which mount it lies."""
    while glob.has_magic(pattern):
        pattern = os.path.dirname(pattern)
    return pattern or "."


def _expand(pattern: str, info: FileInfo | None, tree: MountIO | _Disk) -> list[str]:
    """The files that one path or glob means, sorted; `info` is what lies at the pattern itself."""
    if info is not None:
        return _files_below(pattern, tree) if info.is_dir else [pattern]
    found = tree.glob(pattern) if glob.has_magic(pattern) else []
    if not found:
        raise _missing(pattern, tree)
    return [path for entry, is_dir in found for path in (_files_below(entry, tree) if is_dir else [entry])]


def _files_below(directory: str, tree: MountIO | _Disk) -> list[str]:
    """The data files in a directory: listing it costs one scandir a folder, never a stat a file."""
    paths = [path for path in tree.walk(directory) if os.path.basename(path) not in DATASETS_METADATA]
    known = [path for path in paths if Path(path).suffix in FORMAT_OF_EXTENSION]
    if not known:
        raise DataError(
            f"{directory} is a directory without data files (.{', .'.join(e[1:] for e in FORMAT_OF_EXTENSION)}); "
            f"it holds {_some(tree.listdir(directory)) or 'nothing'}. "
            "Name the files with data_files and their format with ds_type."
        )
    return known


def _of_split(paths: list[str], root: str, wanted: str) -> list[str]:
    """The paths of the split `wanted`; all of them, as "train", where no name under `root` marks a split."""
    marked: dict[str, list[str]] = {}
    for path in paths:
        words = set(re.split(r"[-._ 0-9/]+", os.path.relpath(path, root)))
        for split, keywords in SPLIT_KEYWORDS.items():
            if words & set(keywords):
                marked.setdefault(split, []).append(path)
                break
    splits = marked or {"train": paths}
    wanted = next((split for split, keywords in SPLIT_KEYWORDS.items() if wanted in keywords), wanted)
    if wanted not in splits:
        raise DataError(
            f"{root} has no split {wanted!r}, only {', '.join(sorted(splits))}: set split of this dataset to one."
        )
    return splits[wanted]


def _format(path: str, ds_type: str | None) -> str:
    if ds_type:
        if ds_type not in FORMAT_OF_DS_TYPE:
            raise DataError(f"ds_type {ds_type!r} is not supported; use one of {', '.join(FORMAT_OF_DS_TYPE)}.")
        return FORMAT_OF_DS_TYPE[ds_type]
    suffix = Path(path).suffix
    if suffix not in FORMAT_OF_EXTENSION:
        raise DataError(
            f"the format of {path} cannot be told from its extension {suffix!r}: set ds_type of this dataset to one of "
            f"{', '.join(FORMAT_OF_DS_TYPE)} (compressed files must be unpacked first)."
        )
    return FORMAT_OF_EXTENSION[suffix]


def _missing(path: str, tree: MountIO | _Disk) -> DataError:
    """`path` is not there: name the nearest directory that is, and what it holds."""
    parent = os.path.abspath(_fixed_part(path) if glob.has_magic(path) else os.path.dirname(path))
    while tree.stat(parent) is None:
        parent = os.path.dirname(parent)
    what = "no file matches" if glob.has_magic(path) else "there is no file or directory"
    holds = _some(tree.listdir(parent)) or "nothing"
    return DataError(f"{what} {path}. {parent} exists and holds {holds}. Correct datasets[].path.")


def _some(names: list[str], limit: int = 8) -> str:
    names = sorted(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _explained(error: OSError, path: str) -> DataError:
    """An OSError of the data path, with its errno by name, the mount and what to do."""
    mount, name = find_mount(path), errno.errorcode.get(error.errno or 0, str(error.errno))
    advice = {
        "EACCES": "Check the permissions of the file for this user.",
        "EPERM": "Check the permissions of the file for this user.",
        "ENOENT": "It was removed while it was being read, or its name is wrong.",
        "EISDIR": "It is a directory; name the files in it.",
        "ENOTCONN": "The daemon behind the mount has died: "
        f"unmount (`fusermount3 -uz {mount.mount_point}`) and mount again.",
    }.get(name, "Try again; if it stays, look at the file system's own log.")
    return DataError(f"cannot read {path} on {mount}: {name}, {error.strerror}. {advice}")
