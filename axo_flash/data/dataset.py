"""The data of a run, from its configuration to what the Trainer takes: `prepare_data`.

Rows are the same on every machine for the same files, tokenizer, configuration and seed. Their order, and which of them
are held out, are Axolotl's: datasets one after the other, shuffled together by the seed before rows that cannot be used
are dropped, the validation rows then taken from the end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from axo_flash.data.files import DataError
from axo_flash.data.mounted import Transfer
from axo_flash.data.packing import PackedCollator, PaddedCollator, concatenate, pack, packing_efficiency
from axo_flash.data.prepared import Prepared, prepare

if TYPE_CHECKING:
    import datasets

    from axo_flash.config import Config

__all__ = ["DataError", "DataReport", "DroppedRows", "PreparedData", "RowDataset", "prepare_data"]

PLACES_SHOWN = 5
# Dropped for their length or mask after Axolotl has shuffled: they take part in the shuffle. Others it would not have
# met.
DROPPED_AFTER_SHUFFLE = ("too long", "too short", "no trained token")


@dataclasses.dataclass
class DroppedRows:
    """Rows dropped for one reason: how many, and the first few as "file:line: what is wrong"."""

    count: int
    places: list[str]


@dataclasses.dataclass
class DataReport:
    """What was read and what became of it. documents, tokens and packed_rows are of the training split.

    `sources` has path, size, mtime_ns (of files on mounts) and sha256 of every file as it was read; `transfer` says what
    it took to bring those on mounts to local disk, None where there were none. `trained_tokens` counts the tokens that a
    loss is taken on; `packing_efficiency` is the share of all packed rows' tokens that belongs to documents (packed_rows
    and it are None without packing); `seconds` is the wall time of `prepare_data`.

    Of a stream (`shards` is the number of its files, else None) `files`, `mount` and `bytes` are all there is to read, and
    every count is of the `shards_read` that training has come to; it stood still for them for `waited_seconds` in all.
    """

    files: list[str]
    mount: list[str]
    bytes: int
    rows_read: int
    rows_used: int
    rows_dropped: dict[str, DroppedRows]
    documents: int
    tokens: int
    trained_tokens: int
    eval_documents: int
    eval_tokens: int
    packed_rows: int | None
    packing_efficiency: float | None
    cache_path: str
    cache_hit: bool
    seconds: float
    sources: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    transfer: Transfer | None = None
    shards: int | None = None
    shards_read: int | None = None
    waited_seconds: float = 0.0


class Rows(Protocol):
    """What is trained on: a data set of torch's, by number (RowDataset) or as a stream (streaming.StreamRows)."""

    def examples(self) -> RowDataset:
        """Rows to look at."""


@dataclasses.dataclass
class RowDataset:
    """Map-style rows, each of one document or, packed, of several.

    Row i is documents[order[borders[i] : borders[i + 1]]].

    An item is {"input_ids", "labels", "position_ids": list[int], "length": int}; position ids restart at 0 with every
    document, whose first label is -100.
    """

    documents: datasets.Dataset
    order: np.ndarray  # (documents,) int64
    borders: np.ndarray  # (rows + 1,) int64
    lengths: list[int]  # tokens of every row

    def examples(self) -> RowDataset:
        """Rows to look at: all of them."""
        return self

    def __len__(self) -> int:
        return len(self.borders) - 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        columns = self.documents[self.order[self.borders[index] : self.borders[index + 1]].tolist()]
        pairs = zip(columns["input_ids"], columns["labels"], strict=True)
        return concatenate([{"input_ids": ids, "labels": labels} for ids, labels in pairs])


@dataclasses.dataclass
class PreparedData:
    """`train` and `eval` (None if val_set_size is 0), their collators, and the report.

    `eval_collator` differs from `collator` where only one of the two splits is packed. A context manager, at whose end
    `resources` are given back: those of a stream.
    """

    train: Rows
    eval: RowDataset | None
    collator: PackedCollator | PaddedCollator
    eval_collator: PackedCollator | PaddedCollator
    report: DataReport
    resources: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)

    def __enter__(self) -> PreparedData:
        return self

    def __exit__(self, *exception: object) -> None:
        self.resources.close()


