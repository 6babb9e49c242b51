"""Time tile sizes of the Triton kernels on this GPU: what the tables in axo_flash/kernels/triton/tuning.py are filled from.

    python scripts/bench/tune.py [--head-dim 64 128] [--seqlen 4096]

Compiles on all cores first, then times one by one; prints TFLOP/s (4 B H S^2 D forward, halved when causal; the backward
kernels are credited their share of 2.5x that: dkdv 1.5, dq 1.0), best first.
"""

import argparse
import itertools
import os
import subprocess
import sys

import torch
import triton

from axo_flash.kernels.spec import AttentionSpec
from axo_flash.kernels.triton import backward as backward_function
from axo_flash.kernels.triton import forward as forward_function
from axo_flash.kernels.triton.tuning import Config

backward_module = sys.modules[backward_function.__module__]
forward_module = sys.modules[forward_function.__module__]

SHARE = {"forward": 1.0, "dkdv": 1.5, "dq": 1.0}
TILES = {
    "forward": [
        *[(128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 4, 3), (128, 64, 4, 2)],
        *[(64, 64, 4, 3), (64, 128, 4, 2), (64, 64, 8, 2)],
    ],
    "dkdv": [
        *[(64, 128, 8, 2), (64, 128, 8, 3), (32, 128, 8, 3), (128, 128, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3)],
        *[(32, 32, 8, 1), (128, 64, 4, 2), (32, 64, 4, 3)],
    ],
    "dq": [
        *[(128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 4, 3)],
        *[(64, 128, 4, 2), (64, 32, 8, 2), (128, 32, 4, 3)],
    ],
}


def configs(kernel):
    return [Config(*tile, tma=tma) for tile, tma in itertools.product(TILES[kernel], (False, True))]


def problems(args):
    for head_dim, causal in itertools.product(args.head_dim, (False, True)):
        yield head_dim, causal, args.seqlen, 16384 // args.seqlen, 2048 // head_dim


def run_all(args, hook):
    """One forward and one backward of each problem, hook(kernel, problem, flops, run) in place of launches."""
    for head_dim, causal, seqlen, batch, heads in problems(args):
        spec = AttentionSpec(heads, heads, head_dim, "bfloat16", head_dim**-0.5, causal)
        q, k, v, dout = torch.randn(4, batch, seqlen, heads, head_dim, device="cuda", dtype=torch.bfloat16).unbind(0)
        flops = 4 * batch * heads * seqlen**2 * head_dim * (0.5 if causal else 1)

        def launch(kernel, spec, device, run, problem=(head_dim, causal), flops=flops):
            hook(kernel, problem, flops, run)

        forward_module.run_tuned = backward_module.run_tuned = launch
        out, lse = forward_function(q, k, v, spec=spec)
        backward_function(dout, q, k, v, out, lse, spec=spec)


def compile_shard(args):
    def hook(kernel, problem, flops, run):
        for i, config in enumerate(configs(kernel) if kernel in TILES else [Config(64, 0, 4, 1)]):
            if kernel not in TILES or i % args.shards == args.shard:
                try_run(run, config)

    run_all(args, hook)


def try_run(run, config):
    try:
        run(config)
    except (triton.runtime.errors.OutOfResources, RuntimeError) as error:
        return type(error).__name__
    return None


def time_all(args):
    def hook(kernel, problem, flops, run):
        if kernel not in TILES:
            return run(Config(64, 0, 4, 1))
        rows = []
        for config in configs(kernel):
            refused = try_run(run, config)
            if refused is None:
                ms = triton.testing.do_bench(lambda c=config: run(c), warmup=20, rep=60, return_mode="median")
                rows.append((SHARE[kernel] * flops / ms * 1e-9, config))
        for tflops, config in sorted(rows, key=lambda row: -row[0])[: args.top]:
            print(
                f"{kernel:8} D{problem[0]} {'causal' if problem[1] else 'full  '} {tflops:6.1f} TFLOP/s  {config}",
                flush=True,
            )
        return run(max(rows, key=lambda row: row[0])[1])

    run_all(args, hook)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dim", type=int, nargs="+", default=[128, 64])
    parser.add_argument("--seqlen", type=int, default=4096)
    parser.add_argument("--top", type=int, default=5)
    parser.add_argument("--shards", type=int, default=min(os.cpu_count(), 14))
    parser.add_argument("--shard", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.shard is not None:
        return compile_shard(args)
    command = [sys.executable, *sys.argv, "--shard"]
    for process in [subprocess.Popen([*command, str(i)], stderr=subprocess.DEVNULL) for i in range(args.shards)]:
        process.wait()
    return time_all(args)


if __name__ == "__main__":
    main()
