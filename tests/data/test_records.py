"""Every file format gives the same rows, with their places; broken ones are told one by one or in one clear error."""

from __future__ import annotations

import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from axo_flash.data import records
from axo_flash.data.files import DataError, DataFile, fetch, find_mount
from axo_flash.data.records import BadRow, read_span, stage

ROWS = [{"a": f"row {i} é\n", "b": i, "c": [{"role": "user", "content": "x" * (i % 50)}]} for i in range(2500)]


def staged(path, tmp_path, file_format):
    (tmp_path / "local").mkdir(exist_ok=True)
    file = DataFile(str(path), file_format, find_mount(path))
    return stage(file, fetch(file, tmp_path / "local"))


def rows_of(source) -> list:
    return [pair for span in source.spans for pair in read_span(source, span)]


def write(path, file_format):
    table = pa.Table.from_pylist(ROWS)
    if file_format == "jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    elif file_format == "array":
        path.write_text(json.dumps(ROWS, indent=1, ensure_ascii=False), encoding="utf-8")
    elif file_format == "parquet":
        pq.write_table(table, path, row_group_size=700)
    elif file_format == "stream":
        with pa.ipc.new_stream(path, table.schema) as out:
            out.write_table(table, max_chunksize=900)
    else:
        with pa.ipc.new_file(path, table.schema) as out:
            out.write_table(table)


@pytest.mark.parametrize(
    ("kind", "file_format"),
    [("jsonl", "json"), ("array", "json"), ("parquet", "parquet"), ("stream", "arrow"), ("file", "arrow")],
)
def test_formats_give_the_same_rows(tmp_path, monkeypatch, kind, file_format):
    monkeypatch.setattr(records, "SPAN_BYTES", 10_000)
    write(tmp_path / "data", kind)
    source = staged(tmp_path / "data", tmp_path, file_format)
    found = rows_of(source)
    assert [row for _, row in found] == ROWS
    assert [number for number, _ in found] == list(range(1, 2501))
    assert source.rows == 2500 and len(source.spans) > 2
    assert [span.row for span in source.spans] == sorted(span.row for span in source.spans)


def test_csv_is_read_as_datasets_reads_it(tmp_path):
    from datasets import load_dataset

    text = 'instruction,input,output\n"two\nlines, quoted",,yes\nplain,NA,"say ""hi"""\n3,None,4\n'
    (tmp_path / "data.csv").write_text(text)
    source = staged(tmp_path / "data.csv", tmp_path, "csv")
    theirs = load_dataset(
        "csv", data_files=str(tmp_path / "data.csv"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert [row for _, row in rows_of(source)] == list(theirs)
    assert rows_of(source)[1][1]["input"] is None


def test_csv_lines_with_too_many_fields_are_told(tmp_path):
    (tmp_path / "data.csv").write_text("a,b\n1,2\n1,2,3\n5,6\n")
    source = staged(tmp_path / "data.csv", tmp_path, "csv")
    assert [row for _, row in rows_of(source)] == [{"a": 1, "b": 2}, {"a": 5, "b": 6}]
    assert source.bad == [(3, "line 3: expected 2 fields, saw 3")]


def test_jsonl_rows_keep_their_line_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "SPAN_BYTES", 30)
    lines = [b'{"a": 1}', b"", b"   ", b'{"a": 2}\r', b'{"a": ', b"[1, 2]", b'{"a": "\xff"}', b'{"a": 3}']
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    source = staged(tmp_path / "a.jsonl", tmp_path, "json")
    found = dict(rows_of(source))
    assert {number: row for number, row in found.items() if not isinstance(row, BadRow)} == {
        1: {"a": 1},
        4: {"a": 2},
        8: {"a": 3},
    }
    assert "Expecting value at column 7" in found[5].detail
    assert "a JSON object is wanted, got list" in found[6].detail
    assert "not UTF-8" in found[7].detail
    assert source.rows == 6 and len(source.spans) > 1


def test_spans_do_not_depend_on_where_they_are_cut(tmp_path, monkeypatch):
    rng = random.Random(3)
    lines = [rng.choice(["", " ", json.dumps({"n": i}), '{"n": ']) for i in range(500)]
    (tmp_path / "a.jsonl").write_text("\n".join([json.dumps({"n": -1}), *lines]))
    results = []
    for size in (1, 17, 400, 1 << 20):
        monkeypatch.setattr(records, "SPAN_BYTES", size)
        source = staged(tmp_path / "a.jsonl", tmp_path, "json")
        assert [span.row for span in source.spans] == [
            sum(len(list(read_span(source, s))) for s in source.spans[:i]) for i in range(len(source.spans))
        ]
        results.append(rows_of(source))
    assert all(result == results[0] for result in results)


def test_an_array_of_strings_is_an_array_of_texts(tmp_path):
    (tmp_path / "a.json").write_text('  ["one", "two"]\n')
    assert rows_of(staged(tmp_path / "a.json", tmp_path, "json")) == [(1, {"text": "one"}), (2, {"text": "two"})]


@pytest.mark.parametrize(
    ("content", "file_format", "message"),
    [
        (b"", "json", "is empty .0 bytes."),
        (b"\n \n", "json", "nothing but blank lines"),
        (b"[]", "json", "an empty JSON array"),
        (
            b'[{"a": 1},\n {"a": }]',
            "json",
            r":2: broken JSON, Expecting value at column 8. Nothing after it in the array",
        ),
        (b'[{"a": 1}\n {"a": 2}]', "json", r":2: broken JSON, Expecting ',' or ']'"),
        (b'[{"a": 1}] x', "json", "Extra data after the array"),
        (b'[{"a": "\xff"}]', "json", "is not UTF-8"),
        (b'{"data": [\n{"a": 1}\n]}\n', "json", r"one JSON object over several lines \(keys: data\).*jq -c"),
        (b"a,b\n", "csv", "has a header but no rows"),
        (b"\n", "csv", "cannot be read as CSV"),
        (b"PAR1 not really", "parquet", "cannot be read as parquet"),
        (b"ARROW1 not really", "arrow", "cannot be read as arrow"),
        (b"neither one", "arrow", "cannot be read as arrow"),
    ],
)
def test_files_that_cannot_be_read_give_one_clear_error(tmp_path, content, file_format, message):
    (tmp_path / "data").write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        staged(tmp_path / "data", tmp_path, file_format)
    assert str(tmp_path / "data") in str(error.value)
