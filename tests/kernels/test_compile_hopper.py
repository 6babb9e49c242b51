"""The Hopper kernels compile, without a GPU, into what they were written for: products that run while others compute; and
what a launch of them hands over is what Triton would.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from sass import parse, undefined_uniform_reads

SHARED_MEMORY = 232448  # bytes a program may use on sm_90
# HGMMA instructions of one pass of the main loop: 16 deep each, two products forward, three for dq, four for dk and dv
PRODUCTS = {
    ("forward", 128): 16,
    ("forward", 64): 12,
    ("backward", 128): 24,
    ("backward", 64): 16,
    ("dq", 128): 20,
    ("dq", 64): 12,
    ("dkdv", 128): 24,
    ("dkdv", 64): 16,
}
# Instructions that load or store local memory: none in any of the loops but, with triton 3.8 and 3.9, a few addresses of one
# configuration each; and where the reductions are, with which local memory shares a queue, one.
SPILLS = {("backward", 128): 10, ("dkdv", 128): 2}
SPILLS_BESIDE_REDUCTIONS = 1


def run(script: str, *arguments: str) -> list[str]:
    """The lines that a script of tests/ prints, in a process that has a compiler where this one has the interpreter."""
    command = [sys.executable, Path(__file__).parent.parent / script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "head_dim"), PRODUCTS)
def test_compiles_as_written(kernel, head_dim):
    reports = [json.loads(line) for line in run("compile_hopper.py", kernel, str(head_dim))]
    assert len(reports) == {"forward": 8 if head_dim == 128 else 6, "backward": 6}.get(kernel, 4)
    warpgroups = 3 if (kernel, head_dim) == ("forward", 64) else 2
    for report in reports:
        assert report["shared"] <= SHARED_MEMORY, report
        assert report["warnings"] == [], report  # products made to wait for one another, or registers not handed over
        assert report["undefined"] == [], report
        assert report["products"] == [PRODUCTS[kernel, head_dim]] * warpgroups, report
        assert report["spilled_in_loops"] <= SPILLS.get((kernel, head_dim), 0), report
        assert report["spilled_beside_reductions"] <= SPILLS_BESIDE_REDUCTIONS, report


def test_a_launch_hands_over_what_triton_would():
    # forward; prepare, backward, finish; or dq, dk and dv; and a schedule for each that has tiles
    assert run("launch_hopper.py") == [f"launches: {n}" for n in (4, 3, 6, 6)]


def test_a_register_that_one_of_two_paths_leaves_undefined_is_found():
    """The shape of what ptxas 12.8 once made of the forward kernel."""
    listing = """
        /*0000*/                   UMOV UR7, 0x10 ;
        /*0010*/               @P4 BRA `(.L_x_2) ;
        /*0020*/                   UIADD3 UR24, UP0, UR7, 0x2, URZ ;
.L_x_1:
        /*0030*/                   UIADD3 UR28, UP0, UR24, 0x2, URZ ;
        /*0040*/               @P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0050*/                   UIADD3 UR32, UP1, UR24, 0x4, URZ ;
        /*0060*/                   EXIT ;
"""
    code, _ = parse(listing)
    assert undefined_uniform_reads(code) == ["5: UR[24] in UIADD3 UR32, UP1, UR24, 0x4, URZ"]
    mended, _ = parse(listing.replace("UMOV UR7, 0x10", "UMOV UR24, 0x10"))
    assert [read for read in undefined_uniform_reads(mended) if "[24]" in read] == []
