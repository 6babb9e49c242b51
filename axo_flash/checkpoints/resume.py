"""The newest complete checkpoint of an output directory and its staging: found, verified, brought to local disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from axo_flash.checkpoints.identity import config_differences
from axo_flash.checkpoints.manifest import MANIFEST, Broken, Identity, Manifest, read_local, verify_local
from axo_flash.checkpoints.output import CHECKPOINT, Output, Skipped
from axo_flash.checkpoints.storage import FAULTS
from axo_flash.errors import UserError


class CheckpointError(UserError):
    """A run cannot go on from, or keep, its checkpoints: what was found, and what to do."""


@dataclass(frozen=True)
class Found:
    """A verified checkpoint: where it was found, its files on local disk, and the newer ones that were passed over."""

    source: str
    local: Path
    manifest: Manifest
    skipped: tuple[Skipped, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """A checkpoint with a manifest, its files not yet looked at; `name` is None for one in staging."""

    source: str
    name: str | None
    manifest: Manifest

    @property
    def preference(self) -> tuple[tuple[int, int], bool]:
        """Newest first; of two copies of one the local one, which costs nothing to bring."""
        return self.manifest.order, self.name is None


def staged_checkpoints(staging: Path) -> Iterator[Path]:
    """Directories of staging that are named like a checkpoint; every save has a folder of its own there."""
    yield from (path for path in sorted(staging.glob("save-*/checkpoint-*")) if CHECKPOINT.fullmatch(path.name))


def survey(output: Output, staging: Path) -> tuple[list[Candidate], list[Skipped]]:
    """(what has a manifest in output and staging, newest first; the rest). A directory that cannot be listed raises."""
    complete, skipped = output.survey()
    candidates = [Candidate(output.path(name), name, manifest) for name, manifest in complete.items()]
    for path in staged_checkpoints(staging):
        try:
            candidates.append(Candidate(str(path), None, read_local(path)))
        except Broken as error:
            skipped.append(Skipped(str(path), str(error), (path / MANIFEST).exists()))
    return sorted(candidates, key=lambda one: one.preference, reverse=True), skipped


def newest_complete(output: Output, staging: Path) -> Found | None:
    """The newest checkpoint that is whole, every file verified; None if none was ever completed.

    Raises CheckpointError if there are checkpoints but none can be used, and what Storage raises if output cannot be
    listed: neither is the same as no checkpoint, and a run that silently starts afresh is a run lost.
    """
    candidates, skipped = survey(output, staging)
    for candidate in candidates:
        try:
            if candidate.name is None:
                manifest, local = verify_local(Path(candidate.source)), Path(candidate.source)
            else:
                local = output.bring(candidate.name, staging / "resume")
                manifest = verify_local(local)
        except Broken as error:
            skipped.append(Skipped(candidate.source, str(error), True))
        except FAULTS as error:
            skipped.append(Skipped(candidate.source, f"cannot be read: {error}", True))
        else:
            return Found(candidate.source, local, manifest, tuple(skipped))
    lost = [str(one) for one in skipped if one.was_complete]
    if lost:
        raise CheckpointError(
            f"no checkpoint in {output.root} can be used:\n  " + "\n  ".join(lost) + "\n"
            "Repair or remove them, or start afresh with another output_dir; without resume_from_checkpoint and "
            "auto_resume_from_checkpoints the run starts afresh beside them."
        )
    return None


def checkpoint_at(path: str, holder: Output, output: Output, staging: Path) -> Found:
    """The checkpoint at `path`, a directory in `holder`, verified; raises CheckpointError if it is not whole."""
    try:
        local = holder.bring(os.path.basename(os.path.abspath(path)), staging / "resume")
        return Found(path, local, verify_local(local))
    except (Broken, *FAULTS) as error:
        try:
            known = [candidate.source for candidate in survey(output, staging)[0]]
        except FAULTS as fault:
            known = [f"unknown: {fault}"]
        raise CheckpointError(
            f"resume_from_checkpoint: {path} holds no complete checkpoint: {error}. "
            + (f"With a manifest, newest first: {', '.join(known)}" if known else f"There is none in {output.root}")
        ) from error


def require_same_config(found: Found, run: Identity) -> None:
    """Raise CheckpointError if the checkpoint is of a run with other values in keys that change the weights."""
    different = config_differences(found.manifest.identity, run)
    if different:
        raise CheckpointError(
            f"the run cannot go on from {found.source}, which was made with another configuration:\n  "
            + "\n  ".join(different)
            + "\nRestore these values; or start afresh: another output_dir, or neither resume_from_checkpoint nor "
            "auto_resume_from_checkpoints."
        )


def require_same_data(found: Found, run: Identity) -> None:
    """Raise CheckpointError if the checkpoint is of a run on other rows."""
    before, now = found.manifest.identity, run
    if before.data == now.data:
        return
    names = sorted(before.versions.keys() | now.versions.keys())
    changed = [name for name in names if before.versions.get(name) != now.versions.get(name)]
    libraries = ", ".join(f"{name} {before.versions.get(name)} -> {now.versions.get(name)}" for name in changed)
    raise CheckpointError(
        f"the run cannot go on from {found.source}, which was trained on other data: the tokenised rows have the "
        f"fingerprint {now.data}, the checkpoint says {before.data}. The contents of the files, the tokenizer, the chat "
        f"template or a library that tokenises changed (libraries: {libraries or 'the same'}). Restore them; or start "
        "afresh: another output_dir, or neither resume_from_checkpoint nor auto_resume_from_checkpoints."
    )


def clear_staging(staging: Path) -> None:
    """Remove what a dead run left unfinished in staging; sealed checkpoints stay."""
    for path in staged_checkpoints(staging):
        if not (path / MANIFEST).exists():
            shutil.rmtree(path)
    shutil.rmtree(staging / "resume", ignore_errors=True)
    remove_empty(staging)


def remove_empty(staging: Path) -> None:
    """Remove the folders of saves and of final weights that hold nothing, and staging itself if nothing is left."""
    for folder in [*staging.glob("save-*"), *staging.glob("output-*"), staging]:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
