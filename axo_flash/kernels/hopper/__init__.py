"""Hopper kernels (H100, H200, GH200): FlashAttention-3's method in Gluon, the low-level language of the triton wheel."""

import importlib.util
from functools import cache

import torch

from axo_flash.kernels.spec import AttentionSpec

__all__ = ["backward", "forward", "supports"]

HEAD_DIMS = (64, 128)
MIN_TRITON = (3, 6)


def supports(spec: AttentionSpec, device: torch.device) -> str | None:
    """None if this backend computes `spec` on `device`, else every reason why not."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"the device is {'an AMD GPU' if device.type == 'cuda' else device.type}: it needs a Hopper GPU"
    reasons = []
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        reasons.append(f"compute capability {capability[0]}.{capability[1]} is not 9.0 (Hopper)")
    if spec.dtype not in ("float16", "bfloat16"):
        reasons.append(f"dtype {spec.dtype}: it computes in float16 or bfloat16")
    if spec.head_dim not in HEAD_DIMS:
        reasons.append(f"head_dim {spec.head_dim} is none of {HEAD_DIMS}")
    if spec.extras:
        reasons.append(f"{', '.join(spec.extras)}: only the other backends have that")
    return "; ".join(filter(None, [*reasons, _triton_lacks()])) or None


@cache
def _triton_lacks() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return 'the package triton is not installed: pip install "axo-flash[flash-attn]"'
    import triton

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < MIN_TRITON:
        return f"triton {triton.__version__} has no Gluon for Hopper: pip install 'triton>=3.6'"
    return None


def forward(q, k, v, *, spec, cu_seqlens_q=None, cu_seqlens_k=None):
    """out, lse of q, k, v: see axo_flash.ops."""
    return _launch().forward(q, k, v, spec=spec, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)


def backward(dout, q, k, v, out, lse, *, spec, cu_seqlens_q=None, cu_seqlens_k=None, dlse=None):
    """dq, dk, dv."""
    return _launch().backward(
        dout, q, k, v, out, lse, spec=spec, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, dlse=dlse
    )


@cache
def _launch():
    """The kernels, imported late, as only a Hopper GPU has a use for them."""
    from axo_flash.kernels.hopper import launch

    return launch
