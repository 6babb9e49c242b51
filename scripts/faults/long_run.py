"""The long run: every fault in every phase of a training run, and runs that are killed, each held against a run that
met none. See README.md beside it.

    python scripts/faults/long_run.py axo_flash --seeds 6 --kills 500
    python scripts/faults/long_run.py stock --seeds 2 --kills 50
"""

from __future__ import annotations

import argparse
import csv
import datetime
import gc
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a child is forked: no thread of torch may exist before
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from cells import KILLS_A_CASE, PHASES, Case, matrix  # noqa: E402

COLUMNS = ("phase", "kind", "seed", "pattern", "cached", "end", "after", "violations", "faults", "kills", "killed_in",
           "runs", "seconds", "detail", "commit", "time")  # fmt: skip


def main() -> int:
    arguments = parsed()
    arguments.results.mkdir(parents=True, exist_ok=True)
    table = arguments.results / f"{arguments.stack}.csv"
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    wanted = [case for case in matrix(seeds, arguments.kills // KILLS_A_CASE) if arguments.only in case.key]
    done = {(row["phase"], row["kind"], int(row["seed"])) for row in rows_of(table)}
    todo = [case for case in wanted if (case.phase, case.kind, case.seed) not in done]
    print(f"{len(todo)} of {len(wanted)} cases to do", flush=True)
    if not table.exists():
        with open(table, "w", newline="") as file:
            csv.writer(file).writerow(COLUMNS)
    failed = in_workers(arguments, todo, table) if todo else 0
    summary = summarise(arguments.stack, rows_of(table))
    (arguments.results / f"{arguments.stack}.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(
        json.dumps({key: summary[key] for key in ("cases", "runs", "faults", "kills", "ends", "violations")}, indent=1)
    )
    return failed


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stack", choices=("axo_flash", "stock"))
    parser.add_argument("--seeds", type=int, default=6, help="seeds a cell")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=500, help="SIGKILLs of the trainer in all")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="", help="cases whose name (phase/kind/seed) holds this")
    parser.add_argument(
        "--results", type=Path, default=Path("runs/faults"), help="where the table goes, and is found again"
    )
    parser.add_argument("--folder", type=Path, help="for mounts and files; kept. Default: a temporary one")
    return parser.parse_args()


def in_workers(arguments: argparse.Namespace, todo: list[Case], table: Path) -> int:
    """Fork the workers once everything is imported; each takes every n-th case and appends a line for each."""
    import stacks

    assert stacks.STEPS  # torch, transformers and datasets are in this process now, and in every fork of it
    gc.collect()
    gc.freeze()  # what was imported is not looked through again in every run
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="faults-"))
    count = min(arguments.workers, len(todo))
    workers = []
    for number in range(count):
        pid = os.fork()
        if not pid:
            code = 1
            try:
                work(arguments.stack, todo[number::count], table, folder / f"{arguments.stack}-{os.getpid()}")
                code = 0
            finally:
                sys.stderr.flush()
                if code:
                    import traceback

                    traceback.print_exc()
                os._exit(code)
        workers.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in workers]
    if arguments.folder is None and not any(codes):
        shutil.rmtree(folder)
    return int(any(codes))


def work(stack: str, cases: list[Case], table: Path, folder: Path) -> None:
    from cases import Bench, fault_case, kill_case

    folder.mkdir(parents=True)
    bench = Bench(stack, folder)
    try:
        bench.prepare()
        for case in cases:
            verdict = (kill_case if case.phase == "killed" else fault_case)(bench, case)
            row = vars(case) | vars(verdict) | {"pattern": case.pattern, "cached": int(case.cached)}
            row["seconds"] = round(verdict.seconds, 1)
            row["violations"] = "; ".join(verdict.violations)
            row["killed_in"] = "; ".join(f"{where}: {count}" for where, count in verdict.killed_in.items())
            row["detail"] = shortened(verdict.detail, folder)
            row |= {"commit": commit(), "time": datetime.datetime.now(datetime.UTC).strftime("%F %T")}
            append(table, row)
            if verdict.violations:
                print(f"VIOLATION {case.key}: {verdict.violations}", flush=True)
    finally:
        bench.close()


def append(table: Path, row: dict) -> None:
    """One line in one write, so that workers do not mix theirs and an interrupted run loses none."""
    with tempfile.TemporaryFile("w+", newline="") as line:
        csv.DictWriter(line, COLUMNS, extrasaction="ignore").writerow(row)
        line.seek(0)
        text = line.read().encode()
    descriptor = os.open(table, os.O_WRONLY | os.O_APPEND)
    os.write(descriptor, text)
    os.close(descriptor)


def shortened(text: str, folder: Path) -> str:
    """One line, without the paths of the machine it ran on."""
    return " ".join(text.replace(str(folder), "...").replace(str(HERE.parents[1]), ".").split())[-300:]


def rows_of(table: Path) -> list[dict[str, str]]:
    if not table.exists():
        return []
    with open(table, newline="") as file:
        return list(csv.DictReader(file))


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    return done.stdout.strip()


def summarise(stack: str, rows: list[dict[str, str]]) -> dict:
    """Counts in all and by cell; versions, machine and commits."""
    from importlib.metadata import version

    cells: dict[str, dict] = defaultdict(lambda: {"cases": 0, "faults": 0, "ends": Counter(), "violations": Counter()})
    violations, ends, killed_in = Counter(), Counter(), Counter()
    for row in rows:
        cell = cells[f"{row['phase']} / {row['kind']}"]
        end = row["end"] + (f", then {row['after']}" if row["after"] else "")
        found = [one for one in row["violations"].split("; ") if one]
        cell["cases"] += 1
        cell["faults"] += int(row["faults"])
        cell["ends"][end] += 1
        cell["violations"].update(found)
        violations.update(found)
        ends[end] += 1
        for part in filter(None, row["killed_in"].split("; ")):
            where, _, count = part.partition(": ")
            killed_in[where] += int(count)
    names = ("torch", "transformers", "datasets", "peft", "safetensors", "tenacity", "mfusepy")
    return {
        "stack": stack, "cases": len(rows), "runs": sum(int(row["runs"]) for row in rows),
        "faults": sum(int(row["faults"]) for row in rows), "kills": sum(int(row["kills"]) for row in rows),
        "from": min((row["time"] for row in rows), default=""), "to": max((row["time"] for row in rows), default=""),
        "seconds_of_all_cases": round(sum(float(row["seconds"]) for row in rows)),
        "longest_seconds": max((float(row["seconds"]) for row in rows if row["phase"] in PHASES), default=0),
        "ends": dict(ends), "killed_in": dict(killed_in), "violations": dict(violations),
        "cases_with_a_violation": sum(bool(row["violations"]) for row in rows),
        "seeds": sorted({int(row["seed"]) for row in rows if row["phase"] in PHASES}),
        "commits": sorted({row["commit"] for row in rows}),
        "machine": f"{os.cpu_count()} CPU cores, Linux {platform.release()}",
        "versions": {"python": platform.python_version()} | {name: version(name) for name in names},
        "cells": {name: cell | {"ends": dict(cell["ends"]), "violations": dict(cell["violations"])}
                  for name, cell in sorted(cells.items())},
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
