"""What the attention functions may be given: every fault of a call in one error."""

import torch

from axo_flash.kernels.spec import MAX_HEAD_DIM


def check(name, q, k, v, rank):
    shape, kv_shape = q.shape, k.shape
    if (
        len(shape) == len(kv_shape) == rank
        and v.shape == kv_shape
        and shape[-1] == kv_shape[-1]
        and kv_shape[-2]
        and not shape[-2] % kv_shape[-2]
        and 1 <= shape[-1] <= MAX_HEAD_DIM
        and q.dtype == k.dtype == v.dtype
        and q.device == k.device == v.device
    ):
        return  # as almost always; what follows finds out what is wrong
    layout = "(batch, seqlen, heads, head_dim)" if rank == 4 else "(total, heads, head_dim)"
    errors = [
        f"{n} must be {layout}, got {tuple(x.shape)}" for n, x in zip("qkv", (q, k, v), strict=True) if x.ndim != rank
    ]
    if not errors:
        if k.shape != v.shape:
            errors.append(f"k and v must have one shape, got {tuple(k.shape)} and {tuple(v.shape)}")
        if q.shape[-1] != k.shape[-1]:
            errors.append(f"q and k must have one head_dim, got {q.shape[-1]} and {k.shape[-1]}")
        if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
            errors.append(f"q's heads must be a multiple of k's, got {q.shape[-2]} and {k.shape[-2]}")
        if not 1 <= q.shape[-1] <= MAX_HEAD_DIM:
            errors.append(f"head_dim must be 1 to {MAX_HEAD_DIM}, got {q.shape[-1]}")
    if not q.dtype == k.dtype == v.dtype:
        errors.append(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if not q.device == k.device == v.device:
        errors.append(f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}")
    if errors:
        raise ValueError(f"{name}: " + "; ".join(errors))


def check_cu_seqlens(q, cu_seqlens_q, cu_seqlens_k):
    errors = []
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if cu.dtype != torch.int32 or cu.ndim != 1 or cu.numel() < 2:
            errors.append(f"{name} must be int32 (batch + 1,), got {cu.dtype} {tuple(cu.shape)}")
        elif cu.device != q.device:
            errors.append(f"{name} must be on q's device {q.device}, got {cu.device}")
    if not errors and cu_seqlens_q.shape != cu_seqlens_k.shape:
        errors.append(
            f"cu_seqlens_q and cu_seqlens_k must have one length, got {cu_seqlens_q.numel()} and {cu_seqlens_k.numel()}"
        )
    if errors:
        raise ValueError("flash_attn_varlen_func: " + "; ".join(errors))


def check_logits(name, q, batch, alibi_slopes, sinks):
    """What is added to the scores, or joins them: a value a head."""
    errors, heads = [], q.shape[-2]
    if alibi_slopes is not None:
        if alibi_slopes.dtype != torch.float32 or not _fits(alibi_slopes, (heads,), (batch, heads)):
            errors.append(
                f"alibi_slopes must be float32 ({heads},) or ({batch}, {heads}), got {alibi_slopes.dtype} "
                f"{tuple(alibi_slopes.shape)}"
            )
        if alibi_slopes.requires_grad and torch.is_grad_enabled():
            errors.append("alibi_slopes get no gradient, and these require one: detach them")
    if sinks is not None and not (sinks.is_floating_point() and _fits(sinks, (heads,))):
        errors.append(f"sinks must be floating point ({heads},), got {sinks.dtype} {tuple(sinks.shape)}")
    for what, x in (("alibi_slopes", alibi_slopes), ("sinks", sinks)):
        if x is not None and x.device != q.device:
            errors.append(f"{what} must be on q's device {q.device}, got {x.device}")
    if errors:
        raise ValueError(f"{name}: " + "; ".join(errors))


def _fits(x, *shapes) -> bool:
    """Whether x has one of these shapes; size by size, as torch.compile cannot look a symbolic shape up among others."""
    return any(x.ndim == len(shape) and all(a == b for a, b in zip(x.shape, shape, strict=True)) for shape in shapes)
