"""One case from its start to its verdict: the files, the mount, the run, what is done to it meanwhile, and after."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import stacks
from cells import KILLS_A_CASE, Case, rules
from judge import Judge, Reference, read_journal, reference_of, unclear_error
from stacks import STEPS, in_a_child, run_axo_flash, run_stock

TESTS = Path(__file__).parents[2] / "tests"
sys.path += [str(TESTS), str(TESTS / "mounts")]
from fault_mount import FaultMount, NoMount  # noqa: E402
from tiny_run import write_yaml  # noqa: E402

# Seconds that a run may take. Of ours the stated timeouts: for each of lease, data, search and begin data_timeout at
# most, in the search once a checkpoint; checkpoint_timeout; the steps themselves on a busy machine.
LIMIT = {"axo_flash": 90.0, "stock": 20.0}
HANG = "hang"
DECOY = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
FILES = ("part-0.jsonl", "part-1.jsonl", "part-2.jsonl")
KEYS = {
    "max_steps": STEPS, "save_strategy": None, "save_steps": stacks.SAVE_STEPS, "auto_resume_from_checkpoints": True,
    "lora_dropout": 0.1, "val_set_size": 0, "sequence_len": 128, "data_timeout": stacks.DATA_TIMEOUT,
    "stall_timeout": stacks.STALL_TIMEOUT, "checkpoint_timeout": stacks.CHECKPOINT_TIMEOUT,
    "preemption_timeout": stacks.PREEMPTION_TIMEOUT,
}  # fmt: skip


@dataclasses.dataclass
class Verdict:
    """What became of a case. `end`: right, error, wrong, killed by signal N, hang, traceback; `after`: the same of the
    run after it, on a mount that is well again ("" where none was needed)."""

    end: str = ""
    after: str = ""
    violations: list[str] = dataclasses.field(default_factory=list)
    faults: int = 0
    kills: int = 0
    killed_in: dict[str, int] = dataclasses.field(default_factory=dict)
    runs: int = 0
    seconds: float = 0.0
    detail: str = ""


class Bench:
    """The mounts and files of one worker, and the reference of its stack."""

    def __init__(self, stack: str, folder: Path):
        self.stack, self.folder = stack, folder
        self.mounts = {cached: FaultMount.below(folder / f"mount-{cached}", cached) for cached in (False, True)}
        self.mount = self.mounts[False]
        write_yaml(folder)  # model and data
        lines = (folder / "chats.jsonl").read_text().splitlines(keepends=True)
        self.content = {name: "".join(lines[index::3]) for index, name in enumerate(FILES)}
        self.judge: Judge | None = None
        self.underneath = False  # a run wrote to the local directory that a mount had hidden

    def prepare(self) -> None:
        """The undisturbed run, on a mount without faults; its checkpoints are what `resuming` starts with."""
        self.use(False)
        case = Place(self, "undisturbed", manifest=True)
        code = self.run(case, Case("none", "none", 0), [])[0]
        if code != 0:
            raise SystemExit(f"the undisturbed {self.stack} run failed ({code}):\n{case.log.read_text()}")
        self.reference: Reference = reference_of(self.stack, case.output, case.journal)
        self.judge = Judge(self.stack, self.reference)
        self.saved = self.folder / "saved"
        shutil.copytree(case.output, self.saved)
        for path in self.saved.iterdir():
            if path.name not in ("checkpoint-2", "checkpoint-4"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def use(self, cached: bool) -> None:
        """The mount with or without a page cache, up, without rules and faults."""
        self.mount = self.mounts[cached]
        self.mount.fail()
        (self.mount.folder / "log").unlink(missing_ok=True)
        if self.mount.daemon is None or self.mount.daemon.poll() is not None:
            self.remount()

    def remount(self) -> None:
        self.mount.detach()
        for again in range(20):
            self.underneath |= any(self.mount.point.glob("*/out"))
            for place in self.mount.point.iterdir():  # decoys, and what a run wrote to the local disk underneath
                shutil.rmtree(place, ignore_errors=True)
            try:
                self.mount.start()
                break
            except NoMount:  # the run has written there since
                if again == 19:
                    raise

    def close(self) -> None:
        for mount in self.mounts.values():
            mount.stop()

    # --------------------------------------------------------------------------------------------------------- runs
    def start(self, place: Place, case: Case) -> int:
        """Fork a run of the stack; its pid."""
        limit = 1 if case.phase == "rotating" else 9 if case.phase == "none" else 2
        if self.stack == "axo_flash":
            yaml = place.write_yaml(limit)
            work = functools.partial(run_axo_flash, yaml, place.journal, keep_all=case.phase == "none")
        else:
            options = {"model": str(self.folder / "tiny-llama"), "data": f"{place.data_seen}/*.jsonl", "limit": limit,
                       "output": str(place.output_seen), "cache": str(place.folder / "datasets")}  # fmt: skip
            work = functools.partial(run_stock, options, place.journal)
        return in_a_child(work, place.log, place.folder / "cache")

    def run(self, place: Place, case: Case, deeds: list[tuple[float, Callable[[], None]]]) -> tuple[int | str, float]:
        """Start a run and wait for it, doing what is to be done to the mount at its times; (exit code, seconds)."""
        started = time.monotonic()
        pid = self.start(place, case)
        todo = sorted(deeds, key=lambda deed: deed[0])
        died: float | None = None
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            now = time.monotonic() - started
            if done:
                return os.waitstatus_to_exitcode(status), now
            while todo and todo[0][0] <= now:
                todo.pop(0)[1]()
            if self.mount.daemon.poll() is not None and not todo:
                died = now if died is None else died
                if now - died > 0.5:
                    if case.kind == "crash, remount":
                        self.mount.fail()  # a new daemon counts from 0, and would die again at every start
                    self.remount()
                    died = None
            if now > LIMIT[self.stack]:
                self.mount.fail()  # a call that hangs is not to be killed
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                self.mount.daemon.send_signal(signal.SIGCONT)
                os.waitpid(pid, 0)
                return HANG, now
            time.sleep(0.02)

    def deeds(self, case: Case, place: Place) -> list[tuple[float, Callable[[], None]]]:
        """What is done to the daemon or the helper, beside the rules: (seconds from the start, what)."""
        rng = random.Random(case.key)
        moment = {"opening data": (0.0, 0.3), "reading data": (0.1, 0.6), "resuming": (0.0, 0.8)}
        at = rng.uniform(*moment.get(case.phase, (0.8, 2.5)))
        if case.kind == "freeze, thaw":
            thaw = at + rng.uniform(1.2, 2.5)
            return [(at, lambda: self.signal(signal.SIGSTOP)), (thaw, lambda: self.signal(signal.SIGCONT))]
        if case.kind == "killed, remount":
            return [(at, lambda: self.signal(signal.SIGKILL))]  # `run` mounts it again
        if case.kind == "unmounted, remount":
            return [(at, lambda: self.unmount(place)), (at + rng.uniform(0.5, 1.5), self.remount)]
        if case.kind == "hang" and case.pattern == "often":
            return [(rng.uniform(3.0, 5.0), self.mount.fail)]
        if case.kind == "helper killed":
            return [(at + 0.15 * number, self.kill_helper) for number in range(4)]
        return []

    def signal(self, number: int) -> None:
        self.injected("daemon", signal.Signals(number).name)
        self.mount.daemon.send_signal(number)

    def injected(self, what: str, how: str) -> None:
        """Faults that the fault file system does not make itself are counted with its own."""
        if how != "SIGCONT":
            with open(self.mount.folder / "log", "a") as log:
                log.write(f"{what} {how}\n")

    def unmount(self, place: Place) -> None:
        """Nothing is mounted: the local directory underneath holds other rows, which nobody is to read."""
        self.injected("daemon", "unmounted")
        self.mount.detach()
        decoy = self.mount.point / place.name / "data"
        decoy.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            (decoy / name).write_text(DECOY)

    def kill_helper(self) -> None:
        """SIGKILL a helper process of the run, if there is one now."""
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                pid = int(entry.name)
                words = (entry / "cmdline").read_bytes().split(b"\0")
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                grandparent = int(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[1])
                if any(word.endswith(b"mount_worker.py") for word in words) and grandparent == os.getpid():
                    os.kill(pid, signal.SIGKILL)
                    self.injected("helper", "SIGKILL")


class Place:
    """The files of one case: behind the mount, as seen through it, and on local disk."""

    def __init__(self, bench: Bench, name: str, manifest: bool, local_output: bool = False):
        self.bench, self.name, self.folder = bench, name, bench.folder / "cases" / name
        behind, seen = bench.mount.backing / name, bench.mount.point / name
        (self.folder / "cache").mkdir(parents=True)
        (behind / "data").mkdir(parents=True)
        self.behind, self.data_seen = behind, seen / "data"
        self.output = self.folder / "out" if local_output else behind / "out"
        self.output_seen = self.output if local_output else seen / "out"
        self.journal, self.log = self.folder / "journal", self.folder / "log"
        for file, content in bench.content.items():
            (behind / "data" / file).write_text(content)
        if manifest:
            sums = [f"{stacks.sha256(behind / 'data' / file)}  {file}\n" for file in bench.content]
            (behind / "data" / "SHA256SUMS").write_text("".join(sums))

    def write_yaml(self, limit: int) -> Path:
        """The configuration of a run of ours."""
        for name in ("tiny-llama", "chats.jsonl"):  # what write_yaml would make anew
            if not (self.folder / name).exists():
                (self.folder / name).symlink_to(self.bench.folder / name)
        data = [{"path": f"{self.data_seen}/*.jsonl", "type": "chat_template"}]
        keys = KEYS | {"datasets": data, "output_dir": str(self.output_seen), "save_total_limit": limit}
        keys |= {"data_mount": str(self.bench.mount.point), "base_model": str(self.bench.folder / "tiny-llama")}
        return write_yaml(self.folder, **keys)

    def damage_newest(self, rng: random.Random) -> None:
        """What an earlier crash, or a bit that turned, leaves of the newest checkpoint."""
        files = sorted(path for path in (self.output / "checkpoint-4").iterdir() if path.name != "config.json")
        victim = rng.choice([path for path in files if path.suffix in (".pt", ".safetensors", ".pth")])
        content = victim.read_bytes()
        how = rng.choice(("cut", "empty", "missing", "flip"))
        if how == "missing":
            victim.unlink()
        else:
            middle = len(content) // 2
            flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
            victim.write_bytes({"cut": content[:middle], "empty": b"", "flip": flipped}[how])
        self.bench.injected("files", f"{how} {victim.name}")

    def keep(self) -> None:
        """A copy of everything, for a person to look at."""
        kept = self.bench.folder / "violations" / self.name
        shutil.copytree(self.folder, kept, dirs_exist_ok=True, symlinks=True)
        if self.output.exists():
            shutil.copytree(self.output, kept / "behind", dirs_exist_ok=True)

    def clear(self) -> None:
        shutil.rmtree(self.behind)
        shutil.rmtree(self.folder)


def fault_case(bench: Bench, case: Case) -> Verdict:
    """One run under the faults of a case, and, if it did not end well, another without any."""
    bench.use(case.cached)
    place = Place(bench, case.key.replace("/", "-").replace(" ", "_").replace(",", ""), case.manifest)
    if case.resumes:
        shutil.copytree(bench.saved, place.output)
        if case.kind == "damaged newest":
            place.damage_newest(case.rng)
    bench.mount.fail(*rules(case))
    verdict = Verdict(runs=1)
    code, verdict.seconds = bench.run(place, case, bench.deeds(case, place))
    verdict.faults = len(bench.mount.faults())
    _judge_end(bench, place, code, verdict)
    if verdict.end != "right":
        _again(bench, place, case, verdict)
    verdict.violations = sorted(
        {*verdict.violations, *bench.judge.violations(place.output, read_journal(place.journal))}
    )
    if bench.underneath:
        verdict.violations.append("wrote underneath the mount")
        bench.underneath = False
    if verdict.violations:
        verdict.detail = place.log.read_text()[-4000:]
        place.keep()
    place.clear()
    return verdict


def _end_of(bench: Bench, place: Place, code: int | str) -> str:
    if code == 0:
        return "right" if bench.judge.final_is_right(place.output) else "wrong"
    if code == HANG:
        return HANG
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return "traceback" if code == stacks.CRASHED else "error"


def _judge_end(bench: Bench, place: Place, code: int | str, verdict: Verdict) -> None:
    """How the run under faults ended, and what is wrong with that."""
    verdict.end = _end_of(bench, place, code)
    verdict.violations = bench.judge.violations(place.output, read_journal(place.journal))
    if verdict.end in ("wrong", HANG) or verdict.end.startswith("killed"):
        verdict.violations.append({"wrong": "wrong weights"}.get(verdict.end, verdict.end))
    log = place.log.read_text(errors="replace")
    if bench.stack == "axo_flash" and verdict.end in ("error", "traceback") and unclear_error(log):
        verdict.violations.append("unclear error")
    if verdict.end == "error" or verdict.end == "traceback":
        last = [line for line in log.splitlines() if line.strip()][-1:]
        verdict.detail = next((line for line in log.splitlines() if line.startswith("error: ")), (last or [""])[0])[
            :300
        ]


def _again(bench: Bench, place: Place, case: Case, verdict: Verdict) -> None:
    """The same command on a mount that is well again: it has to end with the right weights."""
    bench.mount.fail()
    if bench.mount.daemon.poll() is not None:
        bench.remount()
    bench.mount.daemon.send_signal(signal.SIGCONT)
    place.log.rename(place.folder / "log.first")
    code, seconds = bench.run(place, case, [])
    verdict.runs, verdict.seconds, verdict.after = (
        verdict.runs + 1,
        verdict.seconds + seconds,
        _end_of(bench, place, code),
    )
    if verdict.after != "right":
        verdict.violations.append(f"cannot go on: {verdict.after}")


@dataclasses.dataclass
class Moment:
    """When to kill: some seconds after the start, or after the run has noted so many lines, whatever the machine's load."""

    lines: int
    seconds: float

    @classmethod
    def drawn(cls, rng: random.Random) -> Moment:
        return cls(0, rng.uniform(0.05, 4.0)) if rng.random() < 0.4 else cls(rng.randint(1, 10), rng.uniform(0.0, 0.6))


