"""What a mount costs: data brought from it against `cp`, and training with checkpoints on it against none and against
transformers' own Trainer saving there. Into results/mounts.json.

    python scripts/bench/mounts.py data [--mounts faults rclone-full s3fs] [--mebibytes 256] [--rounds 7]
    python scripts/bench/mounts.py checkpoints [--rounds 5]

Everything takes turns, round by round, in an order that changes; what counts are ratios within a round, and of those the
median: a machine that others load too is as slow for the one as for the other. `faults` is the file system of
tests/mounts (without faults), which behaves as hopsfs-mount (direct_io, stored at close); the others are real.

data: a JSON Lines file with its SHA256SUMS, the whole path (helper started, listed, copied, sha256, held against the
manifest) against `cp` of it to the same local disk, the page cache dropped before each. Without a manifest 6 s are added
that are waited and not worked: until no attribute cache can hide a change.
checkpoints: of a Llama of 7 M parameters, all trained (85 MB a checkpoint), on the `faults` mount: how long training
stands still for one, in percent of 100 steps; and how much longer runs of 50 steps with two checkpoints take than without.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import hashlib
import json
import logging
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one core trains, the other is for the helper and the mount's daemon
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "mounts")]

from fault_mount import FaultMount  # noqa: E402
from real_mounts import NEEDS, Stack, why_not  # noqa: E402

RESULTS = ROOT / "scripts" / "bench" / "results" / "mounts.json"
STEPS, SAVE_STEPS = 50, 30  # a checkpoint that is published while 20 more steps are trained, and one at the end
STEPS_A_CHECKPOINT = 100  # that a stall is held against


# ---------------------------------------------------------------------------------------------------------------- data
@contextlib.contextmanager
def mounted(kind: str, folder: Path, content: bytes) -> Iterator[Path]:
    """A mount with a data file and its manifest; the directory of both."""
    manifest = f"{hashlib.sha256(content).hexdigest()}  train.jsonl\n".encode()
    if kind == "faults":
        mount = FaultMount.below(folder)
        (mount.backing / "data").mkdir()
        (mount.backing / "data" / "train.jsonl").write_bytes(content)
        (mount.backing / "data" / "SHA256SUMS").write_bytes(manifest)
        mount.start()
        try:
            yield mount.point / "data"
        finally:
            mount.stop()
        return
    if reason := why_not(kind):
        raise SystemExit(f"{kind}: {reason}")
    folder.mkdir()
    stack = Stack(kind, folder)
    try:
        stack.store.start()
        stack.mount()
        stack.put("data/train.jsonl", content)
        stack.put("data/SHA256SUMS", manifest)
        yield stack.point / "data"
    finally:
        stack.stop()


def forget(path: Path) -> None:
    """Drop what the page cache holds of a file that lies on the mount."""
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def copy_with_cp(data: Path, local: Path) -> None:
    subprocess.run(["cp", str(data / "train.jsonl"), str(local / "cp")], check=True)


def copy_with_us(data: Path, local: Path) -> None:
    """As prepare_data does it: the helper starts, lists, copies and hashes; the manifest is read and held against it."""
    from axo_flash.config import DatasetConfig
    from axo_flash.data.files import list_files
    from axo_flash.data.mounted import bring
    from axo_flash.mount_io import MountIO

    with MountIO() as io:
        files = list_files(DatasetConfig(path=str(data / "*.jsonl"), type="alpaca"), None, io)
        copies, transfer = bring([(file, local) for file in files], io)
    assert transfer.verified == transfer.files == len(copies) == 1 and transfer.retries == 0


def timed(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure_data(kind: str, mebibytes: int, rounds: int) -> dict:
    """Seconds of each way in every round, and the share of cp's speed."""
    content = os.urandom(mebibytes << 20)
    ways = {"cp": copy_with_cp, "axo_flash": copy_with_us}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as folder, mounted(kind, Path(folder) / "m", content) as data:
        for number in range(rounds + 1):
            for name in sorted(ways, reverse=number % 2 == 1):
                local = Path(folder) / "local"
                local.mkdir()
                forget(data / "train.jsonl")
                took = timed(functools.partial(ways[name], data, local))
                shutil.rmtree(local)
                if number:  # the first round warms up
                    seconds[name].append(took)
    shares = [cp / ours for cp, ours in zip(seconds["cp"], seconds["axo_flash"], strict=True)]
    speed = {name: round(mebibytes * 1.048576 / statistics.median(values)) for name, values in seconds.items()}
    print(f"{kind}: cp {speed['cp']} MB/s, axo_flash {speed['axo_flash']} MB/s, share {statistics.median(shares):.2f}")
    return {"mebibytes": mebibytes, "megabytes_per_second": speed, "share_of_cp": round(statistics.median(shares), 3),
            "shares": [round(share, 3) for share in shares]}  # fmt: skip


# --------------------------------------------------------------------------------------------------------- checkpoints
def write_run(folder: Path, output: Path, saves: bool) -> Path:
    """The YAML of a run of 7 M parameters."""
    from tiny_run import write_model, write_yaml

    model = folder / "tiny-llama"
    if not model.exists():
        write_model(model, hidden_size=320, intermediate_size=864, num_hidden_layers=6, num_attention_heads=5,
                    num_key_value_heads=5, max_position_embeddings=512)  # fmt: skip
    return write_yaml(
        folder, adapter=None, max_steps=STEPS, learning_rate=1e-4, output_dir=str(output), val_set_size=0,
        save_steps=SAVE_STEPS if saves else None, save_strategy=None if saves else "no", save_total_limit=1,
        logging_steps=50, sequence_len=128, base_model=str(model),
    )  # fmt: skip


