"""Keys and values that lie in pages, as caches of servers do, brought into one piece."""

from __future__ import annotations

import torch


def from_pages(
    name: str,
    k: torch.Tensor,
    v: torch.Tensor,
    block_table: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_k: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """k and v of `flash_attn_varlen_func`, copied out of their pages without a word to the host; gradients go back to them.

    Args:
        name: of the function, for errors.
        k, v: (num_pages, page_size, num_kv_heads, head_dim).
        block_table: int32 or int64 (batch, pages of a sequence): the numbers of its pages; what lies behind a sequence's
            last page is not read.
        cu_seqlens_k: int32 (batch + 1,), on q's device.
        max_seqlen_k: no sequence has more keys, which is not looked at, as lengths lie on the device; None: as many as
            block_table has room for.

    Returns:
        k and v (batch * longest, num_kv_heads, head_dim), where rows past cu_seqlens_k[-1] hold anything.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    batch = cu_seqlens_k.numel() - 1
    if k.ndim != 4 or k.shape != v.shape:
        raise ValueError(
            f"{name}: with block_table k and v must be (num_pages, page_size, num_kv_heads, head_dim), got {tuple(k.shape)} "
            f"and {tuple(v.shape)}"
        )
    if block_table.ndim != 2 or block_table.shape[0] != batch or block_table.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{name}: block_table must be int32 or int64 (batch, pages of a sequence) with batch {batch}, got "
            f"{block_table.dtype} {tuple(block_table.shape)}"
        )
    devices = [str(x.device) for x in (cu_seqlens_k, k, v, block_table)]
    if len(set(devices)) > 1:
        raise ValueError(f"{name}: q, k, v and block_table must be on one device, got {', '.join(devices)}")
    page_size, room = k.shape[1], block_table.shape[1] * k.shape[1]
    longest = room if max_seqlen_k is None else max_seqlen_k
    if longest > room:
        raise ValueError(
            f"{name}: max_seqlen_k is {longest}, but block_table has {block_table.shape[1]} pages of {page_size} a sequence"
        )
    row = torch.arange(batch * longest, dtype=torch.int32, device=k.device)
    sequence = torch.searchsorted(cu_seqlens_k[1:], row, right=True).clamp(max=batch - 1)
    col = (row - cu_seqlens_k[sequence]).clamp(max=room - 1)
    where = block_table[sequence, col // page_size] * page_size + col % page_size
    where = torch.where(row < cu_seqlens_k[-1], where, 0)  # behind the last, the table may hold anything
    return k.flatten(0, 1)[where], v.flatten(0, 1)[where]
