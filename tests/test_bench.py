"""What the benchmark makes of its figures; the timing itself needs a GPU."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from axo_flash import bench
from axo_flash.cli import main

STORED = Path(__file__).parent.parent / "scripts/bench/results/attention_h100.csv"


def results():
    stamp = {"gpu": "GPU", "torch": "2", "triton": "3", "commit": "abc", "date": "2026-01-01"}
    return [
        bench.Result(name, pass_, 64, mask, 1, 4096, 32, 32, ms, 100.0, **stamp)
        for name, times in (("triton", (1.0, 3.0)), ("fa2", (2.0, 4.0)))
        for mask in ("causal", "full")
        for pass_, ms in zip(("fwd", "bwd"), times, strict=True)
    ]


def test_ratios_are_of_forward_plus_backward():
    lines = bench.table(results()).splitlines()
    assert lines[2] == "| 64 | causal | 1 x 4096 | 100 / 100 | 100 / 100 | 1.50x |"
    assert lines[-1].endswith("| 1.50x |")
    assert len({line.count("|") for line in lines}) == 1


def test_ratios_are_of_the_best_of_ours():
    """Where the Hopper kernels were timed, the portable ones are a peer."""
    faster = [replace(r, backend="hopper", ms=r.ms / 2) for r in results() if r.backend == "triton"]
    lines = bench.table(faster + results()).splitlines()
    assert lines[0].endswith("| against triton | against fa2 |")
    assert lines[2].endswith("| 2.00x | 3.00x |")


def test_a_peer_that_was_left_out_leaves_a_dash():
    rows = [r for r in results() if (r.backend, r.mask) != ("fa2", "full")]
    lines = bench.table(rows).splitlines()
    assert lines[3] == "| 64 | full | 1 x 4096 | 100 / 100 | - | - |" and lines[-1].endswith("| 1.50x |")


def test_flops_are_half_when_causal():
    full = bench.BenchCase(128, False, 2, 1024, 16, 16)
    assert full.flops == 4 * 2 * 16 * 1024**2 * 128 == 2 * replace(full, causal=True).flops


def test_csv_and_back(tmp_path):
    bench.write_csv(results(), tmp_path / "made" / "x.csv")
    assert bench.read_csv(tmp_path / "made" / "x.csv") == results()
    assert (
        (tmp_path / "made" / "x.csv")
        .read_text()
        .startswith("backend,pass,head_dim,mask,batch,seqlen,heads,kv_heads,ms")
    )


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    bench.plot(results(), tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_the_readme_shows_the_stored_results():
    readme = (STORED.parents[3] / "README.md").read_text()
    assert bench.table(bench.read_csv(STORED)) in readme


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(capsys):
    assert main(["bench"]) == 2
    assert capsys.readouterr().err == "error: bench: needs a CUDA GPU, and PyTorch sees none here\n"
