"""Packing: nothing lost, deterministic, tight and fast; collators: borders, masks, shapes."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
import torch

from axo_flash.data.packing import IGNORE, PackedCollator, PaddedCollator, concatenate, pack, packing_efficiency


def skewed(count: int, capacity: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [max(1, min(capacity, int(rng.lognormvariate(5.5, 1.1)))) for _ in range(count)]


def document(start: int, length: int) -> dict:
    ids = list(range(start, start + length))
    return {"input_ids": ids, "labels": list(ids)}


@pytest.mark.parametrize("capacity", [1, 7, 512, 4096])
def test_every_document_is_in_exactly_one_row_that_holds_it(capacity):
    lengths = skewed(3000, capacity)
    rows = pack(lengths, capacity)
    assert sorted(np.concatenate(rows).tolist()) == list(range(3000))
    assert all(sum(lengths[i] for i in row) <= capacity for row in rows)


def best_fit_decreasing(lengths: list[int], capacity: int) -> int:
    """The textbook's quadratic version: number of rows."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda i: rooms[i])] -= length
        else:
            rooms.append(capacity - length)
    return len(rooms)


@pytest.mark.parametrize("seed", range(20))
def test_as_many_rows_as_textbook_best_fit_decreasing(seed):
    rng = random.Random(seed)
    capacity = rng.choice([10, 37, 100])
    lengths = [rng.randint(1, capacity) for _ in range(rng.randint(0, 200))]
    assert len(pack(lengths, capacity)) == best_fit_decreasing(lengths, capacity)


def test_packing_depends_on_nothing_but_the_lengths():
    lengths = skewed(5000, 2048)
    first, second = pack(lengths, 2048), pack(np.array(lengths, dtype=np.int32), 2048)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert [int(row[0]) for row in first] == sorted(int(row[0]) for row in first)


def test_skewed_documents_fill_rows_to_97_percent():
    lengths = skewed(4000, 2048)
    assert packing_efficiency(lengths, len(pack(lengths, 2048)), 2048) > 0.97


def test_a_hundred_thousand_documents_take_about_a_second():
    lengths = skewed(100_000, 8192)
    started = time.perf_counter()
    pack(lengths, 8192)
    assert time.perf_counter() - started < 5  # 0.2 s on an idle core


@pytest.mark.parametrize("lengths", [[0], [5, 11], [-1]])
def test_documents_that_fit_no_row_are_refused(lengths):
    with pytest.raises(ValueError, match="from 1 to 10"):
        pack(lengths, 10)


def test_no_documents_no_rows():
    assert pack([], 8) == []
    assert packing_efficiency([], 0, 8) == 0.0


def test_concatenate_restarts_positions_and_masks_first_labels():
    row = concatenate([document(10, 3), document(20, 2), document(30, 1)])
    assert row["input_ids"] == [10, 11, 12, 20, 21, 30]
    assert row["labels"] == [IGNORE, 11, 12, IGNORE, 21, IGNORE]
    assert row["position_ids"] == [0, 1, 2, 0, 1, 0]
    assert row["length"] == 6


def test_packed_collator_flattens_and_counts_documents():
    rows = [concatenate([document(10, 3), document(20, 2)]), concatenate([document(30, 4)])]
    batch = PackedCollator(pad_token_id=0)(rows)
    assert {name: tuple(batch[name].shape) for name in ("input_ids", "labels", "position_ids")} == dict.fromkeys(
        ("input_ids", "labels", "position_ids"), (1, 9)
    )
    assert all(batch[name].dtype == torch.int64 for name in ("input_ids", "labels", "position_ids"))
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        assert batch[name].dtype == torch.int32 and batch[name].tolist() == [0, 3, 5, 9]
    assert batch["max_length_q"] == batch["max_length_k"] == 4 and type(batch["max_length_q"]) is int
    assert "attention_mask" not in batch


def test_padding_is_one_more_document_and_is_never_trained():
    rows = [concatenate([document(10, 3)]), concatenate([document(20, 8)]), concatenate([document(30, 7)])]
    batch = PackedCollator(pad_token_id=99, pad_to=8)(rows)
    assert batch["input_ids"].tolist() == [[10, 11, 12] + [99] * 5 + list(range(20, 28)) + list(range(30, 37)) + [99]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 4, *range(8), *range(7), 0]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 8, 16, 23, 24]
    assert (batch["labels"][0, [0, 3, 4, 5, 6, 7, 8, 16, 23]] == IGNORE).all()
    assert int((batch["labels"] != IGNORE).sum()) == 2 + 7 + 6


def test_no_label_crosses_a_border_whatever_the_rows_say():
    row = {"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4], "position_ids": [0, 1, 0, 1], "length": 4}
    assert PackedCollator(0)([row])["labels"].tolist() == [[IGNORE, 2, IGNORE, 4]]


def test_packed_shapes_are_static():
    documents = [document(0, n) for n in skewed(200, 64)]
    rows = [concatenate([documents[i] for i in row]) for row in pack([len(d["input_ids"]) for d in documents], 64)]
    collate = PackedCollator(0, pad_to=64)
    assert {tuple(collate(rows[i : i + 2])["input_ids"].shape) for i in range(0, len(rows) - 1, 2)} == {(1, 128)}


def test_padded_collator():
    rows = [concatenate([document(10, 3)]), concatenate([document(20, 70)])]
    batch = PaddedCollator(pad_token_id=7)(rows)
    assert batch["input_ids"].shape == (2, 128)  # 70 rounded up to a multiple of 64
    assert batch["input_ids"][0].tolist() == [10, 11, 12] + [7] * 125
    assert batch["labels"][0].tolist() == [IGNORE, 11, 12] + [IGNORE] * 125
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 70]
    assert PaddedCollator(7, pad_to=100)(rows)["input_ids"].shape == (2, 100)


def test_rows_too_long_for_the_batch_are_refused():
    row = concatenate([document(0, 9)])
    for collate in (PackedCollator(0, pad_to=8), PaddedCollator(0, pad_to=8)):
        with pytest.raises(ValueError, match="a row of 9 tokens does not fit in 8"):
            collate([row])


def test_padded_collator_refuses_packed_rows():
    with pytest.raises(ValueError, match="packed row"):
        PaddedCollator(0)([concatenate([document(0, 2), document(5, 2)])])