def kill_case(bench: Bench, case: Case) -> Verdict:
    """Run after run on one output, each killed with SIGKILL at a random moment, the last one left alone."""
    rng, verdict = random.Random(case.key), Verdict()
    bench.use(case.cached)
    number, place = 0, None
    while place is not None or verdict.kills < KILLS_A_CASE:
        if place is None:
            number += 1
            name = f"killed-{case.seed}-{number}"
            place = Place(bench, name, manifest=True, local_output=case.kind == "local output")
        last = verdict.kills >= KILLS_A_CASE
        bench.mount.fail(*([] if last else rules(case)))
        ended = _one_killed(bench, place, case, None if last else Moment.drawn(rng), verdict)
        journal = read_journal(place.journal)
        found = bench.judge.violations(place.output, journal)
        if ended == "right" or (ended == "error" and not last and case.kind == "failing mount"):
            pass
        elif ended:
            found.append(f"cannot go on: {ended}" if last or ended == "traceback" else ended)
        verdict.violations = sorted({*verdict.violations, *found})
        if found:
            verdict.detail = place.log.read_text(errors="replace")[-4000:]
            place.keep()
        if ended == "right" or last or found:
            place.clear()
            place = None
    verdict.faults = len(bench.mount.faults()) + verdict.kills
    verdict.end = "right" if not verdict.violations else "wrong"
    return verdict


def _one_killed(bench: Bench, place: Place, case: Case, moment: Moment | None, verdict: Verdict) -> str:
    """One run, killed at its moment; how it ended if it was faster, else ""."""
    verdict.runs += 1
    if place.log.exists():
        place.log.unlink()
    if moment is None:
        code, seconds = bench.run(place, case, [])
        verdict.seconds += seconds
        return _end_of(bench, place, code)
    before = len(read_journal(place.journal))
    started = time.monotonic()
    pid = bench.start(place, case)
    since = None if moment.lines else started
    while since is None or time.monotonic() - since < moment.seconds:
        if since is None and len(read_journal(place.journal)) - before >= moment.lines:
            since = time.monotonic()
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            verdict.seconds += time.monotonic() - started
            return _end_of(bench, place, os.waitstatus_to_exitcode(status))
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    verdict.kills, verdict.seconds = verdict.kills + 1, verdict.seconds + time.monotonic() - started
    events = read_journal(place.journal)[before:]
    steps = [one["step"] for one in events if one["event"] == "batch"]
    where = "before the first step" if not steps else "after the last step" if max(steps) == STEPS - 1 else "training"
    verdict.killed_in[where] = verdict.killed_in.get(where, 0) + 1
    return ""
