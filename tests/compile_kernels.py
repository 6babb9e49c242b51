"""Compile the Triton kernels for an architecture that this machine need not have, and report what came out as JSON lines.

    python compile_kernels.py cuda:90 64 128
    python compile_kernels.py features 90

A script of its own, as the interpreter that the other tests run in takes the place of the compiler in a process.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from axo_flash.kernels.triton import tuning

forward = importlib.import_module("axo_flash.kernels.triton.forward")
backward = importlib.import_module("axo_flash.kernels.triton.backward")
KERNELS = {"forward": forward.forward_kernel, "dkdv": backward.dkdv_kernel, "dq": backward.dq_kernel}
ALIGNED = [["tt.divisibility", 16]]
MASKS = (
    {"group": 1, "causal": True, "window": False, "varlen": False},  # what the tables are tuned on
    {"group": 4, "causal": True, "window": True, "varlen": True},  # everything on
)


FEATURES = {  # the arguments that each comes with, and their types; launch.py passes None where it is off
    "softcap": {"cap_scale": "fp32", "cap_log2": "fp32"},
    "alibi": {"alibi_slopes": "*fp32", "stride_slopes": "i32"},
    "sinks": {"sinks": "*fp32"},
    "dropout": {"dropout_seed": "*i64", "dropped_below": "i32", "keep_scale": "fp32"},
}


def compile_kernel(name, config, head_dim, target, dtype, *, group, causal, window, varlen, features=()):
    """The compiled kernel, for arguments as launch.py passes them: aligned tensors, strides of 16 bytes."""
    kernel = KERNELS[name]
    constants = dict(
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        UNIT=8,
        VARLEN=varlen,
        HAS_LEFT=window,
        HAS_RIGHT=causal,
        BLOCK_M=config.rows,
        BLOCK_N=config.cols,
        TMA=config.tma,
    )
    if not varlen:
        constants |= {"cu_seqlens_q": None, "cu_seqlens_k": None}
    types = {arg: t for feature in FEATURES.values() for arg, t in feature.items()}
    on = {arg for feature in features for arg in FEATURES[feature]}
    constants |= {arg: None for arg in types if arg in kernel.arg_names and arg not in on}
    signature, attributes = {}, {}
    for i, arg in enumerate(kernel.arg_names):
        if arg.endswith("_desc"):
            block = [1, config.cols if arg[0] in "kv" else config.rows, 1, constants["BLOCK_D"]]
            signature[arg] = f"tensordesc<{dtype}{block}>"
            if not config.tma:
                constants[arg] = None
        elif arg in ("lse", "delta") or arg.startswith("cu_"):
            signature[arg] = "*fp32" if arg in ("lse", "delta") else "*i32"
        elif arg in ("q", "k", "v", "out", "dout", "dq", "dk", "dv"):
            signature[arg] = f"*{dtype}"
        elif arg in types:
            signature[arg] = types[arg]
        else:
            signature[arg] = "fp32" if arg.startswith("scale") else "i32"
        if arg in constants:
            signature[arg] = "constexpr"
        elif signature[arg].startswith("*") or arg.startswith("stride"):
            attributes[(i,)] = ALIGNED
    constants = {(kernel.arg_names.index(k),): v for k, v in constants.items()}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=config.options)


def spills(compiled) -> int:
    """Bytes of spilled registers, as the assembler counts them."""
    from triton.backends.nvidia.compiler import get_ptxas

    arch = re.search(r"\.target (sm_\w+)", compiled.asm["ptx"])[1]
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "kernel.ptx")
        ptx.write_text(compiled.asm["ptx"])
        ptxas = get_ptxas(int(re.search(r"\d+", arch)[0])).path
        command = [ptxas, "-v", f"--gpu-name={arch}", str(ptx), "-o", f"{folder}/kernel.cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return int(re.search(r"(\d+) bytes spill stores", said)[1])


def main(target, *head_dims):
    kind, arch = target.split(":")
    cuda = kind == "cuda"
    row = tuning.architecture(int(arch[:-1]), int(arch[-1])) if cuda else "amd"
    gpu = GPUTarget("cuda", int(arch), 32) if cuda else GPUTarget("hip", arch, 64)
    for head_dim in map(int, head_dims):
        for name in KERNELS:
            for mask in MASKS:
                config = tuning.default(name, row, triton.next_power_of_2(head_dim))
                compiled = compile_kernel(name, config, head_dim, gpu, "fp16" if arch == "75" else "bf16", **mask)
                code = compiled.asm["ptx" if cuda else "amdgcn"]
                report = {
                    "kernel": name,
                    "head_dim": head_dim,
                    "config": str(config),
                    **mask,
                    "shared": compiled.metadata.shared,
                    "matrix_instructions": len(re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_mfma", code)),
                    "spills": spills(compiled) if cuda else int(re.search(r"vgpr_spill_count: *(\d+)", code)[1]),
                }
                print(json.dumps(report), flush=True)


def main_features(target):
    """What each feature adds to the code: all instructions, and the ones that tell which."""
    gpu = GPUTarget("cuda", int(target), 32)
    for name in KERNELS:
        for feature in (None, *FEATURES):
            if feature and not set(FEATURES[feature]) <= set(KERNELS[name].arg_names):
                continue
            config = tuning.Config(32, 32, 4, 2)  # small, as the instructions of a tile are counted
            features = () if feature is None else (feature,)
            compiled = compile_kernel(name, config, 64, gpu, "bf16", **MASKS[0], features=features)
            ptx = compiled.asm["ptx"]
            report = {
                "kernel": name,
                "feature": feature,
                "parameters": len(re.findall(r"^\s*\.param", ptx, re.MULTILINE)),
                "exponentials": len(re.findall(r"ex2\.approx", ptx)),
                "divisions": len(re.findall(r"div\.(?:full|rn|approx)\S*f32|rcp", ptx)),
                "high_products": len(re.findall(r"mul\.hi\.u32", ptx)),
                "distances": len(re.findall(r"cvt\.rn\.f32\.s32", ptx)),
                "shared": compiled.metadata.shared,
            }
            print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main_features(sys.argv[2]) if sys.argv[1] == "features" else main(*sys.argv[1:])
