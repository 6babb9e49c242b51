"""What a run reads besides its rows, brought from a mount to local disk first: model, tokenizer, adapter, templates.

Weights are memory-mapped by the libraries that load them, and a mapping on a mount kills the process when the daemon
dies. So their files are read once, by the helper process and with its checks, into a directory of their own under
~/.cache/axo_flash/models. They stay there: the next run looks whether size and mtime are still those on the mount.
"""

from __future__ import annotations

import json
import os
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from axo_flash.data.files import DataFile, looks_like_hub_id
from axo_flash.data.mounted import bring
from axo_flash.errors import UserError
from axo_flash.mount_io import FileInfo, MountIO
from axo_flash.mounts import covers, find_mount, real_place

if TYPE_CHECKING:
    from axo_flash.config import Config

WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt"}
# What transformers and PEFT load, the first that is there: a file, or an index of several.
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
                "adapter_model.safetensors", "adapter_model.bin")  # fmt: skip
SUBFOLDER = "additional_chat_templates"  # the only one that a tokenizer reads
RECORD = ".copied.json"  # in a local copy: name -> [size, mtime_ns on the mount, sha256]
TEMPLATE_BYTES = 1 << 20
LONGEST_PATH = 4096  # of Linux


class InputError(UserError):
    """A model, adapter or template cannot be had from where it lies."""


def local_directory(key: str, path: str, config: Config, weights: bool) -> str:
    """`path` itself, or the local copy of a directory on a mount, with or without its weights.

    A local directory, or an id on the Hub, is given back as it is. `key` of the YAML is named in errors: InputError,
    DataError if the files keep changing or the local disk is too small, MountError if the mount does not answer.
    """
    place = _on_a_mount(key, path, config)
    if place is None:
        if not os.path.isdir(path):
            _refuse_cache_on_fuse(key, path)
        return path
    from huggingface_hub.utils import WeakFileLock

    with MountIO(config.data_timeout, config.stall_timeout) as io:
        io.expect_mount(find_mount(place).mount_point)
        info = io.stat(place)
        if info is None and looks_like_hub_id(
            path
        ):  # the working directory lies on the mount, and holds no such folder
            _refuse_cache_on_fuse(key, path)
            return path
        if info is None or not info.is_dir:
            found = "a file" if info else "nothing"
            raise InputError(f"{key}: there is {found} at {path} on {find_mount(place)}; expected a directory")
        copy = _copies() / f"{os.path.basename(place)}-{sha256(place.encode()).hexdigest()[:12]}"
        copy.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(copy.with_suffix(".lock")):  # of two runs on one model the second waits for the files
            names = _names(place, io)
            _update(place, copy, {name: info for name, info in names.items() if Path(name).suffix not in WEIGHTS}, io)
            if weights:
                wanted = _weights(key, place, copy, names)
                _update(place, copy, {name: names[name] for name in wanted}, io)
            _forget(copy, set(names))
    return str(copy)


def _refuse_cache_on_fuse(key: str, path: str) -> None:
    """Raise InputError if `path` is an id on the Hub and the Hub's cache lies on a FUSE mount: it is mapped from there."""
    from huggingface_hub.constants import HF_HUB_CACHE

    mount = find_mount(real_place(HF_HUB_CACHE))
    if mount.is_fuse and looks_like_hub_id(path):
        raise InputError(
            f"{key}: {path} would be downloaded to {HF_HUB_CACHE} on {mount} and memory-mapped there, which ends the run "
            "when the mount's daemon does. Set HF_HOME to a directory on a local disk, or name the model's own directory "
            "on the mount: it is brought over first."
        )


def template_text(jinja: str | None, config: Config) -> str | None:
    """The template in chat_template_jinja: the text itself, or that of the file which it names."""
    if not jinja or "{" in jinja or len(jinja) > LONGEST_PATH:
        return jinja
    key = "chat_template_jinja"
    place = _on_a_mount(key, jinja, config)
    if place is None:
        if not Path(jinja).is_file():
            raise InputError(f"{key}: got {jinja!r}, which is neither a file nor a template (it holds no '{{')")
        return Path(jinja).read_text(encoding="utf-8")
    with MountIO(config.data_timeout, config.stall_timeout) as io:
        io.expect_mount(find_mount(place).mount_point)
        if io.stat(place) is None:
            raise InputError(f"{key}: there is no file {jinja} on {find_mount(place)}; correct the path")
        return io.read_bytes(place, TEMPLATE_BYTES).decode("utf-8")