def train_ours(folder: Path, output: Path, saves: bool) -> dict[str, float]:
    """Seconds of Trainer.train, and of those the seconds in which training stood still for a checkpoint."""
    from axo_flash.config import load_config
    from axo_flash.train import train
    from axo_flash.trainer import RunTrainer

    stalls = stopwatch(RunTrainer, "_save_checkpoint")
    report = train(load_config(write_run(folder, output, saves)), lambda text: None)
    return {"training": report.seconds["training"], "stalled": sum(stalls), "saves": len(stalls)}


def train_stock(folder: Path, output: Path, saves: bool) -> dict[str, float]:
    """The same model, rows and settings in transformers' Trainer, its output_dir on the mount."""
    from transformers import Trainer

    from axo_flash.config import load_config
    from axo_flash.data.dataset import prepare_data
    from axo_flash.model import load_model, load_tokenizer
    from axo_flash.trainer import training_arguments

    config = load_config(write_run(folder, output, saves))
    tokenizer = load_tokenizer(config)
    data, loaded = prepare_data(config, tokenizer), load_model(config, tokenizer)
    arguments = training_arguments(config, output, loaded.dtype, STEPS)
    arguments.save_total_limit = 1
    stalls = stopwatch(Trainer, "_save_checkpoint")
    trainer = Trainer(model=loaded.model, args=arguments, train_dataset=data.train, data_collator=data.collator,
                      processing_class=tokenizer)  # fmt: skip
    return {"training": timed(trainer.train), "stalled": sum(stalls), "saves": len(stalls)}


def stopwatch(owner: type, name: str) -> list[float]:
    """Have a method note how long each of its calls took."""
    plain, seconds = getattr(owner, name), []

    def watched(*arguments, **options):
        started = time.perf_counter()
        try:
            return plain(*arguments, **options)
        finally:
            seconds.append(time.perf_counter() - started)

    setattr(owner, name, watched)
    return seconds


def in_a_child(work: Callable[[], dict[str, float]]) -> dict[str, float]:
    """A run in a process of its own, forked when all is imported."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.write(writing, json.dumps(work()).encode())
            code = 0
        finally:
            if code:
                logging.exception("the run failed")
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise SystemExit("a run failed: see above")
    return json.loads(answer)


def measure_checkpoints(rounds: int) -> dict:
    """Training time with and without checkpoints on a mount, ours and stock, and how long it stood still."""
    import axo_flash.train  # noqa: F401  imported before the first fork

    found: dict[str, list[dict[str, float]]] = {
        f"{stack} {kind}": [] for stack in ("axo_flash", "stock") for kind in ("saving", "without")
    }
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        mount = FaultMount.below(Path(folder) / "m")
        mount.start()
        try:
            for number in range(rounds + 1):
                for name in sorted(found, reverse=number % 2 == 1):
                    stack, _, kind = name.partition(" ")
                    output = (
                        mount.point if kind == "saving" else Path(folder)
                    ) / f"out-{name.replace(' ', '-')}-{number}"
                    run = train_ours if stack == "axo_flash" else train_stock
                    one = in_a_child(functools.partial(run, Path(folder), output, kind == "saving"))
                    print(name, {key: round(value, 3) for key, value in one.items()}, flush=True)
                    if number:  # the first round warms up
                        found[name].append(one)
                    shutil.rmtree((mount.backing / output.name) if kind == "saving" else output, ignore_errors=True)
        finally:
            mount.stop()
    return {
        "steps": STEPS,
        "save_steps": SAVE_STEPS,
        **{stack: stall_of(found, stack) for stack in ("axo_flash", "stock")},
    }


def stall_of(found: dict[str, list[dict[str, float]]], stack: str) -> dict:
    """How long training stood still for one checkpoint, in percent of 100 steps, and how much longer it took in all."""
    saving, without = found[f"{stack} saving"], found[f"{stack} without"]
    still = [
        100 * (one["stalled"] / one["saves"]) / (STEPS_A_CHECKPOINT * (one["training"] - one["stalled"]) / STEPS)
        for one in saving
    ]
    longer = [100 * (one["training"] / other["training"] - 1) for one, other in zip(saving, without, strict=True)]
    each = [one["stalled"] / one["saves"] for one in saving]
    return {
        "seconds_of_a_step": round(statistics.median(one["training"] / STEPS for one in without), 4),
        "seconds_stalled_a_checkpoint": round(statistics.median(each), 3),
        "stalled_percent": round(statistics.median(still), 2), "stalled_percent_of_each": [round(x, 2) for x in still],
        "longer_percent": round(statistics.median(longer), 2), "longer_percent_of_each": [round(x, 2) for x in longer],
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- results
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("data", "checkpoints"))
    parser.add_argument("--mounts", nargs="+", default=["faults", "rclone-full"], choices=["faults", *NEEDS])
    parser.add_argument("--mebibytes", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    if arguments.what == "data":
        found = {kind: measure_data(kind, arguments.mebibytes, arguments.rounds) for kind in arguments.mounts}
    else:
        found = measure_checkpoints(arguments.rounds)
        print(json.dumps(found, indent=1))
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    before = results.get(arguments.what, {}) if arguments.what == "data" else {}
    results[arguments.what] = before | found | {"run": facts()}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def facts() -> dict:
    """Where and with what it was measured."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "commit": done.stdout.strip(), "date": datetime.datetime.now(datetime.UTC).strftime("%F"),
        "machine": f"{os.cpu_count()} CPU cores, Linux {platform.release()}, load {os.getloadavg()[1]:.1f}",
        "versions": {name: version(name) for name in ("torch", "transformers", "safetensors", "mfusepy")},
    }  # fmt: skip


if __name__ == "__main__":
    main()
