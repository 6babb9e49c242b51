"""Lengths, masks and position_ids to cu_seqlens, and padded batches to rows and back.

cu_seqlens is int32 (batch + 1,): sequence i occupies rows cu_seqlens[i] ... cu_seqlens[i + 1] - 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def cu_seqlens_from_lengths(lengths, device=None) -> torch.Tensor:
    """cu_seqlens of sequences with these lengths (ints, or an int tensor)."""
    lengths = torch.as_tensor(lengths, dtype=torch.int32, device=device)
    return F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def cu_seqlens_from_position_ids(position_ids: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Documents of packed rows: a new one starts at every row and wherever a position is not its neighbour's plus one.

    Args:
        position_ids: (batch, seqlen) integers.

    Returns:
        cu_seqlens over the batch * seqlen tokens in row-major order, and the longest document's length. The number of
        documents depends on the values, so on a GPU this waits for them: call it once a batch, not once a layer.
    """
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    first = starts.flatten().nonzero().flatten()
    cu_seqlens = F.pad(first, (0, 1), value=position_ids.numel()).to(torch.int32)
    return cu_seqlens, int(cu_seqlens.diff().max())


def cu_seqlens_from_mask(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """A padding mask (batch, seqlen), nonzero = token, to the flat indices of the tokens (total,), cu_seqlens and the
    longest length. Waits for the values, as above."""
    mask = mask.bool()
    lengths = mask.sum(-1, dtype=torch.int32)
    return mask.flatten().nonzero().flatten(), cu_seqlens_from_lengths(lengths), int(lengths.max())


def unpad(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """(batch, seqlen, ...) to the rows (total, ...) that `indices` names."""
    return x.flatten(0, 1).index_select(0, indices)  # its backward adds rows; indexing's sorts them first


def pad(x: torch.Tensor, indices: torch.Tensor, batch: int, seqlen: int) -> torch.Tensor:
    """Rows (total, ...) back to (batch, seqlen, ...), zeros elsewhere: the inverse of `unpad`."""
    out = x.new_zeros((batch * seqlen, *x.shape[1:]))
    return out.index_copy(0, indices, x).unflatten(0, (batch, seqlen))
