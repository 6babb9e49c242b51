"""Attention against its peers on this GPU: the same inputs, one run, medians, as TFLOP/s and as ratios.

A backend is timed only after it was held against the fp32 reference. FLOPs are 4 * batch * heads * seqlen^2 * head_dim
forward, half of that causal, and 2.5 times as many backward.
"""

from __future__ import annotations

import csv
import datetime
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from axo_flash.errors import UserError
from axo_flash.kernels.backends import choose_backend
from axo_flash.kernels.spec import AttentionSpec
from axo_flash.ops import flash_attn_func

OURS = ("hopper", "triton")  # best first: ratios are of the first that was timed
QUEUE_CYCLES = 2_000_000  # about a millisecond: what the GPU waits before each timed call


@dataclass(frozen=True)
class BenchCase:
    """A dense bf16 attention call to time."""

    head_dim: int
    causal: bool
    batch: int
    seqlen: int
    heads: int
    kv_heads: int

    @property
    def flops(self) -> float:
        """Of one forward."""
        return 4 * self.batch * self.heads * self.seqlen**2 * self.head_dim * (0.5 if self.causal else 1.0)


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


def peers() -> dict[str, Callable]:
    """What this PyTorch can compute attention with, as functions of (q, k, v, causal) in our layout."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def sdpa(backend):
        def run(q, k, v, causal):
            with sdpa_kernel(backend):
                q, k, v = (x.transpose(1, 2) for x in (q, k, v))
                return torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
                ).transpose(1, 2)

        return run

    def ours(backend):
        return lambda q, k, v, causal: flash_attn_func(q, k, v, causal=causal, backend=backend)

    device = torch.device("cuda", torch.cuda.current_device())
    spec = AttentionSpec(16, 16, 128, "bfloat16", softmax_scale=128**-0.5)
    served = [name for name in OURS if _serves(spec, device, name)]
    return {name: ours(name) for name in served} | {
        "fa2": sdpa(SDPBackend.FLASH_ATTENTION),
        "cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
        "flex": _flex(),
    }


def _serves(spec: AttentionSpec, device: torch.device, name: str) -> bool:
    try:
        return choose_backend(spec, device, name).name == name
    except ValueError:  # not on this GPU, for a reason that `axo-flash doctor` states
        return False


def _flex():
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
    compiled = torch.compile(flex_attention, dynamic=False)
    masks = {}

    def run(q, k, v, causal):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        mask = None
        if causal:
            key = q.shape[2], k.shape[2]
            if key not in masks:
                masks[key] = create_block_mask(lambda b, h, i, j: i >= j, None, None, *key, device=q.device)
            mask = masks[key]
        return compiled(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)

    return run


def verify(run: Callable, case: BenchCase, tolerance: float = 0.02) -> float:
    """The largest relative error (Frobenius) of out, dq, dk, dv against the reference, at a length that it can do.

    Raises:
        RuntimeError: it is over `tolerance`: such a backend is not timed.
    """
    small = BenchCase(case.head_dim, case.causal, 1, 512, case.heads, case.kv_heads)
    q, k, v, dout = _inputs(small)
    results = []
    for function in (run, lambda q, k, v, causal: flash_attn_func(q, k, v, causal=causal, backend="reference")):
        out = function(q, k, v, case.causal)
        results.append((out, *torch.autograd.grad(out, (q, k, v), dout)))
    error = max(((a - b).float().norm() / b.float().norm()).item() for a, b in zip(*results, strict=True))
    if not error < tolerance:
        raise RuntimeError(f"relative error {error:.1e} against the reference is over {tolerance}")
    return error


def _inputs(case: BenchCase):
    def random(heads):
        return torch.randn(case.batch, case.seqlen, heads, case.head_dim, device="cuda", dtype=torch.bfloat16)

    q, k, v = (random(heads).requires_grad_() for heads in (case.heads, case.kv_heads, case.kv_heads))
    return q, k, v, random(case.heads)


def measure(backends: dict[str, Callable], case: BenchCase, rounds: int = 3) -> dict[str, dict[str, float]]:
    """Median milliseconds of {"fwd", "bwd"} of each backend. They take turns, so that all of them meet the same clocks:
    a GPU that has just compiled for somebody is cool, and fast for a while."""
    time = _GpuTimer(case)
    q, k, v, dout = _inputs(case)
    outs = {name: run(q, k, v, case.causal) for name, run in backends.items()}
    times = {name: {"fwd": [], "bwd": []} for name in backends}
    for _ in range(rounds):
        for name, run in backends.items():
            with torch.no_grad():
                times[name]["fwd"].append(time(lambda run=run: run(q, k, v, case.causal)))
            out = outs[name]
            times[name]["bwd"].append(
                time(lambda out=out: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True))
            )
    return {name: {pass_: statistics.median(ms) for pass_, ms in passes.items()} for name, passes in times.items()}


class _GpuTimer:
    """Median milliseconds that the GPU takes for a call, whatever the host takes to make it: a wait is queued first, and the
    call behind it; and the cache holds nothing of the call before."""

    def __init__(self, case: BenchCase):
        self.repeats = max(5, min(30, int(3e13 / case.flops)))
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


def bench(cases: list[BenchCase], *, commit: str = "", say: Callable = print) -> list[Result]:
    """Time every backend on every case; a peer that this PyTorch or GPU lacks is named and left out.

    Raises:
        UserError: no CUDA GPU here.
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
    results, backends = [], peers()
    for case in cases:
        for name in list(backends):
            try:
                verify(backends[name], case)
            except RuntimeError as error:
                if name in OURS:
                    raise
                say(f"{name} left out from here on: {str(error).splitlines()[0]}")
                del backends[name]
        line = []
        mask = "causal" if case.causal else "full"
        for name, times in measure(backends, case).items():
            for pass_, ms in times.items():
                tflops = case.flops * (1.0 if pass_ == "fwd" else 2.5) / ms * 1e-9
                shape = case.head_dim, mask, case.batch, case.seqlen, case.heads, case.kv_heads
                results.append(Result(name, pass_, *shape, round(ms, 4), round(tflops, 1), **stamp))
            line.append(f"{name} {results[-2].tflops:.0f}/{results[-1].tflops:.0f}")
        say(f"head_dim {case.head_dim} {mask:6} {case.batch} x {case.seqlen}: {', '.join(line)}")
    return results


