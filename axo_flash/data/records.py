"""From a local copy of a data file to its rows, each with its place in the file for error messages.

Two on-disk shapes are enough: JSON lines, read back by byte range, and Arrow IPC record batches, read back by index.
`stage` brings every format into one of them and cuts it into spans of about 256 KiB: the unit of work that is handed to
a tokenising process. Nothing holds more than one span's rows as Python objects, except a JSON array, whose text is held
whole (but not its rows).
"""

from __future__ import annotations

import codecs
import json
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from axo_flash.data.files import DataError, DataFile, LocalCopy

SPAN_BYTES = 256 << 10
BATCH_ROWS = 1000
CSV_CHUNK_ROWS = 10_000  # as `datasets`, which infers the column types of a CSV file chunk by chunk


class BadRow(NamedTuple):
    """A row that cannot be read at all."""

    detail: str


class Span(NamedTuple):
    """A run of rows: byte range or record batch number `start`..`stop`; `line` and `row` number its first row."""

    start: int
    stop: int
    line: int
    row: int


@dataclass
class Staged:
    """A file ready to be read span by span. `unit` is what a row's number counts: "line" or "row"."""

    name: str
    path: Path
    shape: str  # "lines" or "batches"
    unit: str
    spans: list[Span] = field(default_factory=list)
    rows: int = 0
    bad: list[tuple[int, str]] = field(default_factory=list)  # rows that the format's own parser gave up on


def stage(file: DataFile, copy: LocalCopy) -> Staged:
    """Bring the fetched `copy` of `file` into a shape that can be read span by span. Raises DataError."""
    if copy.size == 0:
        raise DataError(f"{file.path} is empty (0 bytes): it should hold rows in {file.format} format.")
    if file.format == "json":
        return (
            _stage_array(file, copy) if _first_byte(copy.path) == b"[" else _stage_lines(file.path, copy.path, "line")
        )
    if file.format == "csv":
        return _stage_csv(file, copy)
    return _stage_arrow(file, copy)


def read_span(staged: Staged, span: Span) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """Yield (line or row number in the file, row) for every row of a span, blank lines left out."""
    if staged.shape == "batches":
        import pyarrow as pa

        with pa.memory_map(str(staged.path)) as memory, pa.ipc.open_file(memory) as reader:
            yield from enumerate(reader.get_batch(span.start).to_pylist(), start=span.line)
        return
    with open(staged.path, "rb") as lines:
        lines.seek(span.start)
        block = lines.read(span.stop - span.start)
    for number, line in enumerate(block.split(b"\n"), start=span.line):
        if line.strip():
            yield number, _parse(line)


def _parse(line: bytes) -> dict[str, Any] | BadRow:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8 at byte {error.start + 1} of the line")
    except json.JSONDecodeError as error:
        return BadRow(f"{error.msg} at column {error.colno}: {line[:60].decode('utf-8', 'replace')!r}")
    if not isinstance(row, dict):
        return BadRow(f"a JSON object is wanted, got {type(row).__name__}: {line[:60].decode('utf-8', 'replace')!r}")
    return row


def _first_byte(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(1 << 16).removeprefix(codecs.BOM_UTF8).lstrip()[:1]


def _stage_lines(name: str, path: Path, unit: str) -> Staged:
    """Cut a file of JSON lines into spans at line ends; rows are its non-blank lines."""
    staged = Staged(name, path, "lines", unit)
    with open(path, "rb") as lines:
        start = len(codecs.BOM_UTF8) if lines.read(3) == codecs.BOM_UTF8 else 0
        lines.seek(start)
        position, first_line, first_row, number = start, 1, 0, 0
        for line in lines:
            number += 1
            position += len(line)
            staged.rows += bool(line.strip())
            if position - start >= SPAN_BYTES:
                staged.spans.append(Span(start, position, first_line, first_row))
                start, first_line, first_row = position, number + 1, staged.rows
    if position > start:
        staged.spans.append(Span(start, position, first_line, first_row))
    if staged.rows == 0:
        raise DataError(f"{name} holds nothing but blank lines: it should hold one JSON object a line.")
    if number > 1 and isinstance(_parse(_line(path, 0)), BadRow):
        _refuse_one_object(name, path)
    return staged


def _line(path: Path, index: int) -> bytes:
    with open(path, "rb") as lines:
        for _ in range(index):
            next(lines)
        return next(lines).removeprefix(codecs.BOM_UTF8)


def _refuse_one_object(name: str, path: Path) -> None:
    """Raise DataError if the file is one JSON object spread over lines, such as {"data": [...]}."""
    try:
        whole = json.loads(path.read_bytes())
    except ValueError:
        return  # neither: its lines are reported one by one
    keys = ", ".join(whole) if isinstance(whole, dict) else type(whole).__name__
    raise DataError(
        f"{name} is one JSON object over several lines (keys: {keys}); wanted is an array of rows or one row a line. "
        f"If the rows are under a key: jq -c '.KEY[]' {name} > rows.jsonl"
    )


def _stage_array(file: DataFile, copy: LocalCopy) -> Staged:
    """A JSON array becomes JSON lines, numbered from 1. As in `datasets`, a string stands for {"text": string}."""
    try:
        text = copy.path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file.path} is not UTF-8 (byte {error.start}): convert it, for instance with iconv."
        ) from error
    lines = copy.path.with_suffix(".lines")
    with open(lines, "w", encoding="utf-8") as out:
        for element in _array_elements(text, file.path):
            out.write(json.dumps({"text": element} if isinstance(element, str) else element) + "\n")
    if lines.stat().st_size == 0:
        raise DataError(f"{file.path} is an empty JSON array: it should hold rows.")
    return _stage_lines(file.path, lines, "row")


