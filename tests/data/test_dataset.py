"""prepare_data end to end: cache, report, errors, splits, determinism; no document is lost or mixed up on the way."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import golden_cases as golden
import numpy as np
import pytest

from axo_flash.config import Config, DatasetConfig
from axo_flash.data import files, prepared
from axo_flash.data.dataset import DataError, prepare_data
from axo_flash.data.files import Mount
from axo_flash.data.packing import PackedCollator, PaddedCollator

TOKENIZER = golden.tiny_tokenizer(plain=False)
ALPACA = golden.instruction_rows(golden.ALPACA)


def write(path: Path, rows: list) -> str:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return str(path)


def config(tmp_path: Path, *datasets: DatasetConfig, **keys) -> Config:
    packing = keys.setdefault("sample_packing", True)
    keys.setdefault("eval_sample_packing", packing)
    keys.setdefault("pad_to_sequence_len", packing)
    keys = {"sequence_len": 256, "dataset_prepared_path": str(tmp_path / "prepared"), "dataset_num_proc": 1, **keys}
    return Config(base_model="none", learning_rate=1e-4, datasets=list(datasets), **keys)


def alpaca(tmp_path: Path, rows: list = ALPACA, name: str = "train.jsonl", **keys) -> Config:
    return config(tmp_path, DatasetConfig(path=write(tmp_path / name, rows), type="alpaca"), **keys)


def documents(rows) -> list[tuple[list[int], list[int]]]:
    """The documents of a row dataset, told apart by their position ids."""
    found = []
    for index in range(len(rows)):
        row = rows[index]
        starts = [i for i, position in enumerate(row["position_ids"]) if position == 0] + [row["length"]]
        found += [(row["input_ids"][a:b], row["labels"][a:b]) for a, b in itertools.pairwise(starts)]
    return found


def test_packed_and_unpacked_rows_hold_the_same_documents(tmp_path):
    packed = prepare_data(alpaca(tmp_path), TOKENIZER)
    plain = prepare_data(alpaca(tmp_path, sample_packing=False), TOKENIZER)
    assert sorted(documents(packed.train)) == sorted(documents(plain.train))
    assert len(packed.train) < len(plain.train) == packed.report.documents == plain.report.documents
    assert packed.train.lengths == [packed.train[i]["length"] for i in range(len(packed.train))]
    assert all(labels[0] == -100 for _, labels in documents(packed.train))
    assert packed.report.tokens == sum(packed.train.lengths) == plain.report.tokens
    assert packed.report.trained_tokens == sum(
        label != -100 for _, labels in documents(packed.train) for label in labels
    )
    assert packed.report.packing_efficiency == packed.report.tokens / (256 * len(packed.train))
    assert packed.eval is None and plain.report.packing_efficiency is None
    assert isinstance(packed.collator, PackedCollator) and isinstance(plain.collator, PaddedCollator)


def test_rows_follow_the_contract(tmp_path):
    data = prepare_data(alpaca(tmp_path, val_set_size=20), TOKENIZER)
    row = data.train[0]
    assert set(row) == {"input_ids", "labels", "position_ids", "length"}
    assert all(type(token) is int for name in ("input_ids", "labels", "position_ids") for token in row[name])
    assert data.train[-1] == data.train[len(data.train) - 1]
    with pytest.raises(IndexError):
        data.train[len(data.train)]
    batch = data.collator([data.train[0], data.train[1]])
    assert batch["input_ids"].shape == (1, 512)
    assert batch["cu_seq_lens_q"][0] == 0 and batch["cu_seq_lens_q"][-1] == 512


def test_the_cache_is_used_and_its_report_is_the_same(tmp_path):
    rows = [*ALPACA, '{"broken": ', {"other": 1}]
    first = prepare_data(alpaca(tmp_path, rows), TOKENIZER)
    second = prepare_data(alpaca(tmp_path, rows), TOKENIZER)
    assert (first.report.cache_hit, second.report.cache_hit) == (False, True)
    unlike = {"cache_hit", "seconds"}
    a, b = (dataclasses.asdict(data.report) for data in (first, second))
    assert {k: v for k, v in a.items() if k not in unlike} == {k: v for k, v in b.items() if k not in unlike}
    assert documents(first.train) == documents(second.train)


def test_a_changed_file_never_meets_its_stale_cache(tmp_path):
    before = prepare_data(alpaca(tmp_path), TOKENIZER)
    stat = os.stat(tmp_path / "train.jsonl")
    changed = [row | {"output": row["output"].replace("a", "b")} for row in ALPACA]  # same size, same time
    write(tmp_path / "train.jsonl", changed)
    os.utime(tmp_path / "train.jsonl", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert os.stat(tmp_path / "train.jsonl").st_size == stat.st_size
    after = prepare_data(alpaca(tmp_path, changed), TOKENIZER)
    assert not after.report.cache_hit
    assert documents(after.train) != documents(before.train)


def test_a_moved_file_finds_its_cache(tmp_path):
    prepare_data(alpaca(tmp_path, [*ALPACA, "{"]), TOKENIZER)
    moved = prepare_data(alpaca(tmp_path, [*ALPACA, "{"], name="moved.jsonl"), TOKENIZER)
    assert moved.report.cache_hit
    assert moved.report.rows_dropped["broken row"].places[0].startswith(f"{tmp_path}/moved.jsonl:221: ")


@pytest.mark.parametrize(
    "change",
    [{"sequence_len": 200}, {"train_on_inputs": True}, {"excess_length_strategy": "truncate"}],
    ids=lambda change: next(iter(change)),
)
def test_the_cache_is_keyed_by_what_matters(tmp_path, change):
    prepare_data(alpaca(tmp_path), TOKENIZER)
    assert not prepare_data(alpaca(tmp_path, **change), TOKENIZER).report.cache_hit


@pytest.mark.parametrize(
    "change", [{"seed": 7}, {"val_set_size": 0.2}, {"sample_packing": False}, {"micro_batch_size": 3}], ids=str
)
def test_the_cache_is_not_keyed_by_what_does_not(tmp_path, change):
    prepare_data(alpaca(tmp_path), TOKENIZER)
    assert prepare_data(alpaca(tmp_path, **change), TOKENIZER).report.cache_hit


def test_the_cache_knows_type_template_and_tokenizer(tmp_path):
    rows = golden.chat_rows()
    path = write(tmp_path / "chat.jsonl", rows)

    def hit(tokenizer=TOKENIZER, **keys) -> bool:
        section = DatasetConfig(path=path, type="chat_template", **keys)
        return prepare_data(config(tmp_path, section), tokenizer).report.cache_hit

    other = golden.tiny_tokenizer(plain=False)
    assert not hit(other)
    assert hit(other)
    other.chat_template = other.chat_template.replace("<", "(")
    assert not hit(other)
    assert not hit(golden.tiny_tokenizer(plain=True))
    assert not hit(chat_template="chatml")
    assert not hit(chat_template="chatml", train_on_eos="none")
    template = tmp_path / "t.jinja"
    template.write_text(golden.JINJA)
    assert not hit(chat_template="jinja", chat_template_jinja=str(template))
    template.write_text(golden.JINJA + " ")  # the same path, another template
    assert not hit(chat_template="jinja", chat_template_jinja=str(template))


def test_tokenising_does_not_change_the_fingerprint():
    """A call with truncation=True leaves its setting in the tokenizer's state."""
    tokenizer = golden.tiny_tokenizer(plain=False)
    before = prepared.tokenizer_fingerprint(tokenizer)
    tokenizer("some text", truncation=True, max_length=3)
    assert prepared.tokenizer_fingerprint(tokenizer) == before
    tokenizer.add_tokens(["<new>"])
    assert prepared.tokenizer_fingerprint(tokenizer) != before


