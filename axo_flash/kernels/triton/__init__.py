"""Portable Triton kernels: any GPU that Triton compiles for, and Triton's interpreter on a CPU."""

import torch

from axo_flash.kernels.spec import MAX_HEAD_DIM, AttentionSpec
from axo_flash.kernels.triton.backward import backward
from axo_flash.kernels.triton.forward import forward
from axo_flash.kernels.triton.tiles import INTERPRETED

__all__ = ["backward", "forward", "supports"]


def supports(spec: AttentionSpec, device: torch.device) -> str | None:
    """None if this backend computes `spec` on `device`, else every reason why not."""
    reasons = []
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < (7, 5):
            reasons.append(f"compute capability {capability[0]}.{capability[1]} is below 7.5 (Turing)")
        elif capability < (8, 0) and spec.dtype == "bfloat16":
            reasons.append("bfloat16 needs compute capability 8.0 (Ampere): use float16 here")
    elif device.type != "cuda" and not INTERPRETED:
        reasons.append(f"the device is {device.type}: it needs a CUDA or ROCm GPU (or TRITON_INTERPRET=1, for tests)")
    if spec.dtype not in ("float16", "bfloat16"):
        reasons.append(f"dtype {spec.dtype}: it computes in float16 or bfloat16")
    if spec.head_dim % 8 or spec.head_dim > MAX_HEAD_DIM:
        reasons.append(f"head_dim {spec.head_dim} is no multiple of 8 up to {MAX_HEAD_DIM}")
    return "; ".join(reasons) or None
