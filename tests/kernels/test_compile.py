"""The Triton kernels compile, without a GPU, for every architecture that the tuning tables speak of."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from packaging.version import Version

# shared memory a program may use (bytes), and whether Triton has matrix instructions for it
TARGETS = {
    "cuda:75": (64 << 10, False),
    "cuda:80": (163 << 10, True),
    "cuda:89": (99 << 10, True),
    "cuda:90": (227 << 10, True),
    "cuda:100": (227 << 10, True),
    "cuda:120": (99 << 10, True),
    "hip:gfx942": (64 << 10, True),
}
# with the triton that pip installs today; 3.6 spills a few addresses in dkdv (scripts/bench/NOTES.md)
NO_SPILLS = {"cuda:80", "cuda:90"} if Version(triton.__version__) >= Version("3.9") else set()


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_and_fits(target):
    script = Path(__file__).parent.parent / "compile_kernels.py"
    done = subprocess.run([sys.executable, script, target, "64", "128"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(reports) == 12
    shared, matrix = TARGETS[target]
    for report in reports:
        assert report["shared"] <= shared, report
        assert (report["matrix_instructions"] > 0) == matrix, report
        if target in NO_SPILLS and report["group"] == 1:
            assert report["spills"] == 0, report


# arguments that each feature adds, and the instructions by which it is known
ADDED = {
    "softcap": (2, {"exponentials", "divisions"}),
    "alibi": (2, {"distances"}),
    "sinks": (1, {"divisions"}),
    "dropout": (3, {"high_products"}),
}
WITHOUT = {"forward": 28, "dkdv": 39, "dq": 34}  # arguments, as before there were such features


def test_features_cost_nothing_where_they_are_off():
    """No argument, no instruction and no shared memory of theirs, and, where they are on, theirs alone."""
    script = Path(__file__).parent.parent / "compile_kernels.py"
    done = subprocess.run([sys.executable, script, "features", "90"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    plain = {report["kernel"]: report for report in reports if report["feature"] is None}
    assert set(plain) == set(WITHOUT) and len(reports) == 3 + 4 + 3 + 3
    for kernel, report in plain.items():
        assert report["parameters"] == WITHOUT[kernel] and not report["high_products"], report
    for report in reports:
        if report["feature"] is None:
            continue
        off = plain[report["kernel"]]
        parameters, instructions = ADDED[report["feature"]]
        assert report["parameters"] == off["parameters"] + parameters, report
        assert report["shared"] == off["shared"], report
        for kind in ("exponentials", "divisions", "high_products", "distances"):
            assert (report[kind] > off[kind]) == (kind in instructions), (kind, report)