def prepare_data(config: Config, tokenizer: Any) -> PreparedData:
    """Read, tokenise (or find in the cache), split and pack the data of a run.

    Args:
        config: the run's configuration.
        tokenizer: of the model; its pad token fills rows up.

    Raises:
        DataError: for data that cannot be read or used, each with what was got and what to do.
    """
    started = time.monotonic()
    prepared = prepare(config, tokenizer)
    columns = Columns(prepared)
    dropped = dropped_rows(prepared, columns)
    refuse_unusable(config, prepared, columns, dropped)
    train, held_out = _split(_order(columns, config.seed), config.val_set_size)
    if config.eval_sample_packing and len(held_out):
        _refuse_small_eval(int(columns.length[held_out].sum()), len(held_out), config.sequence_len)

    documents = prepared.documents.select_columns(["input_ids", "labels"])
    train_rows = _rows(documents, train, columns.length, config.sequence_len, config.sample_packing)
    eval_rows = None
    if len(held_out):
        eval_rows = _rows(documents, held_out, columns.length, config.sequence_len, bool(config.eval_sample_packing))
    collator, eval_collator = collators(config, tokenizer)
    lengths, rows = columns.length[train], len(train_rows)
    report = DataReport(
        files=[origin.name for origin in prepared.origins],
        mount=sorted({origin.mount or "Hugging Face Hub" for origin in prepared.origins}),
        bytes=sum(origin.size for origin in prepared.origins),
        rows_read=sum(file["rows"] for file in prepared.meta["files"]),
        rows_used=len(np.unique((columns.dataset << 48 | columns.row)[columns.usable])),
        rows_dropped=dropped,
        documents=len(train),
        tokens=int(lengths.sum()),
        trained_tokens=int(columns.trained[train].sum()),
        eval_documents=len(held_out),
        eval_tokens=int(columns.length[held_out].sum()),
        packed_rows=rows if config.sample_packing else None,
        packing_efficiency=packing_efficiency(lengths, rows, config.sequence_len) if config.sample_packing else None,
        cache_path=str(prepared.path),
        cache_hit=prepared.cache_hit,
        seconds=time.monotonic() - started,
        sources=[
            {"path": origin.name, "size": origin.size, "mtime_ns": origin.copy and origin.copy.mtime_ns,
             "sha256": origin.sha256}
            for origin in prepared.origins
        ],
        transfer=prepared.transfer,
    )  # fmt: skip
    return PreparedData(train_rows, eval_rows, collator, eval_collator, report)


class Columns:
    """The columns of a prepared set but for the tokens, as int64 arrays (records,), with `usable` bool (records,).

    `reason` indexes `reasons`, where "" stands for a document that can be used.
    """

    def __init__(self, prepared: Prepared):
        table = prepared.documents.data

        def integers(name: str) -> np.ndarray:
            return table.column(name).to_numpy().astype(np.int64)

        self.length, self.trained = integers("length"), integers("trained")
        self.dataset, self.file = integers("dataset"), integers("file")
        self.row, self.rank, self.number = integers("row"), integers("rank"), integers("number")
        encoded = table.column("reason").combine_chunks().dictionary_encode()
        self.reasons: list[str] = encoded.dictionary.to_pylist()
        self.reason = encoded.indices.to_numpy(zero_copy_only=False)
        self.usable = self.dropped_for("")

    def dropped_for(self, *reasons: str) -> np.ndarray:
        return np.isin(self.reason, [index for index, name in enumerate(self.reasons) if name in reasons])

    def described(self, prepared: Prepared, record: int) -> str:
        """Place and detail of a dropped row."""
        place = prepared.place(int(self.file[record]), int(self.number[record]))
        return f"{place}: {prepared.documents.data.column('detail')[record].as_py()}"


def dropped_rows(prepared: Prepared, columns: Columns) -> dict[str, DroppedRows]:
    """Dropped rows by reason, the most frequent first."""
    result = {}
    for index, name in enumerate(columns.reasons):
        if name:
            found = np.flatnonzero(columns.reason == index)
            places = [columns.described(prepared, int(record)) for record in found[:PLACES_SHOWN]]
            result[name] = DroppedRows(len(found), places)
    for file, origin in zip(prepared.meta["files"], prepared.origins, strict=True):
        if file["bad"]:
            row = result.setdefault("broken row", DroppedRows(0, []))
            row.count += len(file["bad"])
            row.places += [f"{origin.name}: {detail}" for _, detail in file["bad"]][: PLACES_SHOWN - len(row.places)]
    return dict(sorted(result.items(), key=lambda item: -item[1].count))


