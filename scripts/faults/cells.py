"""The matrix: which faults, in which phase of a run, by which seed. Pure: no run is started here."""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass
from typing import Any

PHASES = ("opening data", "reading data", "writing a checkpoint", "rotating", "resuming")
# the calls of each phase, and the names that they are made on
OPENING = (("getattr", "readdir", "open"), "*/data*")
READING = (("read",), "*/data/*")
WRITING = (("create", "write", "flush", "mkdir", "open", "read", "getattr"), "*/out/[!.]*")
ROTATING = (("unlink", "rmdir", "readdir", "getattr"), "*/out/checkpoint*")
RESUMING = (("getattr", "readdir", "open", "read"), "*/out*")
CALLS = dict(zip(PHASES, (OPENING, READING, WRITING, ROTATING, RESUMING), strict=True))
OFTEN_CALLED = ("getattr", "read", "open", "create", "write", "flush", "unlink")
PATTERNS = ("some", "often", "for ever")

ERRNOS = ("EIO", "ENOTCONN", "ESTALE", "ETIMEDOUT", "EAGAIN", "EINTR", "ENOENT", "EACCES")
NO_ROOM = ("ENOSPC", "EDQUOT", "EROFS")
# kind -> the phases in which it can happen; errno kinds are errnos
ON_READS = ("reading data", "writing a checkpoint", "resuming")
EVERYWHERE = PHASES
KINDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(ERRNOS, EVERYWHERE),
    **dict.fromkeys(NO_ROOM, ("writing a checkpoint",)),
    "full": ("writing a checkpoint",),
    "delay": EVERYWHERE,
    "hang": EVERYWHERE,
    "short": ON_READS,
    "flip": ON_READS,
    "zeros": ON_READS,
    "half_size": ("opening data", "reading data", "writing a checkpoint", "resuming"),
    "hide": ("opening data", "rotating", "resuming"),
    "torn": ("writing a checkpoint",),
    "lost": ("writing a checkpoint",),
    "failed upload": ("writing a checkpoint",),
    "damaged newest": ("resuming",),
    "crash, remount": EVERYWHERE,
    "killed, remount": EVERYWHERE,
    "unmounted, remount": EVERYWHERE,
    "freeze, thaw": EVERYWHERE,
    "helper killed": EVERYWHERE,
}
KILLS = ("local output", "healthy mount", "failing mount")  # where the trainer is killed
KILLS_A_CASE = 10
# These change bytes but no length: without a hash to go by nobody can tell them, and README.md says so.
NEED_A_MANIFEST = ("flip", "zeros", "hide")


@dataclass(frozen=True)
class Case:
    """One row of the results: a cell, its seed, and what follows from it."""

    phase: str
    kind: str
    seed: int

    @property
    def key(self) -> str:
        return f"{self.phase}/{self.kind}/{self.seed}"

    @property
    def rng(self) -> random.Random:
        return random.Random(zlib.crc32(self.key.encode()))

    @property
    def pattern(self) -> str:
        """Some calls in a row, a share of all calls, or from one call on for ever."""
        return PATTERNS[self.seed % len(PATTERNS)]

    @property
    def cached(self) -> bool:
        """Whether the kernel's page cache stands before the mount, as before s3fs or rclone, or not, as at HopsFS."""
        return self.seed // len(PATTERNS) % 2 == 1

    @property
    def manifest(self) -> bool:
        """Whether a SHA256SUMS lies beside the data."""
        return self.kind in NEED_A_MANIFEST or self.rng.random() < 0.5

    @property
    def resumes(self) -> bool:
        return self.phase == "resuming"


def matrix(seeds: range, kill_cases: int) -> list[Case]:
    """All cases, seed by seed, so that an interrupted run has covered every cell as evenly as it could."""
    cases = [Case(phase, kind, seed) for seed in seeds for kind, phases in KINDS.items() for phase in phases]
    kills = [Case("killed", KILLS[number % len(KILLS)], number) for number in range(kill_cases)]
    together: list[Case] = []
    for number, case in enumerate(cases):  # the kills spread evenly among them
        together += kills[len(kills) * number // len(cases) : len(kills) * (number + 1) // len(cases)]
        together.append(case)
    return together if cases else kills


def rules(case: Case) -> list[dict[str, Any]]:
    """What the fault file system is told; [] where the fault is done to the daemon, the helper or the files."""
    if case.phase == "killed":
        rate = {"op": ["create", "write", "flush", "read", "open", "getattr", "readdir", "unlink"], "p": 0.02}
        return [rate | {"action": "errno", "errno": "EIO", "seed": case.seed}] if case.kind == "failing mount" else []
    rng = case.rng
    ops, path = CALLS[case.phase]
    rule: dict[str, Any] = {"path": path, "seed": rng.randrange(1 << 30), "action": case.kind}
    if case.kind in (*ERRNOS, *NO_ROOM):
        rule |= {"action": "errno", "errno": case.kind}
        ops = ("create", "write", "flush", "mkdir") if case.kind in NO_ROOM else ops
    elif case.kind == "failed upload":
        ops, rule = ("flush",), rule | {"action": "errno", "errno": rng.choice(("EIO", "ENOTCONN", "EAGAIN"))}
    elif case.kind in ("short", "flip", "zeros"):
        ops = ("read",)
    elif case.kind == "half_size":
        ops = ("getattr",)
    elif case.kind == "hide":
        ops = ("list",)
    elif case.kind in ("torn", "lost"):
        ops = ("write",)
    elif case.kind == "full":
        return [rule | {"op": "write", "bytes": rng.randrange(1 << 21)}]
    elif case.kind == "delay":
        rule["seconds"] = rng.choice((0.02, 0.1, 0.4))
    elif case.kind == "crash, remount":
        return [rule | {"action": "crash", "op": list(ops), "skip": rng.randrange(8), "count": 1}]
    elif case.kind not in ("hang",):
        return []
    return [rule | when(case, ops, rng)]


def when(case: Case, ops: tuple[str, ...], rng: random.Random) -> dict[str, Any]:
    """Which of the calls fail, by the pattern."""
    if case.pattern == "often":
        p = rng.uniform(0.1, 0.4)
        if case.kind in ("hang", "delay"):
            p = 0.03
        return {"op": list(ops), "p": p}
    op = rng.choice(ops)
    one = {"op": op, "skip": rng.randrange(6 if op in OFTEN_CALLED else 2)}
    if case.pattern == "for ever":
        return one
    return one | {"count": 1 if case.kind == "hang" else rng.randint(1, 4)}
