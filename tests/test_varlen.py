"""cu_seqlens from what people have, and padded batches to rows and back."""

import pytest
import torch

from axo_flash.varlen import (
    cu_seqlens_from_lengths,
    cu_seqlens_from_mask,
    cu_seqlens_from_position_ids,
    pad,
    unpad,
)


def test_lengths():
    cu = cu_seqlens_from_lengths([3, 0, 5])
    assert cu.dtype == torch.int32 and cu.tolist() == [0, 3, 3, 8]


@pytest.mark.parametrize(
    ("position_ids", "cu_seqlens", "longest"),
    [
        ([[0, 1, 2, 3]], [0, 4], 4),
        ([[0, 1, 0, 1, 2]], [0, 2, 5], 3),
        ([[0, 1, 2], [0, 0, 1]], [0, 3, 4, 6], 3),  # a row always starts a document
        ([[5, 6, 7, 2, 3]], [0, 3, 5], 3),  # and so does any jump, wherever it leads
    ],
)
def test_position_ids(position_ids, cu_seqlens, longest):
    cu, max_seqlen = cu_seqlens_from_position_ids(torch.tensor(position_ids))
    assert (cu.tolist(), max_seqlen) == (cu_seqlens, longest)


def test_mask_and_back():
    mask = torch.tensor([[0, 1, 1], [1, 0, 0], [0, 0, 0]])
    indices, cu, longest = cu_seqlens_from_mask(mask)
    assert (indices.tolist(), cu.tolist(), longest) == ([1, 2, 3], [0, 2, 3, 3], 2)
    x = torch.randn(3, 3, 2, requires_grad=True)
    rows = unpad(x, indices)
    assert rows.shape == (3, 2)
    back = pad(rows, indices, 3, 3)
    assert torch.equal(back, x * mask[..., None])
    back.sum().backward()
    assert torch.equal(x.grad, mask[..., None].expand(3, 3, 2).float())
