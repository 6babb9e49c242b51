"""Attention against its peers on this GPU: the same inputs, one run, medians, as TFLOP/s and as ratios.

A backend is timed only after it was held against the fp32 reference. FLOPs are 4 * heads * head_dim for each pair of a query
and a key that it sees (causal: half of seqlen^2), and 2.5 times as many backward.
"""

from __future__ import annotations

import csv
import datetime
import math
import random
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

from axo_flash.errors import UserError
from axo_flash.peers import OURS, Call, Unsupported, peers, reference

QUEUE_CYCLES = (
    6_000_000  # some milliseconds: what the GPU waits before each timed call, longer than a host takes for it
)


CASES_A_LINE = 17  # of the plot


@dataclass(frozen=True)
class BenchCase:
    """A bf16 attention call to time: `batch` rows of `seqlen` tokens; or, with `documents`, their lengths in one row."""

    head_dim: int
    causal: bool
    batch: int
    seqlen: int
    heads: int
    kv_heads: int
    window: int = -1
    documents: tuple[int, ...] = ()

    @property
    def mask(self) -> str:
        """Its name in the table."""
        if self.documents:
            return f"{len(self.documents)} documents"
        if self.window >= 0:
            return f"window {self.window + 1}"
        return "causal" if self.causal else "full"

    @property
    def flops(self) -> float:
        """Of one forward."""
        lengths = self.documents or (self.seqlen,) * self.batch
        return 4 * self.heads * self.head_dim * sum(self._pairs(n) for n in lengths)

    def _pairs(self, n: int) -> float:
        if self.window >= 0:
            hidden = max(n - self.window - 1, 0)
            return n * (n + 1) / 2 - hidden * (hidden + 1) / 2
        return n * n * (0.5 if self.causal else 1.0)

    def inputs(self):
        """q, k, v (which want gradients), dout, and the Call."""
        rows = (sum(self.documents),) if self.documents else (self.batch, self.seqlen)

        def normal(heads):
            return torch.randn(*rows, heads, self.head_dim, device="cuda", dtype=torch.bfloat16)

        q, k, v = (normal(heads).requires_grad_() for heads in (self.heads, self.kv_heads, self.kv_heads))
        call = Call(self.causal, self.window)
        if self.documents:
            ends = torch.tensor((0, *self.documents)).cumsum(0).to("cuda", torch.int32)
            call = replace(call, cu_seqlens=ends, max_seqlen=max(self.documents))
        return q, k, v, normal(self.heads), call


@dataclass(frozen=True)
class Result:
    """One row of scripts/bench/results/attention_<gpu>.csv; `pass` is written `pass_` in Python."""

    backend: str
    pass_: str
    head_dim: int
    mask: str
    batch: int
    seqlen: int
    heads: int
    kv_heads: int
    ms: float
    tflops: float
    gpu: str
    torch: str
    triton: str
    commit: str
    date: str


