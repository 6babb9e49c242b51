"""What the benchmark makes of its figures; the timing itself needs a GPU."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts" / "bench"))

import traffic
from axo_flash import bench
from axo_flash.cli import main

ROOT = Path(__file__).parents[1]
STORED = ROOT / "scripts/bench/results"


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
    assert lines[2] == "| 64 | 32 | causal | 1 x 4096 | 100 / 100 | 100 / 100 | 1.50x |"
    assert [line.split("|")[-2].strip() for line in lines[-3:]] == ["2.00x", "1.33x", "1.50x"]
    assert [line.split("|")[4].strip() for line in lines[-3:]] == ["forward", "backward", "both"]
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
    assert lines[3] == "| 64 | 32 | full | 1 x 4096 | 100 / 100 | - | - |" and lines[-1].endswith("| 1.50x |")


def test_flops_are_half_when_causal():
    full = bench.BenchCase(128, False, 2, 1024, 16, 16)
    assert full.flops == 4 * 2 * 16 * 1024**2 * 128 == 2 * replace(full, causal=True).flops


def test_flops_are_those_of_the_pairs_that_are_seen():
    n, window = 50, 7
    pairs = sum(i - window <= j <= i for i in range(n) for j in range(n))
    assert bench.BenchCase(64, True, 3, n, 2, 1, window).flops == 4 * 64 * 2 * 3 * pairs
    packed = bench.BenchCase(64, True, 1, 60, 2, 1, documents=(10, 20, 30))
    assert packed.flops == 4 * 64 * 2 * (10**2 + 20**2 + 30**2) / 2


def test_packed_cases_fill_their_row():
    cases = bench.packed_cases()
    assert all(sum(case.documents) == case.seqlen == 16384 and min(case.documents) > 0 for case in cases)
    assert [case.mask for case in cases[::2]] == ["28 documents", "92 documents", "6 documents"]


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
    bench.plot(results() + packed_results(), tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_the_readme_shows_the_stored_results():
    readme = (STORED.parents[2] / "README.md").read_text()
    for name in ("attention_h100", "attention_h100_portable"):
        assert bench.table(bench.read_csv(STORED / f"{name}.csv")) in readme and f"{name}.png" in readme


def packed_results():
    return [
        replace(r, mask=case.mask, batch=case.batch, seqlen=case.seqlen, heads=case.heads, kv_heads=case.kv_heads)
        for r in results()[:2]
        for case in (*bench.model_cases(), *bench.packed_cases())
    ]


def test_every_case_has_a_line_of_its_own():
    lines = bench.table(results() + packed_results()).splitlines()
    assert len(lines) == 2 + 2 + 9 + 3 and "| 64 | 32 / 8 | window 4096 | 2 x 8192 | 100 / 100 | - | - |" in lines


def test_a_backend_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU")
    monkeypatch.setattr(bench, "peers", lambda: {"triton": None, "fa2": None})
    with pytest.raises(bench.UserError, match="no fa3 here; to be had: triton, fa2"):
        bench.bench([], backends=["triton", "fa3"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(capsys):
    assert main(["bench"]) == 2
    assert capsys.readouterr().err == "error: bench: needs a CUDA GPU, and PyTorch sees none here\n"


@pytest.mark.parametrize(
    ("gpu", "short"),
    [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-80GB", "a100-sxm4-80gb"), ("AMD GPU", "amd-gpu")],
)
def test_results_are_named_by_the_gpu(gpu, short):
    assert bench.short_name(gpu) == short


def test_traffic_names_what_is_not_there(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(traffic, "peers", lambda: {"hopper": None})
    monkeypatch.setattr(sys, "argv", ["traffic.py", "--backends", "hopper", "fa3"])
    with pytest.raises(SystemExit):
        traffic.main()
    assert "no fa3 here; to be had: hopper, eager" in capsys.readouterr().err


def test_traffic_of_a_step_is_its_own_and_what_was_left_to_write():
    said = """==PROF== Connected
"ID","Kernel Name","dram__bytes_read.sum","dram__bytes_write.sum"
"","","byte","byte"
"0","forward_kernel","1,000","10"
"1","finish","200","20"
"2","spin_kernel(long)","5","5"
"3","reduce","9999","4"
"4","spin_kernel(long)","5","5"
"5","backward_kernel","70","7"
"6","spin_kernel(long)","5","5"
"7","reduce","9999","1"
"8","spin_kernel(long)","5","5"
"""
    assert traffic.moved(said) == [(1200, 34), (70, 8)]


def test_the_least_traffic_is_every_tensor_once():
    case = bench.BenchCase(128, True, 2, 100, 8, 2)
    q, kv, lse = 2 * 100 * 8 * 128 * 2, 2 * 100 * 2 * 128 * 2, 2 * 100 * 8 * 4
    assert traffic.least(case) == {"fwd": (q + 2 * kv, q + lse), "bwd": (3 * q + 2 * kv + lse, q + 2 * kv)}


def test_stored_traffic_is_that_of_the_kernels_readme():
    stored = traffic.table(traffic.read(STORED / "traffic_h100.csv"))
    assert stored in (ROOT / "axo_flash/kernels/README.md").read_text(encoding="utf-8")
