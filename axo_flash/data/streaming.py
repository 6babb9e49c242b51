"""`streaming: true`: rows of a data set that is larger than the local disk, in an order that the seed alone decides.

An epoch takes every shard once, in an order drawn from (seed, epoch). A shard's documents are shuffled by (seed, epoch,
shard), packed `streaming_multipack_buffer_size` at a time, and the packed rows shuffled; so rows of several shards never
mix, and the position in the data is four numbers: the row of the run, the epoch, the shard's place in it and the row of
the shard. A resumed run goes on there: it reads the shard that it was in, and none that was used up before.

Tokens, labels and what is dropped are those of the prepared path, from the same code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from axo_flash.data.dataset import (
    PLACES_SHOWN,
    Columns,
    DataError,
    DataReport,
    DroppedRows,
    PreparedData,
    RowDataset,
    collators,
    dropped_rows,
    packed_rows,
    prepare_data,
    refuse_unusable,
)
from axo_flash.data.formats import make_encoder
from axo_flash.data.packing import pack, packing_efficiency
from axo_flash.data.prepared import cache_root, encoding_key
from axo_flash.data.shards import Feed, Loaded, Shard, StreamStopped, make_feed

if TYPE_CHECKING:
    from axo_flash.config import Config

LOG = logging.getLogger(__name__)
__all__ = ["StreamRows", "StreamStopped", "open_data"]
STATE_FILE = "stream.json"  # in a checkpoint: the position, and the shards as they were
FORMAT = 1
BUFFER = 10_000  # documents, where streaming_multipack_buffer_size is null: Axolotl's default


@dataclasses.dataclass(frozen=True)
class Position:
    """Where in the data a row of the run comes from."""

    row: int = 0  # of the run, from 0
    epoch: int = 0
    place: int = 0  # of the shard in the order of the epoch
    shard_row: int = 0


def open_data(config: Config, tokenizer: Any, checkpoint: Path | None = None) -> PreparedData:
    """The data of a run: streamed if it says so, from where the local `checkpoint` was, else prepared whole.

    Use the result as a context manager: a stream ends with it. Raises DataError and MountError.
    """
    if not config.streaming:
        return prepare_data(config, tokenizer)
    refuse_several_devices()
    started = time.monotonic()
    held_out = _test_rows(config, tokenizer)
    with contextlib.ExitStack() as stack:
        encoders = [make_encoder(dataset, config, tokenizer) for dataset in config.datasets]
        feed = make_feed(config, encoders, cache_root(config.dataset_prepared_path), stack)
        position = Position()
        if checkpoint is not None:
            position = read_state(checkpoint / STATE_FILE, feed.shards)
        report = _empty_report(config, feed)
        if held_out is not None:
            report.eval_documents, report.eval_tokens = len(held_out.order), sum(held_out.lengths)
        key = encoding_key(config, encoders, tokenizer)
        rows = StreamRows(config, feed, report, position, key)
        collator, eval_collator = collators(config, tokenizer)
        report.seconds = time.monotonic() - started
        return PreparedData(rows, held_out, collator, eval_collator, report, stack.pop_all())


def _test_rows(config: Config, tokenizer: Any) -> RowDataset | None:
    """The rows of test_datasets, prepared whole."""
    if not config.test_datasets:
        return None
    packing = bool(config.eval_sample_packing)
    changes = {"streaming": None, "datasets": config.test_datasets, "test_datasets": None, "sample_packing": packing}
    prepared = prepare_data(dataclasses.replace(config, **changes), tokenizer)
    for reason, rows in prepared.report.rows_dropped.items():
        LOG.warning("test_datasets: %d rows dropped: %s (%s)", rows.count, reason, rows.places[0])
    return prepared.train


def refuse_several_devices() -> None:
    """Raise DataError where several processes or GPUs would each want rows of their own."""
    import torch

    processes, gpus = int(os.environ.get("WORLD_SIZE", "1")), torch.cuda.device_count()
    if processes > 1:
        raise DataError(
            f"streaming: true feeds one process, and WORLD_SIZE is {processes}: start the run without torchrun or "
            "accelerate launch, or set streaming: false."
        )
    if gpus > 1:
        raise DataError(
            f"streaming: true feeds one GPU, and {gpus} are visible: choose one with CUDA_VISIBLE_DEVICES=0, or set "
            "streaming: false."
        )


# ------------------------------------------------------------------------------------------------------------ the rows
class StreamRows:
    """The rows of a whole run by number, 0 up to what max_steps takes, each made when it is asked for.

    Map-style, so that a trainer that resumes asks for the first row that it needs and skips none by reading it. Rows are
    to be asked for in rising order: an older shard is gone.
    """

    def __init__(self, config: Config, feed: Feed, report: DataReport, start: Position, key: str):
        self.config, self.feed, self.report, self.start = config, feed, report, start
        self.fingerprint = _fingerprint(feed.shards, key)
        self.stopped: Callable[[], bool] = lambda: False  # asked while a row is waited for
        self._batch = config.micro_batch_size * config.gradient_accumulation_steps
        self._first = start.row - start.shard_row  # number of the present shard's first row
        self._rows: RowDataset | None = None
        self._loaded: Loaded | None = None
        self._past: deque[tuple[int, Position]] = deque()  # (rows of a shard, position of its first), the present last

    def __len__(self) -> int:
        return self.config.max_steps * self._batch

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        if index < max(self._first, self.start.row):
            raise RuntimeError(f"row {index} was asked for after row {self._first}: its shard is gone")
        while self._rows is None or index >= self._first + len(self._rows):
            self._advance()
        return self._rows[index - self._first]

    def examples(self) -> RowDataset:
        """The rows of the present shard, the first one if none was read yet."""
        if self._rows is None:
            self._advance()
        return self._rows

    def epochs(self, row: int) -> float:
        """Passes over the data up to a row of the run, whole shards counted."""
        position = self.position(row)
        return position.epoch + position.place / len(self.feed.shards)

    def position(self, row: int) -> Position:
        """Where row number `row` comes from, for a row not long past, or the one after the last that was handed out."""
        if not self._past:
            return self.start
        for count, first in self._past:
            if first.row <= row < first.row + count:
                return dataclasses.replace(first, row=row, shard_row=row - first.row)
        count, last = self._past[-1]
        if row != last.row + count:
            raise RuntimeError(f"row {row} is not among those from {self._past[0][1].row} to {last.row + count}")
        epoch, place = _next(last.epoch, last.place, len(self.feed.shards))
        return Position(row, epoch, place, 0)

    def write_state(self, path: Path, row: int) -> None:
        """The position of row number `row`, for a checkpoint that was taken before it."""
        state = {
            "format": FORMAT,
            "position": dataclasses.asdict(self.position(row)),
            "shards": [shard.state() for shard in self.feed.shards],
        }
        path.write_text(json.dumps(state), encoding="utf-8")

    def _advance(self) -> None:
        """Take the next shard in the place of the present one."""
        if not self.feed.started:
            self.feed.start(self._order())
        if self._rows is not None:
            self._first += len(self._rows)
            folder = self._loaded.folder
            self._rows = self._loaded = None  # a file that is mapped keeps its place on the disk
            self.feed.release(folder)
        self._loaded = loaded = self.feed.next(self.stopped)
        columns = Columns(loaded.prepared)
        dropped = dropped_rows(loaded.prepared, columns)
        refuse_unusable(self.config, loaded.prepared, columns, dropped)
        self._rows = shard_rows(self.config, loaded, columns)
        self._past.append((len(self._rows), Position(self._first, loaded.epoch, loaded.place)))
        # a checkpoint is of rows up to a batch and one read ahead before the newest: no shard before them matters
        while len(self._past) > 1 and self._past[1][1].row <= self._first - 2 * self._batch:
            self._past.popleft()
        _add(self.report, self.feed, loaded, columns, dropped, self._rows, self.config)

    def _order(self) -> Iterator[tuple[int, int, int]]:
        """(epoch, place, shard) from the start on, without end."""
        count = len(self.feed.shards)
        epoch, place = self.start.epoch, self.start.place
        while True:
            order = shard_order(self.config.seed, epoch, count)
            yield epoch, place, int(order[place])
            epoch, place = _next(epoch, place, count)


def _next(epoch: int, place: int, count: int) -> tuple[int, int]:
    return (epoch, place + 1) if place + 1 < count else (epoch + 1, 0)


def shard_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The shards of an epoch."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def shard_rows(config: Config, loaded: Loaded, columns: Columns) -> RowDataset:
    """The rows of a shard in the order of one epoch."""
    random = np.random.default_rng([config.seed, loaded.epoch, loaded.index])
    order = random.permutation(np.flatnonzero(columns.usable))
    documents, length = loaded.prepared.documents.select_columns(["input_ids", "labels"]), columns.length
    if not config.sample_packing:
        return RowDataset(documents, order, np.arange(len(order) + 1), length[order].tolist())
    size = config.streaming_multipack_buffer_size or BUFFER
    buffers = range(0, len(order), size)
    packed = (
        row + start for start in buffers for row in pack(length[order[start : start + size]], config.sequence_len)
    )
    rows = list(packed)
    return packed_rows(documents, order, length, [rows[index] for index in random.permutation(len(rows))])


# -------------------------------------------------------------------------------------------------------- the position
def read_state(path: Path, shards: list[Shard]) -> Position:
    """The position in a checkpoint; DataError if the shards are no longer those that it was taken of."""
    state = json.loads(path.read_text(encoding="utf-8"))
    if state["format"] != FORMAT:
        raise DataError(
            f"{path} is of format {state['format']}, this version reads {FORMAT}: resume with the older one."
        )
    before = state["shards"]
    different = [f"{len(shards)} shards, and were {len(before)}"] if len(shards) != len(before) else []
    different += [
        reason for shard, old in zip(shards, before, strict=False) if (reason := shard.differs_from(old)) is not None
    ]
    if different:
        more = f" and {len(different) - PLACES_SHOWN} more" if len(different) > PLACES_SHOWN else ""
        raise DataError(
            f"the run cannot go on from {path.parent}: the data are not those that it was trained on: "
            f"{'; '.join(different[:PLACES_SHOWN])}{more}. Restore the files; or start afresh: another output_dir, or "
            "neither resume_from_checkpoint nor auto_resume_from_checkpoints."
        )
    for shard, (*_, sha256) in zip(shards, before, strict=True):
        shard.sha256 = shard.sha256 or sha256  # what was read before has to be read again byte for byte
    return Position(**state["position"])


def _fingerprint(shards: list[Shard], key: str) -> str:
    """Which rows in which order, as far as it is known before they are read; `read_state` looks closer."""
    known = [[shard.dataset, os.path.basename(shard.file.path), shard.size] for shard in shards]
    return hashlib.sha256(json.dumps([key, known]).encode("utf-8", "surrogateescape")).hexdigest()[:32]


# ---------------------------------------------------------------------------------------------------------- the report
def _empty_report(config: Config, feed: Feed) -> DataReport:
    return DataReport(
        files=[shard.file.path for shard in feed.shards],
        mount=sorted({str(shard.file.mount) for shard in feed.shards}),
        bytes=sum(shard.size for shard in feed.shards),
        rows_read=0,
        rows_used=0,
        rows_dropped={},
        documents=0,
        tokens=0,
        trained_tokens=0,
        eval_documents=0,
        eval_tokens=0,
        packed_rows=0 if config.sample_packing else None,
        packing_efficiency=0.0 if config.sample_packing else None,
        cache_path=str(feed.folder),
        cache_hit=False,
        seconds=0.0,
        shards=len(feed.shards),
        shards_read=0,
    )


def _add(
    report: DataReport,
    feed: Feed,
    loaded: Loaded,
    columns: Columns,
    dropped: dict[str, DroppedRows],
    rows: RowDataset,
    config: Config,
) -> None:
    """Count a shard that training has come to; one that is read in several epochs counts each time."""
    (origin,) = loaded.prepared.origins
    report.shards_read += 1
    report.rows_read += loaded.prepared.meta["files"][0]["rows"]
    report.rows_used += len(np.unique(columns.row[columns.usable]))
    report.documents += int(columns.usable.sum())
    report.tokens += int(columns.length[columns.usable].sum())
    report.trained_tokens += int(columns.trained[columns.usable].sum())
    for reason, found in dropped.items():
        known = report.rows_dropped.setdefault(reason, DroppedRows(0, []))
        known.count += found.count
        known.places += found.places[: PLACES_SHOWN - len(known.places)]
    if report.packed_rows is not None:
        report.packed_rows += len(rows)
        report.packing_efficiency = packing_efficiency(report.tokens, report.packed_rows, config.sequence_len)
    report.sources = [source for source in report.sources if source["path"] != origin.name]
    report.sources.append(
        {"path": origin.name, "size": origin.size, "mtime_ns": feed.shards[loaded.index].mtime_ns, "sha256": origin.sha256}
    )  # fmt: skip
    report.transfer, report.waited_seconds = feed.transfer, feed.waited
