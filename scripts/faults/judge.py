"""What a case is held against: the rows, checkpoints and weights of a run that met no fault."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from axo_flash.checkpoints.manifest import Broken, verify_local
from stacks import STEPS, WEIGHTS, weights_digest

STATE_FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


@dataclass
class Reference:
    """An undisturbed run of a stack: batches by step, weights by step, the final ones, sizes of a checkpoint's files."""

    batches: dict[int, str]
    checkpoints: dict[int, str]
    final: str
    sizes: dict[str, int] = field(default_factory=dict)


def read_journal(path: Path) -> list[dict[str, Any]]:
    """What a run noted; a line that a SIGKILL cut short is none."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines if line.endswith("}")]


def reference_of(stack: str, output: Path, journal: Path) -> Reference:
    """From the files of an undisturbed run that kept all its checkpoints."""
    batches = {one["step"]: one["sha"] for one in read_journal(journal) if one["event"] == "batch"}
    found = {step_of(path): weights_digest(path / WEIGHTS[stack]) for path in output.glob("checkpoint-*")}
    newest = output / f"checkpoint-{STEPS}"
    sizes = {name: (newest / name).stat().st_size for name in STATE_FILES}
    return Reference(batches, found, weights_digest(output / WEIGHTS[stack]), sizes)


def step_of(path: Path) -> int:
    return int(re.match(r"checkpoint-(\d+)", path.name)[1])


class Judge:
    """Looks at what a run left and noted; every violation is a short name."""

    def __init__(self, stack: str, reference: Reference):
        self.stack, self.reference = stack, reference

    def wrong_rows(self, journal: list[dict[str, Any]]) -> bool:
        """Whether any step was trained on something else than the undisturbed run's."""
        batches = (one for one in journal if one["event"] == "batch" and one["step"] < STEPS)
        return any(self.reference.batches.get(one["step"]) != one["sha"] for one in batches)

    def is_whole(self, path: Path) -> bool:
        """Whether a checkpoint can be gone on from, with the right weights."""
        try:
            if self.stack == "axo_flash":
                verify_local(path)
            elif any((path / name).stat().st_size < size // 2 for name, size in self.reference.sizes.items()):
                return False
            return weights_digest(path / WEIGHTS[self.stack]) == self.reference.checkpoints.get(step_of(path))
        except Exception:  # whatever a damaged file makes of its reader
            return False

    def whole_steps(self, output: Path) -> list[int]:
        return sorted(step_of(path) for path in output.glob("checkpoint-*") if self.is_whole(path))

    def violations(self, output: Path, journal: list[dict[str, Any]]) -> list[str]:
        """What must never be, however a run ended: wrong rows, a saved checkpoint that is lost, a false one."""
        found = []
        if self.wrong_rows(journal):
            found.append("wrong rows")
        whole = self.whole_steps(output)
        reported = max((one["step"] for one in journal if one["event"] == "saved"), default=0)
        if any(one["step"] >= STEPS for one in journal if one["event"] == "batch"):
            return [
                *found,
                "a step too many",
            ]  # Trainer resumed at the last step; what it saves then is of no undisturbed run
        if reported and max(whole, default=0) < reported:
            found.append("checkpoint lost")
        for one in journal:
            if one["event"] == "resumed" and "sha" in one and one["sha"] != self.reference.checkpoints.get(one["step"]):
                found.append("resumed from a broken one")
        if self.stack == "axo_flash":
            found += ["false checkpoint" for path in output.glob("checkpoint-*") if self.is_false(path)]
        return sorted(set(found))

    def is_false(self, path: Path) -> bool:
        """Whether a checkpoint of ours says that it is whole, and has the wrong weights."""
        try:
            verify_local(path)
        except Broken:
            return False
        return weights_digest(path / WEIGHTS[self.stack]) != self.reference.checkpoints.get(step_of(path))

    def final_is_right(self, output: Path) -> bool:
        """Whether the weights of a run that ended well are those of the undisturbed one, to the bit."""
        try:
            return weights_digest(output / WEIGHTS[self.stack]) == self.reference.final
        except Exception:  # missing, empty or cut off
            return False


def unclear_error(log: str) -> bool:
    """Whether a run of ours ended with anything but one `error:` line that names a path and what happened to it."""
    errors = [line for line in log.splitlines() if line.startswith("error: ")]
    return len(errors) != 1 or "Traceback" in log or "/" not in errors[0]
