"""What `flash_attn.bert_padding` offers: padded batches to rows and back, with gradients."""

from __future__ import annotations

import torch

from axo_flash.varlen import cu_seqlens_from_lengths, pad, unpad

__all__ = [
    "index_first_axis",
    "index_first_axis_residual",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def index_first_axis(input: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Rows `indices` of input (n, ...)."""
    return input.index_select(0, indices)


def index_first_axis_residual(input: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Those rows, and input itself; what flows back into either is added up."""
    return input.index_select(0, indices), input


def index_put_first_axis(values: torch.Tensor, indices: torch.Tensor, first_axis_dim: int) -> torch.Tensor:
    """(first_axis_dim, ...), zeros but for the rows `indices`, which are `values`."""
    return values.new_zeros((first_axis_dim, *values.shape[1:])).index_copy(0, indices.long(), values)


def unpad_input(hidden_states: torch.Tensor, attention_mask: torch.Tensor, unused_mask: torch.Tensor | None = None):
    """The tokens of a padded batch, end to end.

    Args:
        hidden_states: (batch, seqlen, ...). attention_mask: (batch, seqlen), 1 or True = token.
        unused_mask: (batch, seqlen), 1 or True = no token, but laid out with them.

    Returns:
        rows (total, ...), their indices (total,) in the flattened batch, cu_seqlens int32 (batch + 1,), the longest length
        (an int, so the host waits for the device), and the number of tokens of each sequence, int32 (batch,).
    """
    laid_out = attention_mask.bool() if unused_mask is None else attention_mask.bool() | unused_mask.bool()
    lengths = laid_out.sum(-1, dtype=torch.int32)
    indices = laid_out.flatten().nonzero().flatten()
    used = attention_mask.sum(-1, dtype=torch.int32)
    return unpad(hidden_states, indices), indices, cu_seqlens_from_lengths(lengths), int(lengths.max()), used


def unpad_input_for_concatenated_sequences(hidden_states: torch.Tensor, attention_mask_in_length: torch.Tensor):
    """The tokens of rows of several sequences each: attention_mask_in_length (batch, seqlen) begins with their lengths,
    zeros behind. Returns rows, indices, cu_seqlens and the longest length, as above."""
    column = torch.arange(attention_mask_in_length.shape[1], device=hidden_states.device)
    indices = (column < attention_mask_in_length.sum(-1, keepdim=True)).flatten().nonzero().flatten()
    lengths = attention_mask_in_length[attention_mask_in_length > 0]
    return unpad(hidden_states, indices), indices, cu_seqlens_from_lengths(lengths), int(lengths.max())


def pad_input(hidden_states: torch.Tensor, indices: torch.Tensor, batch: int, seqlen: int) -> torch.Tensor:
    """Rows (total, ...) back to (batch, seqlen, ...), zeros elsewhere; indices int32 or int64 (transformers' are int32)."""
    return pad(hidden_states, indices.long(), batch, seqlen)
