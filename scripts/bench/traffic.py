"""Bytes that one forward and one backward move to and from device memory, counted by Nsight Compute (`ncu`).

    python scripts/bench/traffic.py [--commit $(git rev-parse --short HEAD)] [--fa3 DIR]
    python scripts/bench/traffic.py --table scripts/bench/results/traffic_h100.csv

Against the least there can be: forward q, k and v read, out and lse written; backward q, k, v, out, dout and lse read, dq, dk
and dv written. The cache begins without any of them, and what is still in it at the end is counted as written. `eager` is
what transformers computes, with its scores in memory; it is given a quarter of the heads, and counted four times.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from axo_flash.bench import BenchCase, short_name, to_be_had
from axo_flash.errors import UserError
from axo_flash.peers import peers
from fa3 import load

CASES = [BenchCase(128, True, 8, 2048, 16, 16), BenchCase(128, True, 1, 16384, 16, 16)]
BACKENDS = ("hopper", "triton", "fa3", "cudnn", "fa2", "eager")  # unless others are named
EAGER_SHARE = 4
METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum")
MARKER = "spin_kernel"  # of torch.cuda._sleep: between what is counted


def least(case: BenchCase) -> dict[str, tuple[int, int]]:
    """{"fwd", "bwd"}: bytes to be read and to be written at least."""
    rows = case.batch * case.seqlen
    q, kv = (2 * rows * heads * case.head_dim for heads in (case.heads, case.kv_heads))
    lse = 4 * rows * case.heads
    return {"fwd": (q + 2 * kv, q + lse), "bwd": (3 * q + 2 * kv + lse, q + 2 * kv)}


def eager(q, k, v, call):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
    mask = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, torch.finfo(q.dtype).min)
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5 + mask
    return (scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v).transpose(1, 2)


def count(backends: dict, plan: Path) -> None:
    """Under ncu: every case by every backend, marked off; and what was done in which order, into `plan`."""
    flush = torch.ones(64 << 20, device="cuda")
    done = []
    for case in CASES:
        for name, run in backends.items():
            share = EAGER_SHARE if name == "eager" else 1
            part = BenchCase(case.head_dim, True, case.batch, case.seqlen, case.heads // share, case.kv_heads // share)
            q, k, v, dout, call = part.inputs()
            torch.autograd.grad(run(q, k, v, call), (q, k, v), dout)  # compiled now
            out = None
            for pass_ in ("fwd", "bwd"):
                torch.cuda.synchronize()
                flush.sum()
                torch.cuda.synchronize()
                torch.cuda.profiler.start()
                if pass_ == "fwd":
                    out = run(q, k, v, call)
                else:
                    torch.autograd.grad(out, (q, k, v), dout)
                torch.cuda._sleep(1)
                flush.sum()  # what is still to be written
                torch.cuda._sleep(1)
                torch.cuda.synchronize()
                torch.cuda.profiler.stop()
                done.append((name, case.seqlen, pass_, share))
            del q, k, v, dout, out
            torch.cuda.empty_cache()
    plan.write_text(json.dumps(done))


def measured(backends: dict, fa3: Path | None, commit: str) -> list[dict]:
    """Rows of the result, from `count` under ncu."""
    with tempfile.TemporaryDirectory() as folder:
        plan = Path(folder, "plan.json")
        command = ["ncu", "--csv", "--page", "raw", "--print-units", "base", "--metrics", ",".join(METRICS)]
        command += ["--cache-control", "none", "--clock-control", "none", "--profile-from-start", "off"]
        command += [sys.executable, __file__, "--plan", str(plan), "--backends", *backends]
        command += ["--fa3", str(fa3)] if fa3 else []
        try:
            said = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError as error:
            raise SystemExit("ncu is not to be found: install Nsight Compute, or put its directory on PATH") from error
        if said.returncode or not plan.exists():
            raise SystemExit(f"ncu failed:\n{(said.stdout + said.stderr)[-3000:]}")
        done = json.loads(plan.read_text())
    rows = []
    for (name, seqlen, pass_, share), (read, written) in zip(done, moved(said.stdout), strict=True):
        case = next(c for c in CASES if c.seqlen == seqlen)
        row = dict(backend=name, seqlen=seqlen, **{"pass": pass_})
        row |= dict(read=round(share * read / 1e6), written=round(share * written / 1e6))
        row |= dict(least=round(sum(least(case)[pass_]) / 1e6), gpu=torch.cuda.get_device_name(), commit=commit)
        rows.append(row)
    return rows


def moved(said: str) -> list[tuple[float, float]]:
    """Bytes read and written by each step of `count`, out of what ncu said: of the kernels up to a marker both, and of what
    comes up to the next marker, which reads something else, what was written."""
    lines = said.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith('"ID"'))
    sums = [(0.0, 0.0)]
    for row in csv.DictReader(lines[begin:]):
        if MARKER in row["Kernel Name"]:
            sums.append((0.0, 0.0))
        elif row["ID"]:  # not the line of units
            sums[-1] = tuple(
                x + float(row[metric].replace(",", "")) for x, metric in zip(sums[-1], METRICS, strict=True)
            )
    sums.pop()
    return [(own[0], own[1] + flush[1]) for own, flush in zip(sums[::2], sums[1::2], strict=True)]


def read(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def table(rows: list[dict]) -> str:
    """Bytes as multiples of the least."""
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    lines = ["| batch x seqlen | pass | the least | " + " | ".join(backends) + " |", "|---" * (3 + len(backends)) + "|"]
    for case in CASES:
        for pass_ in ("fwd", "bwd"):
            those = {r["backend"]: r for r in rows if (int(r["seqlen"]), r["pass"]) == (case.seqlen, pass_)}
            ratios = [(int(those[b]["read"]) + int(those[b]["written"])) / int(those[b]["least"]) for b in backends]
            ratios = " | ".join(f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.0f}x" for ratio in ratios)
            mega = those[backends[0]]["least"]
            lines.append(f"| {case.batch} x {case.seqlen} | {pass_} | {mega} MB | {ratios} |")
    return "\n".join(lines)


def plot(rows: list[dict], path: Path) -> None:
    from matplotlib import pyplot

    panels = list(dict.fromkeys((row["seqlen"], row["pass"]) for row in rows))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(2.8 * len(panels), 3.2), layout="constrained")
    for axis, (seqlen, pass_) in zip(axes, panels, strict=True):
        shown = [row for row in rows if (row["seqlen"], row["pass"]) == (seqlen, pass_)]
        names = [row["backend"] for row in shown]
        read, written = ([int(row[key]) / int(row["least"]) for row in shown] for key in ("read", "written"))
        axis.bar(names, read, label="read")
        axis.bar(names, written, bottom=read, label="written")
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_ylim(0, 4.5)  # eager is far above
        for i, total in enumerate(r + w for r, w in zip(read, written, strict=True)):
            label = dict(ha="center", va="bottom", fontsize=8, bbox=dict(color="white", pad=1))
            axis.text(i, min(total + 0.08, 4.1), f"{total:.2f}" if total < 10 else f"{total:.0f}", **label)
        axis.set_title(f"{seqlen} tokens, {pass_}", fontsize=10)
        axis.tick_params(axis="x", labelsize=8, rotation=45)
    axes[0].set_ylabel("device memory moved / the least")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", default="")
    parser.add_argument("--fa3", type=Path, metavar="DIR")
    parser.add_argument("--backends", nargs="+", help=f"default: of {', '.join(BACKENDS)} those that are to be had")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--table", type=Path, metavar="CSV", help="print (and draw anew) stored results")
    parser.add_argument("--plan", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.table:
        path, rows = args.table, read(args.table)
    else:
        if not torch.cuda.is_available():
            parser.error("no GPU is to be found: memory is counted on one")
        if args.fa3:
            load(args.fa3)
        available = peers() | {"eager": eager}
        try:
            chosen = to_be_had(available, args.backends or [name for name in BACKENDS if name in available])
        except UserError as error:
            parser.error(str(error))
        if args.plan:
            count(chosen, args.plan)
            return
        rows = measured(chosen, args.fa3, args.commit)
        path = args.out / f"traffic_{short_name(rows[0]['gpu'])}.csv"
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    print(table(rows))
    plot(rows, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
