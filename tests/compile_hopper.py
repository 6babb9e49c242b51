"""Compile the Hopper kernels for sm_90, without a GPU, in the configurations in use; report what came out as JSON lines.

    python compile_hopper.py forward 128 [backward 64 ...]

A script of its own, as the interpreter that the other tests run in takes the place of the compiler in a process.
"""

import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import triton
import triton.experimental.gluon.language as gl
from sass import loops, parse, undefined_uniform_reads
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from axo_flash.kernels.hopper import launch
from axo_flash.kernels.hopper.backward_kernel import backward_kernel
from axo_flash.kernels.hopper.dq_kernel import dq_kernel
from axo_flash.kernels.hopper.forward_kernel import forward_kernel

ALIGNED = [["tt.divisibility", 16]]
# what Llama-2 and Mistral train with, plain and packed; then everything on at once
MASKS = [
    dict(causal=True, window=False, varlen=False),
    dict(causal=False, window=False, varlen=False),
    dict(causal=True, window=True, varlen=False),
    dict(causal=True, window=False, varlen=True),
    dict(causal=True, window=True, varlen=True),
    dict(causal=False, window=True, varlen=True),
]
KERNELS = {
    "forward": (forward_kernel, launch.FORWARD),
    "backward": (backward_kernel, launch.BACKWARD),
    "dq": (dq_kernel, launch.DQ),
    "dkdv": (backward_kernel, launch.DK_DV),
}
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


def configurations(name: str, head_dim: int):
    """(constants of the kernel) for each mask, or some of them; the forward kernel also as it is for short sequences, dq once
    with a gradient of lse."""
    config = KERNELS[name][1][head_dim]
    masks = MASKS if name in ("forward", "backward") else MASKS[::3] + MASKS[-2:]
    for mask, variant in itertools.product(masks, (False, True)):
        if variant and mask not in (MASKS[0], MASKS[-2]):
            continue
        constants = dict(D=head_dim, VARLEN=mask["varlen"], HAS_LEFT=mask["window"], HAS_RIGHT=mask["causal"]) | config
        if name == "dq":
            if variant == (mask is MASKS[-2]):
                yield constants | dict(HAS_DLSE=variant)
        elif not variant:
            yield constants
        elif config.get("SCORES_FIRST"):
            yield constants | dict(SCORES_FIRST=False)


def descriptor(box: list[int], dtype: str) -> str:
    layout = gl.NVMMASharedLayout.get_default_for(
        box, {"bf16": gl.bfloat16, "fp16": gl.float16, "fp32": gl.float32}[dtype]
    )
    return f"tensordesc<{dtype}{box},{layout!r}>"


def compile_kernel(name: str, constants: dict, dtype: str):
    """The compiled kernel, for arguments as launch.py passes them."""
    kernel = KERNELS[name][0]
    outer = [1, 1, 1] if constants["VARLEN"] else [1, 1]
    keys = constants["BLOCK_N"] // (2 if kernel is backward_kernel else 1)
    rows = 64
    boxes = {n: ([*outer, rows, constants["D"]], dtype) for n in ("q_desc", "do_desc", "o_desc", "dq_desc")}
    boxes |= {n: ([*outer, keys, constants["D"]], dtype) for n in ("k_desc", "v_desc")}
    boxes |= {n: ([1, rows], "fp32") for n in ("lse_desc", "dp_start_desc")}
    pointers = dict.fromkeys(("lse", "dlse", "lse_log2", "dp_start", "dq_acc"), "fp32")
    pointers |= dict.fromkeys(("schedule", "counter"), "i32")
    pointers |= dict.fromkeys(("dq", "dk", "dv"), dtype)
    if not constants.get("WITH_DQ", True):
        constants = constants | dict(dq_acc=None, dq=None)
    if not constants.get("HAS_DLSE", True):
        constants = constants | dict(dlse=None)
    signature, attributes = {}, {}
    for i, arg in enumerate(kernel.arg_names):
        if arg in constants:
            signature[arg] = "constexpr"
        elif arg in boxes:
            signature[arg] = descriptor(*boxes[arg])
        elif arg in pointers:
            signature[arg] = f"*{pointers[arg]}"
            attributes[(i,)] = ALIGNED
        else:
            signature[arg] = "fp32" if arg.startswith("scale") else "i32"
    values = {(kernel.arg_names.index(k),): v for k, v in constants.items()}
    source = GluonASTSource(kernel, signature, values, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=4, enable_fp_fusion=True))


def inspect(compiled) -> dict:
    """What the assembler said, and what its code does."""
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(compiled.asm["ptx"])
        cubin.write_bytes(compiled.asm["cubin"])
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", ptx, "-o", Path(folder, "again.cubin")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        listing = subprocess.run([TOOLS / "nvdisasm", cubin], capture_output=True, text=True, check=True).stdout
    code, _ = parse(listing)
    # the loop over blocks of each warpgroup that computes: the innermost one with products and exponentials
    main = innermost(body for body in loops(code) if count(body, "HGMMA") and count(body, "MUFU") >= 16)
    # that of the one that adds to dQ
    adding = innermost(body for body in loops(code) if count(body, "HGMMA") and count(body, "REDG"))
    return {
        "shared": compiled.metadata.shared,
        "warnings": [line for line in said.splitlines() if "wgmma" in line or "setmaxnreg" in line],
        "products": [count(body, "HGMMA") for body in main],
        "spilled_in_loops": max((count(body, "LDL", "STL") for body in main), default=0),
        "spilled_beside_reductions": max((count(body, "LDL", "STL") for body in adding), default=0),
        "undefined": undefined_uniform_reads(code),
    }


def innermost(bodies) -> list:
    bodies = list(bodies)
    return [
        body
        for body in bodies
        if not any(len(other) < len(body) and other[0] is ins for other in bodies for ins in body)
    ]


def count(body, *names: str) -> int:
    return sum(ins.name in names for ins in body)


def main(*jobs):
    for name, head_dim in zip(jobs[::2], jobs[1::2], strict=True):
        for i, constants in enumerate(configurations(name, int(head_dim))):
            dtype = "fp16" if i % 3 == 1 else "bf16"
            report = dict(kernel=name, dtype=dtype, constants=constants) | inspect(
                compile_kernel(name, constants, dtype)
            )
            print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
