"""Which tokens attend together: masks and positions to sequences laid end to end."""

import pytest
import torch

import axo_flash.layout
from axo_flash.layout import find_layout


def layout_of(mask=None, positions=None, seqlen_q=None):
    mask = None if mask is None else torch.tensor(mask, dtype=torch.bool)
    positions = None if positions is None else torch.tensor(positions)
    batch, seqlen_k = (mask if mask is not None else positions).shape
    seqlen_q = seqlen_q or seqlen_k
    return find_layout(mask, positions, batch, seqlen_q, seqlen_k, torch.device("cpu"))


@pytest.mark.parametrize(
    "mask, positions",
    [
        (None, [[0, 1, 2, 3]]),
        (None, [[5, 6, 7, 8]]),  # one document, from the middle of something
        ([[1, 1, 1], [1, 1, 1]], None),
        ([[1, 1, 1], [1, 1, 1]], [[0, 1, 2]]),  # positions that are the same for all rows
    ],
)
def test_one_document_a_row_without_padding_needs_no_layout(mask, positions):
    assert layout_of(mask, positions) is None


@pytest.mark.parametrize(
    "mask, positions, lengths, indices",
    [
        pytest.param(None, [[0, 1, 2, 0, 1]], [3, 2], None, id="packed"),
        pytest.param(None, [[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]], [3, 2, 1, 4], None, id="two packed rows"),
        pytest.param(None, [[0, 1, 2, 3, 4], [0, 0, 1, 2, 3]], [5, 1, 4], None, id="one of two rows is packed"),
        pytest.param(None, [[4, 5, 9, 10, 3]], [2, 2, 1], None, id="documents that begin anywhere"),
        pytest.param(None, [[0, 1, 2, 0, 0]], [3, 1, 1], None, id="padding as documents of position 0"),
        pytest.param([[1, 1, 1, 1, 1]], [[0, 1, 2, 0, 1]], [3, 2], None, id="a mask of ones changes nothing"),
        pytest.param([[0, 0, 1, 1], [1, 1, 1, 1]], None, [2, 4], [2, 3, 4, 5, 6, 7], id="left-padded"),
        pytest.param(
            [[0, 0, 1, 1], [1, 1, 1, 1]],
            [[0, 0, 0, 1], [0, 1, 2, 3]],
            [2, 4],
            [2, 3, 4, 5, 6, 7],
            id="positions as generate gives them",
        ),
        pytest.param([[1, 1, 0], [1, 0, 0]], [[0, 1, 2], [0, 1, 2]], [2, 1], [0, 1, 3], id="right-padded"),
        pytest.param([[0, 0], [1, 1]], None, [0, 2], [2, 3], id="a row without tokens"),
        pytest.param([[1, 1, 1, 1, 0]], [[0, 1, 0, 1, 2]], [2, 2], [0, 1, 2, 3], id="packed and padded"),
        pytest.param([[1, 1, 0, 1, 1]], [[0, 1, 0, 0, 1]], [2, 2], [0, 1, 3, 4], id="padding between documents"),
        pytest.param([[1, 1, 0, 1, 1]], [[0, 1, 2, 3, 4]], [4], [0, 1, 3, 4], id="padding inside a document"),
        pytest.param([[1, 1, 0, 1, 1]], [[0, 1, 1, 2, 3]], [4], [0, 1, 3, 4], id="padding that is not counted"),
    ],
)
def test_documents(mask, positions, lengths, indices):
    layout = layout_of(mask, positions)
    assert layout.cu_seqlens_q.dtype == torch.int32
    assert layout.cu_seqlens_q.diff().tolist() == layout.cu_seqlens_k.diff().tolist() == lengths
    assert layout.cu_seqlens_q[0] == 0
    assert indices == (layout.q_indices if layout.q_indices is None else layout.q_indices.tolist())
    assert indices == (layout.k_indices if layout.k_indices is None else layout.k_indices.tolist())


def test_queries_are_the_last_columns():
    layout = layout_of([[0, 1, 1, 1], [1, 1, 1, 0]], [[1, 2], [2, 3]], seqlen_q=2)
    assert layout.cu_seqlens_q.tolist() == [0, 2, 3] and layout.q_indices.tolist() == [0, 1, 2]
    assert layout.cu_seqlens_k.tolist() == [0, 3, 6] and layout.k_indices.tolist() == [1, 2, 3, 4, 5, 6]


def test_a_single_query_sees_the_tokens_before_the_empty_tail():
    layout = layout_of([[0, 1, 1, 0], [1, 1, 1, 0]], [[2], [3]], seqlen_q=1)
    assert layout.q_indices is None and layout.cu_seqlens_q.tolist() == [0, 1, 2]
    assert layout.cu_seqlens_k.tolist() == [0, 2, 5]


def test_holes_are_told():
    assert layout_of([[1, 0, 1, 1]]).holes
    assert not layout_of([[0, 1, 1, 0]]).holes


def test_packed_queries_over_cached_keys_are_refused():
    with pytest.raises(ValueError, match="4 queries see 6 keys, and position_ids restart"):
        layout_of([[1, 1, 1, 1, 1, 1]], [[2, 3, 0, 1]], seqlen_q=4)


def test_values_are_read_once_a_forward_and_again_when_they_change(monkeypatch):
    reads = []
    original = axo_flash.layout._eager_layout
    monkeypatch.setattr(axo_flash.layout, "_eager_layout", lambda *a: reads.append(1) or original(*a))
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    first = [find_layout(None, positions, 1, 5, 5, positions.device) for _ in range(4)]
    assert len(reads) == 1 and all(layout is first[0] for layout in first)
    find_layout(None, positions.clone(), 1, 5, 5, positions.device)
    assert len(reads) == 2
    positions[0, 3:] += 3  # now consecutive
    assert find_layout(None, positions, 1, 5, 5, positions.device) is None
    assert len(reads) == 3


def test_nothing_is_remembered_of_tensors_that_do_not_count_their_changes():
    with torch.inference_mode():
        positions = torch.tensor([[0, 1, 2, 0, 1]])
        assert find_layout(None, positions, 1, 5, 5, positions.device) is not None
        positions[0, 3:] += 3
        assert find_layout(None, positions, 1, 5, 5, positions.device) is None
