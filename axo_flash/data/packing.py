"""Bin packing of documents into rows, and the collators that turn rows into batches.

Packing works on lengths alone and depends on nothing but them: the same lengths give the same rows on every machine,
and resuming a run needs no state. The order of the rows in an epoch is the Trainer's sampler's, seeded there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

IGNORE = -100
PAD_MULTIPLE = 64  # padded batches without a fixed length are rounded up to this, as in Axolotl


def pack(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[np.ndarray]:
    """Pack documents into as few rows of `capacity` tokens as best-fit decreasing does.

    Longest document first, each into the row with the least room that still takes it (Johnson et al. 1974; for packing
    training data: Ding et al. 2024, arXiv:2404.10830, who find that row in a segment tree over the room left). As room
    is an integer up to `capacity`, a bit set does here: bit r is set while a row with room r is open, and the best row
    is the lowest bit from the document's length up. 100,000 documents take a fraction of a second.

    Args:
        lengths: tokens of every document, each from 1 to `capacity`.
        capacity: tokens of a row.

    Returns:
        For each row the indices of its documents, ascending. Rows are ordered by their first document.

    Raises:
        ValueError: for a document that is empty or longer than a row.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if lengths.size and not (lengths.min() >= 1 and lengths.max() <= capacity):
        raise ValueError(f"document lengths must be from 1 to {capacity}, got {lengths.min()} to {lengths.max()}")
    rows: list[list[int]] = []
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]  # room left -> rows
    room_bits = 0
    for document in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[document])
        candidates = room_bits >> length
        if candidates:
            room = length + (candidates & -candidates).bit_length() - 1
            row = open_rows[room].pop()
            if not open_rows[room]:
                room_bits ^= 1 << room
            rows[row].append(document)
        else:
            room, row = capacity, len(rows)
            rows.append([document])
        room -= length
        if room:
            open_rows[room].append(row)
            room_bits |= 1 << room
    packed = [np.array(sorted(row), dtype=np.int64) for row in rows]
    return sorted(packed, key=lambda row: int(row[0]))


def packing_efficiency(lengths: Sequence[int] | np.ndarray, rows: int, capacity: int) -> float:
    """Share of the rows' tokens that belongs to documents, from 0 to 1."""
    return float(np.sum(lengths)) / (rows * capacity) if rows else 0.0


def concatenate(documents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Documents -> one row: ids and labels end to end, position ids restarting at 0, no label across a border.

    The first token of a document is never a target: what precedes it in the row is another document.
    """
    row: dict[str, Any] = {"input_ids": [], "labels": [], "position_ids": []}
    for document in documents:
        ids, labels = document["input_ids"], document["labels"]
        row["input_ids"] += ids
        row["labels"] += [IGNORE, *labels[1:]]
        row["position_ids"] += range(len(ids))
    row["length"] = len(row["input_ids"])
    return row


@dataclass(frozen=True)
class PackedCollator:
    """Packed rows -> one flat row for variable-length attention.

    With `pad_to`, every row is filled up to that many tokens by one more document of `pad_token_id`, masked, its
    position ids from 0: a batch then always has the same shape (1, micro_batch_size * pad_to).
    """

    pad_token_id: int
    pad_to: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor | int]:
        """Items of a packed dataset -> the batch of one forward pass.

        Returns:
            `input_ids`, `labels`, `position_ids`: int64 (1, T); `cu_seq_lens_q`, `cu_seq_lens_k`: int32 (documents +
            1,); `max_length_q`, `max_length_k`: int, the longest document of the batch.

        Raises:
            ValueError: for a row longer than `pad_to`.
        """
        import torch

        parts: dict[str, list[np.ndarray]] = {"input_ids": [], "labels": [], "position_ids": []}
        for row in rows:
            missing = self.pad_to - len(row["input_ids"]) if self.pad_to else 0
            if missing < 0:
                raise ValueError(f"a row of {len(row['input_ids'])} tokens does not fit in {self.pad_to}")
            filling = {"input_ids": self.pad_token_id, "labels": IGNORE, "position_ids": np.arange(missing)}
            for name, part in parts.items():
                part.append(np.asarray(row[name], dtype=np.int64))
                part.append(np.full(missing, filling[name], dtype=np.int64))
        batch = {name: torch.from_numpy(np.concatenate(part)[None]) for name, part in parts.items()}  # (1, T)
        positions = batch["position_ids"][0]
        starts = torch.nonzero(positions == 0)[:, 0]
        cu_seq_lens = torch.cat([starts, torch.tensor([positions.numel()])]).to(torch.int32)
        batch["labels"][0, starts] = IGNORE
        longest = int(cu_seq_lens.diff().max())
        return batch | {
            "cu_seq_lens_q": cu_seq_lens, "cu_seq_lens_k": cu_seq_lens.clone(),
            "max_length_q": longest, "max_length_k": longest,
        }  # fmt: skip


@dataclass(frozen=True)
class PaddedCollator:
    """Documents -> a batch padded on the right, to `pad_to` tokens or to the longest rounded up to a multiple of 64."""

    pad_token_id: int
    pad_to: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Items of an unpacked dataset -> `input_ids`, `labels` and `attention_mask`, int64 (len(rows), S)."""
        import torch

        if any(row["position_ids"][-1] + 1 != len(row["input_ids"]) for row in rows):
            raise ValueError(
                "a packed row came to the collator for single documents: its documents would see one another"
            )
        longest = max(len(row["input_ids"]) for row in rows)
        width = self.pad_to or -(-longest // PAD_MULTIPLE) * PAD_MULTIPLE
        if longest > width:
            raise ValueError(f"a row of {longest} tokens does not fit in {width}")
        filling = {"input_ids": self.pad_token_id, "labels": IGNORE, "attention_mask": 0}
        batch = {name: torch.full((len(rows), width), value, dtype=torch.int64) for name, value in filling.items()}
        for index, row in enumerate(rows):
            length = len(row["input_ids"])
            batch["input_ids"][index, :length] = torch.tensor(row["input_ids"])
            batch["labels"][index, :length] = torch.tensor(row["labels"])
            batch["attention_mask"][index, :length] = 1
        return batch