def _array_elements(text: str, name: str) -> Iterator[Any]:
    """Decode the elements of a JSON array one after the other."""
    decoder, space = json.JSONDecoder(), re.compile(r"[ \t\r\n]*")
    position = space.match(text, text.index("[") + 1).end()
    try:
        while text[position : position + 1] != "]":
            element, position = decoder.raw_decode(text, position)
            yield element
            position = space.match(text, position).end()
            if text[position : position + 1] == ",":
                position = space.match(text, position + 1).end()
            elif text[position : position + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
        rest = space.match(text, position + 1).end()
        if rest != len(text):
            raise json.JSONDecodeError("Extra data after the array", text, rest)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{name}:{error.lineno}: broken JSON, {error.msg} at column {error.colno}. Nothing after it in the array "
            "can be read: mend it, or write one row a line (.jsonl), where a broken line costs only itself."
        ) from error


def _stage_csv(file: DataFile, copy: LocalCopy) -> Staged:
    """CSV is read as `datasets` does: by pandas, in chunks of 10,000 rows, empty cells and NA words becoming null."""
    import pandas as pd
    import pyarrow as pa

    lines, skipped = copy.path.with_suffix(".lines"), []
    try:
        with open(lines, "w", encoding="utf-8") as out, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", pd.errors.ParserWarning)
            with pd.read_csv(copy.path, chunksize=CSV_CHUNK_ROWS, on_bad_lines="warn") as chunks:
                for chunk in chunks:
                    for row in pa.Table.from_pandas(chunk, preserve_index=False).to_pylist():
                        out.write(json.dumps(row) + "\n")
        for warning in caught:
            skipped += re.findall(r"Skipping line (\d+): (.+)", str(warning.message))
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise DataError(f"{file.path} cannot be read as CSV: {str(error).strip()}") from error
    if lines.stat().st_size == 0:
        raise DataError(f"{file.path} has a header but no rows.")
    staged = _stage_lines(file.path, lines, "row")
    staged.bad = [(int(number), f"line {number}: {detail.strip()}") for number, detail in skipped]
    return staged


def _stage_arrow(file: DataFile, copy: LocalCopy) -> Staged:
    """Parquet, and Arrow in stream or file format, become an Arrow IPC file of batches of at most 1,000 rows."""
    import pyarrow as pa

    try:
        schema, batches = _parquet(copy.path) if file.format == "parquet" else _arrow(copy.path)
        return _stage_batches(file.path, schema, batches, copy.path.with_suffix(".batches"))
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{file.path} cannot be read as {file.format}: {error}") from error


def stage_table(name: str, table: Any, target: Path) -> Staged:
    """The same for a `datasets.Dataset`, such as one from the Hub. Raises DataError."""
    batches = (part.to_batches() for part in table.with_format("arrow").iter(batch_size=BATCH_ROWS))
    return _stage_batches(name, table.features.arrow_schema, (b for part in batches for b in part), target)


def _stage_batches(name: str, schema: Any, batches: Iterable[Any], target: Path) -> Staged:
    import pyarrow as pa

    staged = Staged(name, target, "batches", "row")
    with pa.ipc.new_file(str(target), schema) as writer:
        for batch in batches:
            for start in range(0, batch.num_rows, BATCH_ROWS):
                part = batch.slice(start, BATCH_ROWS)
                writer.write_batch(part)
                index = len(staged.spans)
                staged.spans.append(Span(index, index + 1, staged.rows + 1, staged.rows))
                staged.rows += part.num_rows
    if staged.rows == 0:
        raise DataError(f"{name} holds no rows.")
    return staged


def _parquet(path: Path) -> tuple[Any, Iterable[Any]]:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    return file.schema_arrow, file.iter_batches(batch_size=BATCH_ROWS)


def _arrow(path: Path) -> tuple[Any, Iterable[Any]]:
    import pyarrow as pa

    memory = pa.memory_map(str(path))
    if memory.read(6) == b"ARROW1":
        reader = pa.ipc.open_file(memory)
        return reader.schema, (reader.get_batch(index) for index in range(reader.num_record_batches))
    memory.seek(0)
    reader = pa.ipc.open_stream(memory)
    return reader.schema, reader