def table(results: list[Result]) -> str:
    """Markdown: TFLOP/s forward / backward of each backend, and our forward plus backward time against each peer's."""
    names = list(dict.fromkeys(r.backend for r in results))
    ours = next(name for name in OURS if name in names)
    others = [name for name in names if name != ours]
    lines = [
        "| head_dim | mask | batch x seqlen | "
        + " | ".join(names)
        + " | "
        + " | ".join(f"against {n}" for n in others)
        + " |",
        "|---" * (3 + len(names) + len(others)) + "|",
    ]
    for key, rows in _by_case(results).items():
        cells = [f"{r['fwd'].tflops:.0f} / {r['bwd'].tflops:.0f}" if (r := rows.get(n)) else "-" for n in names]
        ratios = [f"{_ratio(rows, ours, n):.2f}x" if n in rows else "-" for n in others]
        lines.append(f"| {key[0]} | {key[1]} | {key[2]} x {key[3]} | " + " | ".join(cells + ratios) + " |")
    means = []
    for name in others:
        ratios = [_ratio(rows, ours, name) for rows in _by_case(results).values() if name in rows]
        means.append(f"{math.exp(sum(map(math.log, ratios)) / len(ratios)):.2f}x")
    lines.append("| | | geometric mean |" + " |" * len(names) + " " + " | ".join(means) + " |")
    return "\n".join(lines)


def _by_case(results):
    cases = {}
    for r in results:
        key = r.head_dim, r.mask, r.batch, r.seqlen
        cases.setdefault(key, {}).setdefault(r.backend, {})[r.pass_] = r
    return cases


def _ratio(rows, ours, name) -> float:
    """How many times faster than `name` we are, forward plus backward."""
    mine, theirs = (rows[n]["fwd"].ms + rows[n]["bwd"].ms for n in (ours, name))
    return theirs / mine


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
    """Bars of forward plus backward TFLOP/s, a panel a (head_dim, mask).

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
    panels = list(dict.fromkeys(key[:2] for key in cases))
    names = list(dict.fromkeys(r.backend for r in results))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(3.6 * len(panels), 3.4), sharey=True, squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        shown = [key for key in cases if key[:2] == panel]
        for i, name in enumerate(names):
            heights = [_tflops(cases[key].get(name)) for key in shown]
            axis.bar([x + i * 0.8 / len(names) for x in range(len(shown))], heights, 0.8 / len(names), label=name)
        axis.set_xticks([x + 0.3 for x in range(len(shown))], [f"{key[3]}" for key in shown])
        axis.set_title(f"head_dim {panel[0]}, {panel[1]}", fontsize=10)
        axis.set_xlabel("seqlen")
    axes[0][0].set_ylabel("forward + backward, TFLOP/s")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(names), fontsize=9, frameon=False)
    figure.suptitle(f"{results[0].gpu}, bf16, torch {results[0].torch}, triton {results[0].triton}", fontsize=10)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _tflops(rows) -> float:
    if rows is None:
        return 0.0
    work = sum(r.tflops * r.ms for r in rows.values())
    return work / sum(r.ms for r in rows.values())
