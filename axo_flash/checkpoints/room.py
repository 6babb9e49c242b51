"""Whether local disk has room for the checkpoints of a run, said before its first step and not after its first save."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from axo_flash.checkpoints.resume import CheckpointError

AT_ONCE = 3  # in staging: the newest, one that is being published, and the one that is being written


def require_room(staging: Path, one: int, say: Callable[[str], None]) -> None:
    """Raise CheckpointError if not one checkpoint of `one` bytes fits below `staging`; say so if not all that may be
    there at once do."""
    place = next(folder for folder in (staging, *staging.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if free < one:
        raise CheckpointError(
            f"a checkpoint of this run takes about {gib(one)}, and the local disk of {staging} has {gib(free)} free: set "
            f"checkpoint_staging_path to a local disk with {gib(AT_ONCE * one)} (or output_dir, if that is local), make "
            "room there, or set save_strategy: no."
        )
    if free < AT_ONCE * one:
        say(
            f"the local disk of {staging} has {gib(free)} free, and checkpoints of this run may take {gib(AT_ONCE * one)} "
            f"there (up to {AT_ONCE} at a time, if output_dir is slow or away): make room, or set checkpoint_staging_path"
        )


def gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
