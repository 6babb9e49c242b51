"""A stream of shards: the prepared path's documents, an order that the seed decides, and a position that reads nothing
twice."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import time
from pathlib import Path

import golden_cases as golden
import pyarrow as pa
import pyarrow.parquet
import pytest
from test_dataset import documents

from axo_flash.config import Config, DatasetConfig
from axo_flash.data import shards as shards_module
from axo_flash.data import streaming
from axo_flash.data.dataset import DataError, prepare_data
from axo_flash.data.packing import concatenate
from axo_flash.data.shards import Workspace
from axo_flash.data.streaming import STATE_FILE, Position, open_data, shard_order

TOKENIZER = golden.tiny_tokenizer(plain=False)
ROWS = golden.instruction_rows(golden.ALPACA)
SHARDS = 4


def cut(rows: list, number: int) -> list:
    return rows[number::SHARDS]


@pytest.fixture
def folder(tmp_path):
    """A directory with four shards of JSON lines."""
    (tmp_path / "data").mkdir()
    for number in range(SHARDS):
        lines = "".join(json.dumps(row) + "\n" for row in cut(ROWS, number))
        (tmp_path / "data" / f"part-{number}.jsonl").write_text(lines)
    return tmp_path / "data"


def configured(folder, **keys) -> Config:
    keys = {"max_steps": 10_000, "sequence_len": 1024, "sample_packing": True, "dataset_num_proc": 1, **keys}
    keys = {"streaming": True, "dataset_prepared_path": str(folder.parent / "prepared"), **keys}
    datasets = keys.pop("datasets", None) or [DatasetConfig(path=str(folder), type="alpaca")]
    return Config(base_model="none", learning_rate=1e-4, datasets=datasets, **keys)


@pytest.fixture
def opened():
    """opened(config, checkpoint): open_data, closed at the end of the test."""
    with contextlib.ExitStack() as stack:
        yield lambda config, checkpoint=None: stack.enter_context(open_data(config, TOKENIZER, checkpoint))


def epoch_of(data) -> list[list]:
    """The rows of the first epoch, as documents, shard by shard in the order in which they came."""
    rows, found = data.train, []
    row = 0
    while True:
        rows[row]
        shard = [documents([rows[number]]) for number in range(row, row + len(rows.examples()))]
        found.append(shard)
        row += len(shard)
        if rows.position(row).epoch:
            return found


def flat(shards: list[list]) -> list:
    return [document for shard in shards for row in shard for document in row]


@pytest.mark.parametrize("packing", [True, False])
def test_one_epoch_holds_the_documents_of_the_prepared_path(folder, opened, packing):
    data = opened(configured(folder, sample_packing=packing))
    whole = prepare_data(configured(folder, streaming=None, sample_packing=packing), TOKENIZER)
    shards = epoch_of(data)
    assert sorted(flat(shards)) == sorted(documents(whole.train))
    dropped = [{reason: rows.count for reason, rows in one.report.rows_dropped.items()} for one in (data, whole)]
    assert dropped[0] == dropped[1] and dropped[0]
    for name in ("rows_read", "rows_used", "documents", "tokens", "trained_tokens", "bytes", "files", "mount"):
        assert getattr(data.report, name) == getattr(whole.report, name)
    if not packing:
        assert all(len(row) == 1 for shard in shards for row in shard)
    rows = [row for shard in shards for row in shard]
    lengths = [sum(len(ids) for ids, _ in row) for row in rows]
    assert max(lengths) <= 1024 and (not packing or data.report.packing_efficiency > 0.9)


def test_a_row_is_laid_out_as_in_the_prepared_path(folder, opened):
    row = opened(configured(folder)).train[0]
    inside = [{"input_ids": ids, "labels": labels} for ids, labels in documents([row])]
    assert len(inside) > 1 and row == concatenate(inside)


@pytest.mark.parametrize("suffix", ["json", "csv", "parquet", "arrow"])
def test_every_format(folder, opened, suffix):
    before = flat(epoch_of(opened(configured(folder, sample_packing=False))))
    other = folder.parent / suffix
    other.mkdir()
    texts = [row for row in ROWS if all(isinstance(row.get(name), str) for name in golden.ALPACA)]
    rows = [{name: row[name] for name in golden.ALPACA} for row in texts]
    for number in range(SHARDS):
        part, path = pa.Table.from_pylist(cut(rows, number)), other / f"part-{number}.{suffix}"
        if suffix == "json":
            path.write_text(json.dumps(cut(rows, number)))
        elif suffix == "csv":
            part.to_pandas().to_csv(path, index=False)
        elif suffix == "parquet":
            pa.parquet.write_table(part, path)
        else:
            with pa.ipc.new_file(str(path), part.schema) as writer:
                writer.write_table(part)
    data = opened(configured(other, sample_packing=False))
    found = flat(epoch_of(data))
    assert data.report.rows_read == len(rows) and found
    assert suffix == "csv" or all(document in before for document in found)  # in CSV an empty cell is null


def test_the_seed_decides_the_order_and_epochs_differ(folder, opened):
    one, two = (epoch_of(opened(configured(folder))) for _ in range(2))
    assert one == two
    other = epoch_of(opened(configured(folder, seed=7)))
    assert other != one and sorted(flat(other)) == sorted(flat(one))
    orders = {tuple(shard_order(42, epoch, SHARDS)) for epoch in range(8)}
    assert len(orders) > 2 and all(sorted(order) == list(range(SHARDS)) for order in orders)


def test_the_buffer_bounds_what_is_packed_together(folder, opened):
    small, large = (epoch_of(opened(configured(folder, streaming_multipack_buffer_size=size))) for size in (2, 1000))
    assert sorted(flat(small)) == sorted(flat(large))
    assert max(len(row) for shard in small for row in shard) == 2 < max(len(row) for shard in large for row in shard)


def test_two_datasets_of_two_types(folder, opened):
    (folder.parent / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in golden.completion_rows("text")))
    both = [DatasetConfig(path=str(folder), type="alpaca")]
    both.append(DatasetConfig(path=str(folder.parent / "text.jsonl"), type="completion"))
    found = flat(epoch_of(opened(configured(folder, datasets=both))))
    whole = prepare_data(configured(folder, datasets=both, streaming=None), TOKENIZER)
    assert sorted(found) == sorted(documents(whole.train))


# -------------------------------------------------------------------------------------------------------- the position
def reads(monkeypatch) -> list[str]:
    """The names of the files that are read from now on, in order."""
    names, real = [], shards_module.fetch
    monkeypatch.setattr(
        shards_module, "fetch", lambda file, into: names.append(os.path.basename(file.path)) or real(file, into)
    )
    return names


def saved(data, row: int, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    data.train.write_state(folder / STATE_FILE, row)
    return folder


def test_from_any_row_the_rest_comes_the_same_and_nothing_used_up_is_read(folder, monkeypatch, tmp_path):
    config = configured(folder)
    with open_data(config, TOKENIZER) as data:
        total = sum(len(shard) for shard in epoch_of(data)) + 3  # into the second epoch
    rows, states = [], {}
    with open_data(config, TOKENIZER) as data:
        for row in range(total):
            states[row] = saved(data, row, tmp_path / str(row))
            rows.append(data.train[row])
    names = reads(monkeypatch)
    for row in (0, 1, total // 3, total // 2 + 1, total - 1):
        position = json.loads((states[row] / STATE_FILE).read_text())["position"]
        names.clear()
        with open_data(config, TOKENIZER, states[row]) as rest:
            assert [rest.train[number] for number in range(row, total)] == rows[row:]
        order = [*shard_order(42, 0, SHARDS), *shard_order(42, 1, SHARDS), *shard_order(42, 2, SHARDS)]
        first = position["epoch"] * SHARDS + position["place"]
        expected = [f"part-{index}.jsonl" for index in order[first:]]
        assert names == expected[: len(names)] and names


def test_the_end_of_a_shard_is_the_start_of_the_next(folder, opened):
    data = opened(configured(folder))
    count = len(data.train.examples())
    data.train[count - 1]
    assert data.train.position(count) == Position(count, 0, 1, 0)
    assert data.train.epochs(count) == 1 / SHARDS
    with pytest.raises(RuntimeError, match="its shard is gone"):
        data.train[count]
        data.train[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "part-0.jsonl").unlink(), r"3 shards, and were 4"),
        (lambda folder: (folder / "part-9.jsonl").write_text("{}"), r"5 shards, and were 4"),
        (
            lambda folder: (folder / "part-0.jsonl").rename(folder / "part-00.jsonl"),
            r"has its place taken by .*part-00",
        ),
        (lambda folder: (folder / "part-2.jsonl").write_text("{}"), r"part-2.jsonl has 2 bytes, and had [\d,]+"),
        (lambda folder: os.utime(folder / "part-2.jsonl"), r"part-2.jsonl was written anew \(its mtime differs\)"),
    ],
)
def test_another_data_set_is_refused(folder, opened, tmp_path, change, message):
    checkpoint = saved(opened(configured(folder)), 0, tmp_path / "checkpoint")
    change(folder)
    with pytest.raises(DataError, match=f"cannot go on from .*{message}.*Restore the files"):
        opened(configured(folder), checkpoint)


def test_a_shard_that_changes_while_it_waits_is_refused(folder, opened):
    data = opened(configured(folder))
    for path in folder.iterdir():
        path.write_text(path.read_text().replace("a", "b", 1))
    with pytest.raises(DataError, match=r"has changed since it was first looked at: .*restore the file"):
        data.train[0]


def test_other_bytes_behind_the_same_size_and_mtime_are_refused_after_a_resume(folder, opened, tmp_path):
    data = opened(configured(folder))
    data.train[0]
    checkpoint = saved(data, 1, tmp_path / "checkpoint")
    for path in folder.iterdir():
        times = path.stat()
        path.write_text(path.read_text().replace("e", "o", 1))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(DataError, match=r"part-\d.jsonl .* has changed"):
        opened(configured(folder), checkpoint).train[1]


# -------------------------------------------------------------------------------------------------------------- bounds
@pytest.mark.parametrize("ahead", [None, 2])
def test_local_disk_holds_the_present_shard_and_those_ahead(folder, opened, ahead):
    data = opened(configured(folder, streaming_prefetch_shards=ahead))
    place, most, row = Path(data.report.cache_path), 0, 0
    while not data.train.position(row).epoch:
        data.train[row]
        row += 1
        if data.train.position(row).shard_row == 1:
            for _ in range(400):  # until the thread has made ready what it may
                if len(list(place.glob("*/set/meta.json"))) == (ahead or 1) + 1:
                    break
                time.sleep(0.02)
            most = max(most, len(list(place.iterdir())))
    assert most == (ahead or 1) + 1
    assert not list(place.rglob("*.json[l]"))
    data.resources.close()
    assert not place.exists()


def test_too_little_disk_is_said_before_anything_is_read(folder, opened, monkeypatch):
    names = reads(monkeypatch)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(
        DataError, match=r"needs up to 0.00 GiB of local disk.* the 2 largest files .*Set dataset_prepared"
    ):
        opened(configured(folder))
    assert not names


def test_a_disk_that_fills_up_later(folder, opened, monkeypatch):
    data = opened(configured(folder))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(DataError, match=r"the next shard, .*part-\d.jsonl, needs up to"):
        data.train[0]


def test_folders_of_dead_runs_are_removed_and_those_of_living_ones_are_not(tmp_path):
    living = Workspace(tmp_path)
    dead = tmp_path / ".stream-dead"
    dead.mkdir()
    (tmp_path / ".stream-dead.lock").touch()
    (tmp_path / ".stream-late").mkdir()
    another = Workspace(tmp_path)
    assert (
        not dead.exists()
        and not (tmp_path / ".stream-late").exists()
        and living.folder.exists()
        and another.folder.exists()
    )
    for workspace in (living, another):
        workspace.close()
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"part-1.jsonl is empty \(0 bytes\)"),
        ("{\n{\n", r"none of the 2 rows of .*part-1.jsonl can be used as type 'alpaca': 2 broken row"),
        ("\n\n", r"part-1.jsonl holds nothing but blank lines"),
    ],
)
def test_a_shard_that_cannot_be_used(folder, opened, content, message):
    (folder / "part-1.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        epoch_of(opened(configured(folder)))


def test_a_row_that_is_too_long_is_an_error_if_it_is_to_be_one(folder, opened):
    with pytest.raises(DataError, match=r"rows are longer than sequence_len 64"):
        epoch_of(opened(configured(folder, sequence_len=64, excess_length_strategy="raise")))


def test_the_hub_is_not_streamed(folder, opened):
    with pytest.raises(DataError, match=r"datasets\[0\].path: owner/name is neither a file nor a directory here"):
        opened(configured(folder, datasets=[DatasetConfig(path="owner/name", type="alpaca")]))


def test_several_processes_are_refused(folder, opened, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DataError, match=r"feeds one process, and WORLD_SIZE is 2"):
        opened(configured(folder))


def test_several_gpus_are_refused(folder, opened, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(DataError, match=r"feeds one GPU, and 2 are visible"):
        opened(configured(folder))


def test_the_tokenising_process_is_killed(folder, opened):
    data = opened(configured(folder))
    os.kill(data.train.feed.tokeniser._process.pid, signal.SIGKILL)
    with pytest.raises(DataError, match=r"the process that tokenises .* ended with exit code -9"):
        data.train[0]


def test_told_to_stop_while_it_waits(folder, opened, monkeypatch):
    data = opened(configured(folder))
    monkeypatch.setattr(data.train.feed, "_load", lambda shard, folder: time.sleep(60))
    data.train.stopped = lambda: True
    with pytest.raises(streaming.StreamStopped):
        data.train[0]


def test_the_report_says_what_was_read(folder, opened):
    data = opened(configured(folder))
    assert (data.report.shards, data.report.shards_read, data.report.rows_read) == (SHARDS, 0, 0)
    data.train[0]
    report = dataclasses.asdict(data.report)
    assert report["shards_read"] == 1 and len(report["sources"]) == 1 and report["waited_seconds"] > 0
