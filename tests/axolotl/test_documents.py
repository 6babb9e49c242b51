"""Axolotl still makes the documents in golden/: what test_golden.py holds us to is what Axolotl does here and now."""

import json

import pytest

pytest.importorskip("axolotl.integrations", reason="needs Axolotl, in an environment of its own: see .ci/run")

import golden_cases as golden
import make_golden

CASES = golden.cases()


@pytest.fixture(scope="module")
def tokenizer():
    return golden.tiny_tokenizer(plain=False)


@pytest.fixture(scope="module")
def stored() -> dict:
    return json.loads((golden.GOLDEN / "tiny.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", CASES)
def test_documents(case, tokenizer, stored):
    assert len(CASES[case][2]) >= 200
    made = make_golden.of_case(tokenizer, *CASES[case])
    assert made["first"] == stored[case]["first"]
    assert made["digests"] == stored[case]["digests"]


def test_order_and_split(tokenizer, stored):
    assert make_golden.order(tokenizer) == stored["order"]