def _on_a_mount(key: str, path: str, config: Config) -> str | None:
    """Where `path` really is, if that is a mount; InputError if it should be one and nothing is mounted there."""
    place = real_place(path)
    mount = find_mount(place)
    if mount.is_remote:
        return place
    wanted = config.data_mount and real_place(config.data_mount)
    if wanted and covers(wanted, place) and mount.mount_point != wanted:
        raise InputError(
            f"{key}: {path} lies below data_mount {wanted}, but nothing is mounted there: it would be read from {mount}. "
            "Mount it, or correct the path."
        )
    return None


def _copies() -> Path:
    """The directory of local copies, itself on a local disk."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "axo_flash"
    for root in (default, Path(tempfile.gettempdir()) / "axo_flash"):
        if not find_mount(real_place(root)).is_remote:
            return root / "models"
    raise InputError(
        f"{default} lies on {find_mount(real_place(default))}: set XDG_CACHE_HOME to a directory on a local disk."
    )


def _names(place: str, io: MountIO) -> dict[str, FileInfo]:
    """The files of a model's directory, what is hidden and other folders (checkpoints, say) left out."""
    found: dict[str, FileInfo] = {}
    for name in io.listdir(place):
        info = io.stat(os.path.join(place, name), listed=True)
        if name == SUBFOLDER and info.is_dir:
            inside = [os.path.join(name, file) for file in io.listdir(os.path.join(place, name))]
            found |= {file: io.stat(os.path.join(place, file), listed=True) for file in inside}
        elif not info.is_dir and not name.startswith("."):
            found[name] = info
    return found


def _weights(key: str, place: str, copy: Path, names: dict[str, FileInfo]) -> list[str]:
    """The files that hold the weights which will be loaded, and no others: many models carry them twice."""
    first = next((name for name in WEIGHT_FILES if name in names), None)
    if first is None:
        some = ", ".join(sorted(names)[:8]) or "nothing"
        raise InputError(f"{key}: there are no weights in {place} (none of {', '.join(WEIGHT_FILES)}); it holds {some}")
    if not first.endswith(".index.json"):
        return [first]
    wanted = sorted(set(json.loads((copy / first).read_text(encoding="utf-8"))["weight_map"].values()))
    missing = [name for name in wanted if name not in names]
    if missing:
        raise InputError(f"{key}: {place}/{first} names {', '.join(missing)}, not there: upload what is missing")
    return wanted


def _record(copy: Path) -> dict[str, list]:
    path = copy / RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _update(place: str, copy: Path, wanted: dict[str, FileInfo], io: MountIO) -> None:
    """Bring what is not there yet, or is not any more what lies on the mount."""
    record = _record(copy)
    new = [
        name for name, info in wanted.items()
        if record.get(name, [])[:2] != [info.size, info.mtime_ns] or not (copy / name).is_file()
    ]  # fmt: skip
    if not new:
        return
    mount = find_mount(place)
    files = [(DataFile(os.path.join(place, name), "part", mount), copy) for name in new]
    brought, _ = bring(files, io, more_room="set XDG_CACHE_HOME to a local disk with more room")
    for name, file in zip(new, brought, strict=True):
        _sync(file.path)  # what stays for later runs is whole after a power cut too
        (copy / name).parent.mkdir(exist_ok=True)
        os.replace(file.path, copy / name)
        record[name] = [file.size, file.mtime_ns, file.sha256]
    _sync(copy)
    _write_record(copy, record)


def _forget(copy: Path, names: set[str]) -> None:
    """Remove local files that are gone from the mount: a library would take what it finds."""
    record = _record(copy)
    gone = record.keys() - names
    for name in gone:
        (copy / name).unlink(missing_ok=True)
        del record[name]
    if gone:
        _write_record(copy, record)


def _write_record(copy: Path, record: dict[str, list]) -> None:
    unfinished = copy / f"{RECORD}.new"
    unfinished.write_text(json.dumps(record, indent=1), encoding="utf-8")
    _sync(unfinished)
    os.replace(unfinished, copy / RECORD)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
