"""Data files on mounted paths: which mount holds a path, which files a dataset means, and the one way to read them.

A FUSE mount (HopsFS, s3fs, rclone, ...) punishes small random reads, a `stat` per sample and every `mmap` (SIGBUS when
the daemon dies). So a file is read once, whole, from front to back in 4 MiB blocks by one reader (`read_blocks`),
hashed on the way and copied to local disk (`fetch`); everything after that works on the local copy.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from axo_flash.config import DatasetConfig

BLOCK_BYTES = 4 << 20
MOUNTINFO = "/proc/self/mountinfo"
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
class Mount:
    """One line of mountinfo: where a file system is mounted, its type (`fuse.hopsfs`, `ext4`, ...) and its source."""

    mount_point: str
    fstype: str
    source: str

    @property
    def is_fuse(self) -> bool:
        return self.fstype.startswith("fuse")

    def __str__(self) -> str:
        return f"{self.mount_point} ({self.fstype}, {self.source})"


@dataclass(frozen=True)
class DataFile:
    """A file to read: absolute path, record format (json, csv, parquet, arrow) and the mount that holds it."""

    path: str
    format: str
    mount: Mount


@dataclass(frozen=True)
class LocalCopy:
    """What `fetch` left on local disk, with the hash of the bytes that were read."""

    path: Path
    sha256: str
    size: int


def find_mount(path: str | os.PathLike, mountinfo: str = MOUNTINFO) -> Mount:
    """The mount that holds `path`, by the longest mount point that is a prefix; never touches `path` itself.

    The path is taken as written (made absolute, `..` folded): following symbolic links would mean touching the mount.
    """
    path, best = os.path.abspath(path), Mount("", "unknown", "unknown")
    try:
        with open(mountinfo, encoding="utf-8", errors="surrogateescape") as lines:
            for line in lines:
                # "36 35 98:0 /root /mount/point options [optional fields ...] - fstype source options": proc(5)
                left, _, right = line.rstrip("\n").partition(" - ")
                mount_point, (fstype, source) = _unescape(left.split(" ")[4]), right.split(" ")[:2]
                covers = path == mount_point or path.startswith(mount_point.rstrip("/") + "/")
                if covers and len(mount_point) >= len(
                    best.mount_point
                ):  # >=: of two mounts on one point the later hides
                    best = Mount(mount_point, fstype, _unescape(source))
    except FileNotFoundError:  # not Linux: nothing is known about mounts
        return Mount("/", "unknown", "unknown")
    return best


def require_mount(path: str | os.PathLike, mount_point: str, mountinfo: str = MOUNTINFO) -> None:
    """Raise DataError unless `path` lies on the file system mounted at `mount_point`; touches neither of them."""
    path, wanted = os.path.abspath(path), os.path.abspath(mount_point)
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


def list_files(dataset: DatasetConfig, data_mount: str | None = None) -> list[DataFile]:
    """The files that `path`, `data_files`, `ds_type` and `split` of a dataset mean, in sorted order.

    `path` is a file, a directory (searched recursively; hidden names and names with a leading `_` are left out) or a
    glob. `name` is a directory in it; `data_files` names files or globs, taken relative to `path` where that is a
    directory. A directory whose names mark splits (`train.jsonl`, `test/part-0.parquet`, ...) gives only the files of
    the split asked for, "train" by default. With `data_mount`, every path must lie on that mount; this is checked
    before anything on it is touched.

    Raises DataError if nothing is there or a format is not known. Returns [] if `path` is no local path at all (it may
    name a dataset on the Hub, see `looks_like_hub_id`).
    """
    patterns, root = _patterns(dataset)
    if data_mount:
        for pattern in patterns:
            require_mount(_fixed_part(pattern), data_mount)
    if not dataset.data_files and looks_like_hub_id(dataset.path) and not _exists(dataset.path):
        return []
    paths: list[str] = []
    for pattern in patterns:
        found = _expand(pattern)
        if root is None and os.path.isdir(pattern):
            root = pattern
        paths += [path for path in found if path not in paths]
    if root is not None and not dataset.data_files:
        paths = _of_split(paths, root, split_name(dataset.split))
    formats = {path: _format(path, dataset.ds_type) for path in paths}
    if len(set(formats.values())) > 1:
        raise DataError(
            f"{dataset.path} holds files of several formats ({', '.join(sorted(set(formats.values())))}): "
            "name the ones to read with data_files, or give a glob such as /path/*.jsonl."
        )
    return [DataFile(os.path.abspath(path), formats[path], find_mount(path)) for path in paths]


def looks_like_hub_id(path: str) -> bool:
    """Whether `path` could name a dataset on the Hub: `name` or `owner/name`, without the extension of a data file."""
    return bool(re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path)) and Path(path).suffix not in FORMAT_OF_EXTENSION


def split_name(split: str | None) -> str:
    """`train[:500]` -> `train`; None -> `train`."""
    return (split or "train").partition("[")[0]


def read_blocks(path: str | os.PathLike) -> Iterator[bytes]:
    """Yield the whole file in blocks of 4 MiB, in order, through one descriptor: every read of data comes here.

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
    from tqdm.auto import tqdm

    digest, size = hashlib.sha256(), 0
    name = hashlib.sha256(file.path.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    target = directory / f"{name}.{file.format}"
    try:
        total = os.stat(file.path).st_size
        with (
            open(target, "wb") as copy,
            tqdm(total=total, unit="B", unit_scale=True, desc=f"Reading {os.path.basename(file.path)}",
                 disable=None if total > 16 * BLOCK_BYTES else True) as progress,
        ):  # fmt: skip
            for block in read_blocks(file.path):
                copy.write(block)
                digest.update(block)
                size += len(block)
                progress.update(len(block))
    except OSError as error:
        raise _explained(error, file.path) from error
    return LocalCopy(target, digest.hexdigest(), size)


def _unescape(field: str) -> str:
    """mountinfo writes space, tab, newline and backslash as octal: `\\040` is a space."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


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


def _exists(path: str) -> bool:
    """os.stat, and not os.path.exists, which answers False when the daemon behind a mount has died."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise _explained(error, path) from error
    return True


def _expand(pattern: str) -> list[str]:
    """The files that one path or glob means, sorted."""
    if _exists(pattern):
        return _files_below(pattern)
    found = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else []
    if not found:
        raise _missing(pattern)
    return [path for entry in found for path in _files_below(entry)]


def _files_below(path: str) -> list[str]:
    """`path` itself, or the data files in the directory: listing it costs one scandir a folder, never a stat a file."""
    try:
        if not stat.S_ISDIR(os.stat(path).st_mode):
            return [path]
        known = sorted(name for name in _walk(path) if Path(name).suffix in FORMAT_OF_EXTENSION)
    except OSError as error:
        raise _explained(error, path) from error
    if not known:
        raise DataError(
            f"{path} is a directory without data files (.{', .'.join(e[1:] for e in FORMAT_OF_EXTENSION)}); "
            f"it holds {_some(os.listdir(path)) or 'nothing'}. "
            "Name the files with data_files and their format with ds_type."
        )
    return known


def _walk(directory: str) -> Iterator[str]:
    def fail(error: OSError) -> None:
        raise error

    for folder, folders, names in os.walk(directory, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith((".", "_"))]
        for name in names:
            if not name.startswith((".", "_")) and name not in DATASETS_METADATA:
                yield os.path.join(folder, name)


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


def _missing(path: str) -> DataError:
    """`path` is not there: name the nearest directory that is, and what it holds."""
    parent = os.path.abspath(_fixed_part(path) if glob.has_magic(path) else os.path.dirname(path))
    while not _exists(parent):
        parent = os.path.dirname(parent)
    what = "no file matches" if glob.has_magic(path) else "there is no file or directory"
    holds = _some(os.listdir(parent)) or "nothing"
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