def dense_cases(seqlens=(4096, 8192, 16384), head_dims=(128, 64), tokens=16384) -> list[BenchCase]:
    """Causal and full cases of `tokens` tokens a batch and a hidden size of 2048."""
    return [
        BenchCase(d, causal, max(1, tokens // s), s, 2048 // d, 2048 // d)
        for d in head_dims
        for causal in (True, False)
        for s in seqlens
    ]


def model_cases() -> list[BenchCase]:
    """What Llama-2-7B and Mistral-7B call in training, the latter with and without v0.1's window of 4096 tokens."""
    llama = BenchCase(128, True, 4, 4096, 32, 32)
    mistral = BenchCase(128, True, 2, 8192, 32, 8)
    return [llama, mistral, replace(mistral, window=4095)]


def packed_cases(tokens=16384) -> list[BenchCase]:
    """Documents packed into one row: lengths as of a mixed set, of short chats, and of long texts."""
    return [
        BenchCase(128, True, 1, tokens, 32, kv_heads, documents=documents(tokens, *mix))
        for mix in ((11, 365, 1.0, 16, 4096), (1, 150, 0.7, 8, 2048), (3, 2500, 0.8, 64, 8192))
        for kv_heads in (32, 8)
    ]


def documents(tokens: int, seed: int, median: float, spread: float, shortest: int, longest: int) -> tuple[int, ...]:
    """Lengths that sum to `tokens`, drawn from a lognormal distribution."""
    draw, lengths = random.Random(seed), []
    while sum(lengths) < tokens:
        lengths.append(max(shortest, min(longest, int(draw.lognormvariate(math.log(median), spread)))))
    lengths[-1] -= sum(lengths) - tokens
    return tuple(lengths)


def verify(run: Callable, case: BenchCase, tolerance: float = 0.02) -> float:
    """The largest relative error (Frobenius) of out, dq, dk, dv against the reference, at a length that it can do.

    Raises:
        RuntimeError: it is over `tolerance`: such a backend is not timed.
    """
    small = replace(
        case, batch=1, seqlen=512, window=min(case.window, 200), documents=(130, 375, 7) * bool(case.documents)
    )
    q, k, v, dout, call = small.inputs()
    results = []
    for function in (run, reference):
        out = function(q, k, v, call)
        results.append((out, *torch.autograd.grad(out, (q, k, v), dout)))
    error = max(((a - b).float().norm() / b.float().norm()).item() for a, b in zip(*results, strict=True))
    if not error < tolerance:
        raise RuntimeError(f"relative error {error:.1e} against the reference is over {tolerance}")
    return error


def measure(backends: dict[str, Callable], case: BenchCase, rounds: int = 3) -> dict[str, dict[str, float]]:
    """Median milliseconds of {"fwd", "bwd"} of each backend. They take turns, so that all of them meet the same clocks:
    a GPU that has just compiled for somebody is cool, and fast for a while."""
    time = _GpuTimer(case)
    q, k, v, dout, call = case.inputs()
    outs = {name: run(q, k, v, call) for name, run in backends.items()}
    times = {name: {"fwd": [], "bwd": []} for name in backends}
    for _ in range(rounds):
        for name, run in backends.items():
            with torch.no_grad():
                times[name]["fwd"].append(time(lambda run=run: run(q, k, v, call)))
            out = outs[name]
            times[name]["bwd"].append(
                time(lambda out=out: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True))
            )
    return {name: {pass_: statistics.median(ms) for pass_, ms in passes.items()} for name, passes in times.items()}


class _GpuTimer:
    """Median milliseconds that the GPU takes for a call, whatever the host takes to make it: a wait is queued first, and the
    call behind it; and the cache holds nothing of the call before."""

    def __init__(self, case: BenchCase):
        self.repeats = max(5, min(30, int(1e13 / case.flops)))
        self.flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")

    def __call__(self, function: Callable) -> float:
        for _ in range(3):
            function()
        times = []
        for _ in range(self.repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush.zero_()
            torch.cuda._sleep(QUEUE_CYCLES)
            start.record()
            function()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        return statistics.median(times)


def to_be_had(available: dict[str, Callable], backends: Iterable[str] | None) -> dict[str, Callable]:
    """Those of `available` that are named in `backends`, or all. Raises UserError for one that is not there."""
    if unknown := set(backends or ()) - set(available):
        raise UserError(f"bench: no {', '.join(sorted(unknown))} here; to be had: {', '.join(available)}")
    return {name: run for name, run in available.items() if backends is None or name in set(backends)}


def short_name(gpu: str) -> str:
    """Of a GPU, for the names of files: h100 of "NVIDIA H100 80GB HBM3"."""
    words = gpu.lower().split()
    return next((word for word in words if any(c.isdigit() for c in word)), "-".join(words))


def bench(
    cases: list[BenchCase], *, backends: Iterable[str] | None = None, commit: str = "", say: Callable = print
) -> list[Result]:
    """Time every backend, or those named, on every case; a peer that lacks a case, or is wrong in it, is named and left
    out of it.

    Raises:
        UserError: no CUDA GPU here, or a backend that is not to be had.
        RuntimeError: a backend of ours is wrong.
    """
    if not torch.cuda.is_available():
        raise UserError("bench: needs a CUDA GPU, and PyTorch sees none here")
    import triton

    stamp = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit,
        "date": datetime.date.today().isoformat(),
    }
    chosen = to_be_had(peers(), backends)
    results = []
    for case in cases:
        label = f"head_dim {case.head_dim} {case.mask} {case.batch} x {case.seqlen} heads {case.heads}/{case.kv_heads}"
        line = []
        for name, times in measure(_able(chosen, case, label, say), case).items():
            for pass_, ms in times.items():
                tflops = case.flops * (1.0 if pass_ == "fwd" else 2.5) / ms * 1e-9
                shape = case.head_dim, case.mask, case.batch, case.seqlen, case.heads, case.kv_heads
                results.append(Result(name, pass_, *shape, round(ms, 4), round(tflops, 1), **stamp))
            line.append(f"{name} {results[-2].tflops:.0f}/{results[-1].tflops:.0f}")
        say(f"{label}: {', '.join(line)}")
    return results


def _able(backends, case, label, say) -> dict[str, Callable]:
    """Those backends that compute the case, and rightly."""
    able = {}
    for name, run in backends.items():
        try:
            verify(run, case)
            able[name] = run
        except Unsupported:
            pass  # its cell in the table is a dash
        except RuntimeError as error:
            if name in OURS:
                raise
            say(f"{label}: {name} left out: {str(error).splitlines()[0]}")
    return able


def table(results: list[Result]) -> str:
    """Markdown: TFLOP/s forward / backward of each backend, and our forward plus backward time against each peer's."""
    names = list(dict.fromkeys(r.backend for r in results))
    ours = next(name for name in OURS if name in names)
    others = [name for name in names if name != ours]
    head = ["head_dim", "heads", "mask", "batch x seqlen", *names, *(f"against {n}" for n in others)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for (head_dim, mask, batch, seqlen, heads, kv_heads), rows in _by_case(results).items():
        cells = [f"{r['fwd'].tflops:.0f} / {r['bwd'].tflops:.0f}" if (r := rows.get(n)) else "-" for n in names]
        ratios = [f"{_ratio(rows, ours, n):.2f}x" if n in rows else "-" for n in others]
        shape = [
            f"{head_dim}",
            f"{heads}" if heads == kv_heads else f"{heads} / {kv_heads}",
            mask,
            f"{batch} x {seqlen}",
        ]
        lines.append("| " + " | ".join(shape + cells + ratios) + " |")
    for label, passes in (("forward", ("fwd",)), ("backward", ("bwd",)), ("both", ("fwd", "bwd"))):
        means = [f"{_mean_ratio(results, ours, name, passes):.2f}x" for name in others]
        lines.append("| | | geometric mean | " + label + " |" + " |" * len(names) + " " + " | ".join(means) + " |")
    return "\n".join(lines)


def _by_case(results):
    cases = {}
    for r in results:
        key = r.head_dim, r.mask, r.batch, r.seqlen, r.heads, r.kv_heads
        cases.setdefault(key, {}).setdefault(r.backend, {})[r.pass_] = r
    return cases


def _ratio(rows, ours, name, passes=("fwd", "bwd")) -> float:
    """How many times faster than `name` we are, by default forward plus backward."""
    mine, theirs = (sum(rows[n][pass_].ms for pass_ in passes) for n in (ours, name))
    return theirs / mine


def _mean_ratio(results, ours, name, passes) -> float:
    ratios = [_ratio(rows, ours, name, passes) for rows in _by_case(results).values() if name in rows]
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def write_csv(results: list[Result], path: Path) -> None:
    """One line a result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([field.name.rstrip("_") for field in fields(Result)])
        writer.writerows(asdict(result).values() for result in results)


def read_csv(path: Path) -> list[Result]:
    """What write_csv wrote."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    casts = {"head_dim": int, "batch": int, "seqlen": int, "heads": int, "kv_heads": int, "ms": float, "tflops": float}
    return [Result(**{("pass_" if k == "pass" else k): casts.get(k, str)(v) for k, v in row.items()}) for row in rows]


def plot(results: list[Result], path: Path) -> None:
    """Bars of forward plus backward TFLOP/s: a panel a (head_dim, mask) of the dense cases, and one for all others.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ModuleNotFoundError as error:
        raise UserError('the plot needs matplotlib: pip install "axo-flash[plot]"') from error
    cases = _by_case(results)
    panels = list(dict.fromkeys(map(_panel, cases)))
    names = list(dict.fromkeys(r.backend for r in results))
    widths = {panel: max(3, sum(_panel(key) == panel for key in cases)) for panel in panels}
    lines = [[]]  # of panels
    for panel in panels:
        if lines[-1] and sum(widths[p] for p in lines[-1]) + widths[panel] > CASES_A_LINE:
            lines.append([])
        lines[-1].append(panel)
    width = max(sum(widths[p] for p in line) for line in lines)
    figure = pyplot.figure(figsize=(max(0.8 * width, 6), 3.2 * len(lines) + 0.6), layout="constrained")
    subfigures = figure.subfigures(len(lines), 1, squeeze=False)[:, 0]
    top = max(_tflops(rows) for by_backend in cases.values() for rows in by_backend.values())
    for line, subfigure in zip(lines, subfigures, strict=True):
        axes = subfigure.subplots(1, len(line), squeeze=False, width_ratios=[widths[p] for p in line])[0]
        for axis, panel in zip(axes, line, strict=True):
            shown = [key for key in cases if _panel(key) == panel]
            for i, name in enumerate(names):
                heights = [_tflops(cases[key].get(name)) for key in shown]
                axis.bar([x + i * 0.8 / len(names) for x in range(len(shown))], heights, 0.8 / len(names), label=name)
            middle = 0.4 - 0.4 / len(names)
            axis.set_xticks([x + middle for x in range(len(shown))], [_label(key) for key in shown], fontsize=8)
            axis.set_ylim(0, 1.05 * top)
            axis.set_title(panel, fontsize=10)
        axes[0].set_ylabel("forward + backward, TFLOP/s", fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(names), fontsize=9, frameon=False)
    figure.suptitle(f"{results[0].gpu}, bf16, torch {results[0].torch}, triton {results[0].triton}", fontsize=10)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _panel(key) -> str:
    head_dim, mask, *_, heads, _ = key
    dense = mask in ("causal", "full") and heads * head_dim == 2048
    return f"head_dim {head_dim}, {mask}" if dense else "models and packed documents"


def _label(key) -> str:
    _, mask, _, seqlen, heads, kv_heads = key
    if _panel(key).startswith("head_dim"):
        return f"{seqlen}"
    what = mask.replace(" ", "\n") if "documents" in mask else f"{mask}\n{seqlen}"
    return f"{what}\n{heads}/{kv_heads} heads"


def _tflops(rows) -> float:
    if rows is None:
        return 0.0
    work = sum(r.tflops * r.ms for r in rows.values())
    return work / sum(r.ms for r in rows.values())