def test_a_damaged_cache_is_made_again(tmp_path, caplog):
    first = prepare_data(alpaca(tmp_path), TOKENIZER)
    expected = documents(first.train)
    arrow = next(Path(first.report.cache_path).glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[: arrow.stat().st_size // 2])
    second = prepare_data(alpaca(tmp_path), TOKENIZER)
    assert not second.report.cache_hit and "damaged" in caplog.text
    assert documents(second.train) == expected


def test_nothing_but_whole_sets_is_left_behind(tmp_path):
    with pytest.raises(DataError):
        prepare_data(alpaca(tmp_path, ["{"]), TOKENIZER)
    prepare_data(alpaca(tmp_path), TOKENIZER)
    left = [path.name for path in (tmp_path / "prepared").iterdir() if not path.name.endswith(".lock")]
    assert all(not name.startswith(".work") for name in left) and len(left) == 2


def test_rows_do_not_depend_on_the_number_of_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(prepared.records, "SPAN_BYTES", 5_000)
    one = prepare_data(alpaca(tmp_path), TOKENIZER)
    shutil.rmtree(tmp_path / "prepared")
    two = prepare_data(alpaca(tmp_path, dataset_num_proc=2), TOKENIZER)
    assert not two.report.cache_hit and len(list(Path(two.report.cache_path).glob("*.arrow"))) == 2
    assert [one.train[i] for i in range(len(one.train))] == [two.train[i] for i in range(len(two.train))]


def test_rows_are_the_same_in_another_process(tmp_path):
    data = prepare_data(alpaca(tmp_path, val_set_size=0.2), TOKENIZER)
    script = (
        "import sys; sys.path.insert(0, sys.argv[2]); from pathlib import Path; import test_dataset as t\n"
        "config = t.alpaca(Path(sys.argv[1]), val_set_size=0.2, dataset_prepared_path=sys.argv[1] + '/other')\n"
        "data = t.prepare_data(config, t.TOKENIZER)\n"
        "print('ROWS', t.golden.digest([data.train[i]['input_ids'] for i in range(len(data.train))], []).hex())"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        check=True,
    )
    expected = golden.digest([data.train[i]["input_ids"] for i in range(len(data.train))], []).hex()
    assert f"ROWS {expected}" in run.stdout


def test_the_seed_decides_which_rows_are_held_out(tmp_path):
    held = {}
    for seed in (1, 2, 1):
        data = prepare_data(alpaca(tmp_path, seed=seed, val_set_size=0.25, eval_sample_packing=False), TOKENIZER)
        assert held.setdefault(seed, documents(data.eval)) == documents(data.eval)
        whole = sorted(documents(data.train) + documents(data.eval))
        assert held.setdefault("all", whole) == whole
        assert data.report.eval_documents == len(data.eval) == int(np.ceil(0.25 * len(whole)))
    assert held[1] != held[2]


def test_val_set_size_as_a_count(tmp_path):
    data = prepare_data(alpaca(tmp_path, val_set_size=13, eval_sample_packing=False), TOKENIZER)
    assert len(data.eval) == 13
    assert isinstance(data.eval_collator, PackedCollator) and data.eval_collator.pad_to is None
    with pytest.raises(DataError, match=r"val_set_size 500 would hold out 500 of \d+ documents"):
        prepare_data(alpaca(tmp_path, val_set_size=500), TOKENIZER)


def test_an_eval_split_too_small_to_pack_is_refused(tmp_path):
    with pytest.raises(
        DataError, match=r"its 1 documents have \d+ tokens, one packed row takes 256. Set `eval_sample_packing: false`"
    ):
        prepare_data(alpaca(tmp_path, val_set_size=1), TOKENIZER)
    assert len(prepare_data(alpaca(tmp_path, val_set_size=1, eval_sample_packing=False), TOKENIZER).eval) == 1


def test_the_report_counts_every_row(tmp_path):
    rows = [*ALPACA[:100], '{"instruction": ', {"question": "q"}, {"instruction": "i", "output": 5}, "", "[]"]
    report = prepare_data(alpaca(tmp_path, rows), TOKENIZER).report
    assert report.rows_read == 104
    assert report.rows_used + sum(dropped.count for dropped in report.rows_dropped.values()) == 104
    path = tmp_path / "train.jsonl"
    assert report.rows_dropped["broken row"].places == [
        f"{path}:101: Expecting value at column 17: '{{\"instruction\": '",
        f"{path}:105: a JSON object is wanted, got list: '[]'",
    ]
    assert report.rows_dropped["missing column 'instruction'"].places == [
        f"{path}:102: no column 'instruction'; the row has question"
    ]
    assert report.rows_dropped["'output' is not text"].count == 1
    assert report.rows_dropped["no trained token"].count == sum(not row["output"] for row in ALPACA[:100])
    assert report.rows_dropped["too long"].count > 5 and len(report.rows_dropped["too long"].places) == 5
    assert report.files == [str(path)] and report.bytes == path.stat().st_size
    assert report.mount == [str(files.find_mount(path))]
    assert Path(report.cache_path).is_dir() and report.seconds > 0
    json.dumps(dataclasses.asdict(report))


@pytest.mark.parametrize(
    ("rows", "keys", "message"),
    [
        ([{"question": "q", "answer": "a"}] * 3, {},
         r"none of the 3 rows of .*train.jsonl can be used as type 'alpaca': 3 missing column 'instruction'. "
         r"First: .*train.jsonl:1: no column 'instruction'; the row has question, answer"),
        (["{", "nope"], {}, "2 broken row. First: .*train.jsonl:1: Expecting property name"),
        ([{"instruction": "i", "output": ""}], {}, "1 no trained token"),
        ([{"instruction": "i", "output": "long " * 500}], {}, "1 too long. First: .*sequence_len is 256"),
        ([*ALPACA], {"excess_length_strategy": "raise"}, r"rows are longer than sequence_len 256: .*:\d+: \d+ tokens"),
    ],
)  # fmt: skip
def test_data_that_cannot_be_used_gives_one_clear_error(tmp_path, rows, keys, message):
    for _ in range(2):  # from the cache as well
        with pytest.raises(DataError, match=message):
            prepare_data(alpaca(tmp_path, rows, **keys), TOKENIZER)


def test_one_file_of_several_without_a_usable_row_is_an_error(tmp_path):
    write(tmp_path / "good.jsonl", ALPACA)
    write(tmp_path / "zbad.jsonl", [{"a": 1}])
    with pytest.raises(DataError, match=r"none of the 1 rows of .*zbad.jsonl"):
        prepare_data(config(tmp_path, DatasetConfig(path=str(tmp_path / "*.jsonl"), type="alpaca")), TOKENIZER)


def test_truncate_keeps_long_rows(tmp_path):
    drop = prepare_data(alpaca(tmp_path), TOKENIZER).report
    cut = prepare_data(alpaca(tmp_path, excess_length_strategy="truncate"), TOKENIZER)
    assert "too long" in drop.rows_dropped and "too long" not in cut.report.rows_dropped
    assert cut.report.documents > drop.documents and max(cut.train.lengths) <= 256


def test_several_datasets_of_several_formats(tmp_path):
    import pandas as pd

    pd.DataFrame(golden.completion_rows("body")[:60]).to_parquet(tmp_path / "c.parquet")
    (tmp_path / "seg.json").write_text(json.dumps(golden.segment_rows()[:50]))
    write(tmp_path / "tok.jsonl", golden.tokenized_rows()[:40])
    data = prepare_data(
        config(
            tmp_path,
            DatasetConfig(path=write(tmp_path / "a.jsonl", ALPACA), type="alpaca"),
            DatasetConfig(path=str(tmp_path / "c.parquet"), type="completion", field="body"),
            DatasetConfig(path=str(tmp_path / "seg.json"), type="input_output"),
            DatasetConfig(path=str(tmp_path / "tok.jsonl")),
        ),
        TOKENIZER,
    )
    assert [Path(name).name for name in data.report.files] == ["a.jsonl", "c.parquet", "seg.json", "tok.jsonl"]
    assert data.report.rows_read == 220 + 60 + 50 + 40
    assert data.report.packing_efficiency > 0.9
    place = data.report.rows_dropped["empty text"].places[0]
    assert place == f"{tmp_path}/c.parquet:row 4: column 'body' is empty"


def plain_documents(data) -> list:
    return sorted(documents(data.train))


def test_split_slices_rows(tmp_path):
    path = write(tmp_path / "train.jsonl", ALPACA)
    for split, part in (("train[:50]", ALPACA[:50]), ("train[50:]", ALPACA[50:]), ("train[10%:30%]", ALPACA[22:66])):
        sliced = prepare_data(config(tmp_path, DatasetConfig(path=path, type="alpaca", split=split)), TOKENIZER)
        assert sliced.report.rows_read == len(part)
        assert plain_documents(sliced) == plain_documents(
            prepare_data(alpaca(tmp_path, part, name="part.jsonl"), TOKENIZER)
        )
    for split in ("train[900:]", "train[a:b]"):
        with pytest.raises(DataError, match=r"select none of its 220 rows|does not work with its 220 rows"):
            prepare_data(config(tmp_path, DatasetConfig(path=path, type="alpaca", split=split)), TOKENIZER)


def test_shards_are_those_of_datasets(tmp_path):
    import datasets

    path, found = write(tmp_path / "train.jsonl", ALPACA), []
    for index in range(3):
        section = DatasetConfig(path=path, type="alpaca", shards=3, shards_idx=index)
        data = prepare_data(config(tmp_path, section, seed=5), TOKENIZER)
        theirs = list(datasets.Dataset.from_list(ALPACA).shuffle(seed=5).shard(num_shards=3, index=index))
        assert plain_documents(data) == plain_documents(
            prepare_data(alpaca(tmp_path, theirs, name=f"{index}.jsonl"), TOKENIZER)
        )
        found += documents(data.train)
    assert sorted(found) == plain_documents(prepare_data(alpaca(tmp_path), TOKENIZER))
    with pytest.raises(DataError, match=r"shards_idx 3 of .* must be below shards, 3"):
        prepare_data(config(tmp_path, DatasetConfig(path=path, type="alpaca", shards=3, shards_idx=3)), TOKENIZER)


def test_hub_datasets_need_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        DataError,
        match=r"there is no file or directory 'nobody/nothing-at-all' .* could not be loaded from the Hugging Face Hub",
    ):
        prepare_data(config(tmp_path, DatasetConfig(path="nobody/nothing-at-all", type="alpaca")), TOKENIZER)


def test_hub_datasets_give_the_same_rows(tmp_path, monkeypatch):
    import datasets

    asked = []

    def load_dataset(path, name, data_files, split):
        asked.append((path, name, data_files, split))
        return datasets.Dataset.from_list(ALPACA)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    data = prepare_data(config(tmp_path, DatasetConfig(path="owner/rows", type="alpaca", split="train[:9]")), TOKENIZER)
    assert asked == [("owner/rows", None, None, "train[:9]")]
    assert plain_documents(data) == plain_documents(prepare_data(alpaca(tmp_path), TOKENIZER))
    assert data.report.rows_dropped["too long"].places[0].startswith("owner/rows:row ")


def test_prepared_data_never_lies_on_fuse(tmp_path, monkeypatch, caplog):
    wanted = tmp_path / "mounted" / "prepared"
    real = files.find_mount
    fuse = Mount(str(tmp_path / "mounted"), "fuse.hopsfs", "hopsfs")
    monkeypatch.setattr(prepared, "find_mount", lambda path: fuse if "mounted" in str(path) else real(path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = prepare_data(alpaca(tmp_path, dataset_prepared_path=str(wanted)), TOKENIZER)
    assert data.report.cache_path.startswith(str(tmp_path / "cache" / "axo_flash" / "prepared"))
    assert "fuse.hopsfs" in caplog.text and not wanted.exists()


def test_data_mount_is_checked_first(tmp_path):
    section = DatasetConfig(path=str(tmp_path / "absent.jsonl"), type="alpaca")
    with pytest.raises(DataError, match=r"data_mount .* is not mounted"):
        prepare_data(config(tmp_path, section, data_mount=str(tmp_path)), TOKENIZER)
    prepare_data(alpaca(tmp_path, data_mount=files.find_mount(tmp_path).mount_point), TOKENIZER)


def test_files_and_formats_load_without_torch():
    """With a stand-in for the package itself, whose own import needs torch."""
    script = f"""
import sys, types
sys.modules["axo_flash"] = types.ModuleType("axo_flash")
sys.modules["axo_flash"].__path__ = [{str(Path(files.__file__).parents[1])!r}]
import axo_flash.data.files, axo_flash.data.formats
print("torch" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