def refuse_unusable(config: Config, prepared: Prepared, columns: Columns, dropped: dict[str, DroppedRows]) -> None:
    """Raise DataError if a file has no row that can be used, or a row is too long and that is to be an error."""
    if config.excess_length_strategy == "raise" and "too long" in dropped:
        long = dropped["too long"]
        raise DataError(
            f"{long.count} rows are longer than sequence_len {config.sequence_len}: {'; '.join(long.places)}. "
            "Raise sequence_len, or set excess_length_strategy to drop or truncate."
        )
    used = np.bincount(columns.file[columns.usable], minlength=len(prepared.origins))
    for index, (origin, file) in enumerate(zip(prepared.origins, prepared.meta["files"], strict=True)):
        if used[index] or not file["rows"]:
            continue
        mine = np.flatnonzero(columns.file == index)
        counts = np.bincount(columns.reason[mine], minlength=len(columns.reasons))
        why = [f"{counts[i]} {columns.reasons[i]}" for i in np.argsort(-counts, kind="stable") if counts[i]]
        first = columns.described(prepared, int(mine[0])) if len(mine) else f"{origin.name}: {file['bad'][0][1]}"
        raise DataError(
            f"none of the {file['rows']} rows of {origin.name} can be used as type "
            f"{config.datasets[origin.dataset].type!r}: {', '.join(why) or 'all are broken'}. First: {first}. "
            "Correct the file, or type and the field names of this dataset."
        )


def _order(columns: Columns, seed: int) -> np.ndarray:
    """Indices of usable documents in training order: datasets in turn, each by rank, then all shuffled by the seed."""
    candidates = np.flatnonzero(columns.usable | columns.dropped_for(*DROPPED_AFTER_SHUFFLE))
    candidates = candidates[np.lexsort((columns.rank[candidates], columns.dataset[candidates]))]
    candidates = candidates[np.random.default_rng(seed).permutation(len(candidates))]
    return candidates[columns.usable[candidates]]


def _split(order: np.ndarray, val_set_size: float) -> tuple[np.ndarray, np.ndarray]:
    """(train, eval): the last `val_set_size` documents are held out; a fraction is rounded up."""
    if not val_set_size:
        return order, order[:0]
    count = int(val_set_size) if val_set_size >= 1 else math.ceil(val_set_size * len(order))
    if count >= len(order):
        raise DataError(
            f"val_set_size {val_set_size} would hold out {count} of {len(order)} documents: "
            "nothing is left to train on. Make it smaller."
        )
    return order[: len(order) - count], order[len(order) - count :]


def _refuse_small_eval(tokens: int, documents: int, sequence_len: int) -> None:
    if tokens < sequence_len:
        raise DataError(
            f"the eval split is too small to pack: its {documents} documents have {tokens} tokens, one packed row "
            f"takes {sequence_len}. Set `eval_sample_packing: false`, or a larger val_set_size."
        )


def _rows(
    documents: datasets.Dataset, order: np.ndarray, length: np.ndarray, sequence_len: int, packed: bool
) -> RowDataset:
    if not packed:
        return RowDataset(documents, order, np.arange(len(order) + 1), length[order].tolist())
    return packed_rows(documents, order, length, pack(length[order], sequence_len))


def packed_rows(
    documents: datasets.Dataset, order: np.ndarray, length: np.ndarray, rows: list[np.ndarray]
) -> RowDataset:
    """Rows of several documents; `rows` are indices into `order`, as `pack` gives them."""
    borders = np.cumsum([0, *map(len, rows)])
    order = order[np.concatenate(rows)]
    return RowDataset(documents, order, borders, np.add.reduceat(length[order], borders[:-1]).tolist())


def collators(
    config: Config, tokenizer: Any
) -> tuple[PackedCollator | PaddedCollator, PackedCollator | PaddedCollator]:
    """(for train, for eval). Rows that are not packed in a packed run are laid flat as they are, without padding."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad is None:
        raise DataError("the tokenizer has neither a pad nor an EOS token: set special_tokens.pad_token.")
    fixed = config.sequence_len if config.pad_to_sequence_len else None
    if config.sample_packing:
        train = PackedCollator(pad, fixed)
        return train, train if config.eval_sample_packing else PackedCollator(pad)
    train = PaddedCollator(pad, fixed)
    return train, PackedCollator(pad, fixed) if config.eval_sample_packing else train
