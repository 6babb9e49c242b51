"""manifest.json: what a complete checkpoint consists of. It is written last, so a checkpoint without it was never done."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from axo_flash.checkpoints.storage import sha256_of, sync

MANIFEST = "manifest.json"
FORMAT = 1
LARGEST = 64 << 20  # no manifest is larger: what is, is not one


class Broken(ValueError):
    """A directory that is no complete checkpoint; the message says what is wrong with it."""


@dataclass(frozen=True)
class Identity:
    """Which run a checkpoint belongs to: two runs with the same one give the same weights.

    `config` holds the keys that change the weights, `data` the fingerprint of the tokenised rows.
    """

    config: dict[str, Any]
    config_hash: str
    data: str
    versions: dict[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A complete checkpoint: its files, and where in which run it was taken.

    `generation` rises with every run on an output directory, so that the checkpoints of a run that was started again
    from an earlier step are newer than those it left behind; `save` counts the saves of one run.
    """

    step: int
    generation: int
    save: int
    identity: Identity
    files: dict[str, FileEntry]

    @property
    def order(self) -> tuple[int, int]:
        """Newer checkpoints have a larger one."""
        return self.generation, self.save

    def to_bytes(self) -> bytes:
        """As manifest.json holds it: JSON, with a hash over itself, so that a torn or flipped one is known."""
        body = {"format": FORMAT, **dataclasses.asdict(self)}
        return json.dumps({**body, "sha256": _digest(body)}, indent=1, default=str).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Read manifest.json; raises Broken if it is not whole."""
        try:
            body = json.loads(data)
            stated = body.pop("sha256")
            if body.pop("format") != FORMAT:
                raise Broken(f"{MANIFEST} is of a format that this version does not read")
            if stated != _digest({"format": FORMAT, **body}):
                raise Broken(f"{MANIFEST} is damaged (its own sha256 differs)")
            files = {name: FileEntry(**entry) for name, entry in body["files"].items()}
            return cls(body["step"], body["generation"], body["save"], Identity(**body["identity"]), files)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, Broken):
                raise
            raise Broken(f"{MANIFEST} is damaged ({error})") from error


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, default=str).encode()).hexdigest()


def seal(directory: Path, step: int, generation: int, save: int, identity: Identity) -> Manifest:
    """Make a local directory a complete checkpoint: everything fsynced, read back and hashed, the manifest last."""
    directory = Path(directory)
    files = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        name = path.relative_to(directory).as_posix()
        if name == MANIFEST:
            raise Broken(f"{directory} has a {MANIFEST} already")
        sync(path)
        files[name] = FileEntry(path.stat().st_size, sha256_of(path))
    if not files:
        raise Broken(f"{directory} holds no file")
    for folder in sorted({(directory / name).parent for name in files}):
        sync(folder)
    manifest = Manifest(step, generation, save, identity, files)
    unfinished = directory / f".{MANIFEST}"
    unfinished.write_bytes(manifest.to_bytes())
    sync(unfinished)
    os.replace(unfinished, directory / MANIFEST)
    sync(directory)
    return manifest


def read_local(directory: Path) -> Manifest:
    """The manifest of a local directory, its files not looked at; raises Broken."""
    try:
        return Manifest.from_bytes((Path(directory) / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise Broken(f"no {MANIFEST}: never completed") from None
    except OSError as error:
        raise Broken(f"{MANIFEST} cannot be read ({error.strerror})") from error


def verify_local(directory: Path) -> Manifest:
    """The manifest of a local directory all of whose files match it, by size and sha256; raises Broken."""
    manifest = read_local(directory)
    for name, entry in manifest.files.items():
        path = Path(directory) / name
        try:
            size = path.stat().st_size
            check_file(name, entry, size, sha256_of(path) if size == entry.size else "")
        except FileNotFoundError:
            raise Broken(f"{name} is missing") from None
        except OSError as error:
            raise Broken(f"{name} cannot be read ({error.strerror})") from error
    return manifest


def check_file(name: str, entry: FileEntry, size: int, sha256: str) -> None:
    """Raise Broken unless a file is as the manifest says."""
    if size != entry.size:
        raise Broken(f"{name} has {size:,} bytes, its manifest says {entry.size:,}")
    if sha256 != entry.sha256:
        raise Broken(f"{name} is damaged: its sha256 is not the manifest's")
