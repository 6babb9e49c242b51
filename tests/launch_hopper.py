"""Launch the Hopper kernels over a driver that only takes down what it is handed, without a GPU.

    python launch_hopper.py

The first launch of a kernel goes Triton's own way, the others launch.py's shorter one: both are to hand over the same, and to
tell a profiler that listens. Prints how many launches there were, and fails where two differ. A script of its own, as
compile_hopper.py is.
"""

import itertools
import os
from types import SimpleNamespace

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.compiler.compiler import LazyDict

from axo_flash.kernels.hopper import launch
from axo_flash.kernels.spec import AttentionSpec


class Driver(nvidia.CudaDriver):
    """Of a GPU that is not there: `handed` holds the arguments of every launch, `told` how many came with a hook."""

    def __init__(self):
        self.handed = []
        self.told = 0
        self.launcher_cls = nvidia.CudaLauncher
        self.utils = SimpleNamespace(
            launch=self.launch,
            load_binary=lambda name, *_: (name, name, 0, 0, 1024),
            build_signature_metadata=tuple,
            get_device_properties=lambda _: {"max_shared_mem": 232448},
            # triton 3.7 gave the first the name of the second
            fill_tma_descriptor=lambda address, *shape: described(("descriptor", *shape)),
            fill_tma_descriptor_tiled=lambda address, *shape: described(("descriptor", *shape)),
        )

    def launch(self, *arguments):
        self.handed.append(described(arguments))
        self.told += any(isinstance(x, knobs.HookChain) and bool(x.calls) for x in arguments)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def described(x):
    """x, but for the addresses of tensors, which differ from call to call, and for what is handed to hooks that there are
    not."""
    if isinstance(x, torch.Tensor):
        return tuple(x.shape), x.stride(), x.dtype
    if isinstance(x, tuple | list):
        return tuple(described(i) for i in x)
    if isinstance(x, LazyDict | knobs.HookChain):
        return None
    return x if isinstance(x, int | float | str | None) else type(x)


def specification(**options) -> AttentionSpec:
    plain = dict(dtype="bfloat16", softmax_scale=0.1, causal=True, window_size=(-1, -1), deterministic=False)
    return AttentionSpec(**plain | options)


def passes(spec: AttentionSpec, rows: tuple[int, ...], **cu_seqlens) -> None:
    """One forward and one backward."""
    q = torch.zeros(*rows, spec.num_heads, spec.head_dim, dtype=torch.bfloat16)
    k = torch.zeros(*rows, spec.num_kv_heads, spec.head_dim, dtype=torch.bfloat16)
    out, lse = launch.forward(q, k, k, spec=spec, **cu_seqlens)
    launch.backward(out, q, k, k, out, lse, spec=spec, **cu_seqlens)


def main():
    driver = Driver()
    triton.runtime.driver.set_active(driver)
    # what triton compiles against the GPU's library: 3.6 a launcher for every kernel, later ones what marks the arguments
    nvidia.library_dirs, nvidia.compile_module_from_src = list, lambda **_: driver.utils
    nvidia.PyKernelArg = lambda **kind: tuple(kind.items())
    torch.cuda.current_device = lambda: None  # the tensors lie on the CPU, whose index is None
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.synchronize = lambda _: None
    launch.multiprocessors = lambda _: 132
    ends = torch.tensor([0, 100, 300], dtype=torch.int32)
    dense = specification(num_heads=4, num_kv_heads=4, head_dim=128, varlen=False), (1, 300), {}
    packed = specification(num_heads=4, num_kv_heads=2, head_dim=64, varlen=True), (300,)
    packed += (dict(cu_seqlens_q=ends, cu_seqlens_k=ends),)
    for (spec, rows, cu_seqlens), few_keys in itertools.product((dense, packed), (-1, 1000)):
        launch.FEW_KEYS = {64: few_keys, 128: few_keys}  # the backward in one kernel, and in two
        passes(spec, rows, **cu_seqlens)
        first = driver.handed.copy()
        driver.handed.clear()
        passes(spec, rows, **cu_seqlens)
        for ours, tritons in zip(driver.handed, first, strict=True):
            assert ours == tritons, f"launch.py hands over\n{ours}\nand Triton\n{tritons}"
        print("launches:", len(first))
        assert driver.told == 0
        knobs.runtime.launch_enter_hook.add(print)
        passes(spec, rows, **cu_seqlens)
        assert driver.told == len(first), f"{driver.told} of {len(first)} launches told their hook"
        knobs.runtime.launch_enter_hook.remove(print)
        driver.told = 0
        driver.handed.clear()


if __name__ == "__main__":
    main()
