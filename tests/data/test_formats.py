"""Rows and settings that cannot be used: what is said about them. (That the good ones are right: test_golden.py.)"""

from __future__ import annotations

import pickle
import random

import golden_cases as golden
import pytest

from axo_flash.config import Config, DatasetConfig
from axo_flash.data.chat import PLACEHOLDERS
from axo_flash.data.document import IGNORE, Document, RowError
from axo_flash.data.files import DataError
from axo_flash.data.formats import fit, make_encoder
from axo_flash.data.inputs import InputError, template_text
from axo_flash.data.templates import chat_template, template_names

TOKENIZER = golden.tiny_tokenizer(plain=False)


def encoder(tokenizer=TOKENIZER, config: dict | None = None, **dataset):
    section = DatasetConfig(path="rows", **dataset)
    return make_encoder(
        section, Config(base_model="x", learning_rate=1e-4, datasets=[section], **(config or {})), tokenizer
    )


TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("dataset", "row", "reason", "detail"),
    [
        (
            {"type": "alpaca"},
            {"question": "q", "answer": "a"},
            "missing column 'instruction'",
            "the row has question, answer",
        ),
        ({"type": "alpaca"}, {"instruction": "q"}, "missing column 'output'", "the row has instruction"),
        ({"type": "alpaca"}, {}, "missing column 'instruction'", "the row has no columns"),
        ({"type": "alpaca"}, {"instruction": None, "output": "a"}, "null 'instruction'", "is null"),
        ({"type": "alpaca"}, {"instruction": ["q"], "output": "a"}, "'instruction' is not text", "holds list"),
        ({"type": "alpaca"}, {"instruction": "q", "output": 4}, "'output' is not text", "holds int 4; text is wanted"),
        (
            {"type": "alpaca"},
            {"instruction": "q", "output": "\ud800"},
            "broken Unicode",
            "lone surrogate at character 0",
        ),
        ({"type": "alpaca_w_system"}, {"instruction": "q", "output": "a"}, "missing column 'system'", "the row has"),
        ({"type": "completion"}, {"body": "x"}, "missing column 'text'", "the row has body"),
        ({"type": "completion", "field": "body"}, {"text": "x"}, "missing column 'body'", "the row has text"),
        ({"type": "completion"}, {"text": ""}, "empty text", "is empty"),
        ({"type": "input_output"}, {"segments": [{"text": "x"}]}, "malformed segments", "must be a list of {label"),
        ({"type": "input_output"}, {"segments": "x"}, "malformed segments", "got 'x'"),
        ({}, {"input_ids": [1]}, "missing column 'labels'", "the row has input_ids"),
        ({}, {"input_ids": [1, 2], "labels": [1]}, "unequal lengths", "2 input_ids, 1 labels"),
        ({}, {"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [1, 0]}, "padded row", "without padding"),
        ({}, {"input_ids": [1, 600], "labels": [1, -100]}, "unknown token", "input_ids must be integers from 0 to 599"),
        ({}, {"input_ids": [1, 5], "labels": [1, -1]}, "unknown token", "labels must be"),
    ],
)
def test_rows_that_cannot_be_used(dataset, row, reason, detail):
    with pytest.raises(RowError, match=detail) as error:
        encoder(**dataset)(row)
    assert error.value.reason == reason


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        ({"conversations": TURNS}, "missing column 'messages'", "the row has conversations"),
        ({"messages": None}, "missing column 'messages'", "no columns"),
        ({"messages": []}, "malformed messages", "must be a list of turns"),
        ({"messages": "[{"}, "malformed messages", "text but not JSON"),
        ({"messages": ["hello"]}, "malformed messages", "must be a list of turns"),
        (
            {"messages": [{"from": "user", "value": "q"}]},
            "turn without role",
            "no 'role' in the turn .* set message_property_mappings",
        ),
        ({"messages": [{"role": "user"}]}, "turn without content", "no 'content' in the turn"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "broken Unicode", "cannot be tokenised"),
        (
            {"messages": [TURNS[1], TURNS[0]]},
            "refused by the chat template",
            "the chat template says: .*roles must alternate",
        ),
    ],
)
def test_conversations_that_cannot_be_used(row, reason, detail):
    with pytest.raises(RowError, match=detail) as error:
        encoder(type="chat_template", chat_template="mistral_v1")(row)
    assert error.value.reason == reason


def test_numbers_are_written_into_prompts():
    assert encoder(type="alpaca")({"instruction": 5, "output": "a"}) == encoder(type="alpaca")(
        {"instruction": "5", "output": "a"}
    )


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ({"type": "sharegpt"}, "type: chat_template.*field_messages: conversations"),
        ({"type": "sharegpt.load_role"}, "type: chat_template"),
        (
            {"type": "alpacca"},
            "'alpacca' is not supported. Supported are alpaca,.*completion, chat_template, input_output",
        ),
        ({"type": {"field_instructions": "q"}}, "unknown field_instructions; known are field_input"),
        (
            {"type": {"format": "{instruction} {question}"}},
            r"format .* does not work \(KeyError: 'question'\).*\{instruction\}, \{input\}",
        ),
        ({"type": {"no_input_format": "{input}"}}, "no_input_format .* does not work"),
        ({"type": {"format": "{"}}, "format .* does not work"),
        (
            {"type": "chat_template", "chat_template": "llama9"},
            "'llama9' is not known; use one of tokenizer_default, alpaca, chatml",
        ),
        ({"type": "chat_template", "chat_template": "jinja"}, "needs chat_template_jinja"),
        ({"type": "chat_template", "config": {"eot_tokens": ["</s>"]}, "train_on_eot": "all"}, "must then be the same"),
        (
            {
                "type": "chat_template",
                "config": {"eot_tokens": ["<>"]},
                "chat_template": "jinja",
                "chat_template_jinja": "{{ 1 }}<>",
            },
            r"eot_tokens: '<>' is 2 tokens .*; add it under tokens",
        ),
    ],
)
def test_settings_that_cannot_work(dataset, message):
    with pytest.raises(DataError, match=message):
        encoder(**dataset)


def test_tokenizer_without_template_is_told_which_there_are():
    bare = golden.tiny_tokenizer(plain=False)
    bare.chat_template = None
    with pytest.raises(
        DataError, match="no chat template: set chat_template to one of alpaca, chatml, llama3, mistral_v1"
    ):
        encoder(bare, type="chat_template")
    assert chat_template("tokenizer_default_fallback_chatml", None, bare) == chat_template("chatml", None, bare)
    assert chat_template("tokenizer_default_fallback_chatml", None, TOKENIZER) == TOKENIZER.chat_template


def test_template_from_a_file(tmp_path):
    config = Config(base_model="x", learning_rate=1e-4, datasets=[])
    (tmp_path / "mine.jinja").write_text("{{ messages[0]['content'] }}")
    assert template_text(str(tmp_path / "mine.jinja"), config) == "{{ messages[0]['content'] }}"
    assert template_text("{{ 1 }}", config) == "{{ 1 }}" and template_text(None, config) is None
    with pytest.raises(InputError, match=r"'nowhere.jinja', which is neither a file nor a template"):
        template_text("nowhere.jinja", config)
    assert chat_template("jinja", "{{ 2 }}", TOKENIZER) == "{{ 2 }}"
    assert chat_template(None, "{{ 1 }}", TOKENIZER) == "{{ 1 }}"
    assert {"chatml", "llama3", "mistral_v1", "alpaca", "jinja", "tokenizer_default"} <= set(template_names())


def test_tokenised_rows_pass_through_whatever_the_type():
    row = {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": [-100, 6, 7]}
    assert encoder(type="alpaca")(row) == encoder()(row) == [Document([5, 6, 7], [-100, 6, 7])]


def test_what_fits():
    long = Document(list(range(10)), [IGNORE] * 4 + list(range(4, 10)))
    assert fit(long, 10) is long
    with pytest.raises(RowError, match="10 tokens, sequence_len is 9") as error:
        fit(long, 9)
    assert error.value.reason == "too long"
    assert fit(long, 5, "truncate") == Document([0, 1, 2, 3, 4], [IGNORE] * 4 + [4])
    with pytest.raises(RowError) as error:
        fit(long, 4, "truncate")
    assert error.value.reason == "no trained token"
    with pytest.raises(RowError) as error:
        fit(Document([1], [1]), 10)
    assert error.value.reason == "too short"
    with pytest.raises(RowError) as error:  # a document's first token is never predicted
        fit(Document([1, 2], [1, IGNORE]), 10)
    assert error.value.reason == "no trained token"


def test_encoders_and_row_errors_travel_between_processes():
    for dataset in (
        {"type": "alpaca"},
        {"type": "chat_template"},
        {"type": "completion"},
        {"type": "input_output"},
        {},
    ):
        assert pickle.loads(pickle.dumps(encoder(**dataset)))
    error = pickle.loads(pickle.dumps(RowError("too long", "9 tokens")))
    assert (error.reason, str(error)) == ("too long", "9 tokens")


def test_placeholders_have_no_edge_in_common():
    assert PLACEHOLDERS[0][0] != PLACEHOLDERS[1][0] and PLACEHOLDERS[0][-1] != PLACEHOLDERS[1][-1]


@pytest.mark.parametrize("template", ["chatml", "llama3", "mistral_v1", "alpaca"])
def test_contents_are_found_together_as_one_by_one(template, monkeypatch):
    """The one-render way, whose cost does not grow with the turns, against Axolotl's, on contents with odd edges."""
    chat = encoder(type="chat_template", chat_template=template).encode
    rng = random.Random(template)
    pieces = [*golden.ODDITIES, "[", "]", "z", "[[turn0]]", "a]", "za", "\n", " x", "x ", "[INST]", "<|im_end|>", "a"]
    for _ in range(300):
        turns = []
        for _ in range(rng.randint(1, 3)):
            turns += [
                {"role": role, "content": "".join(rng.choices(pieces, k=rng.randint(0, 3)))}
                for role in ("user", "assistant")
            ]
        together = chat({"messages": turns})
        with monkeypatch.context() as patch:
            patch.setattr(type(chat), "_spans_together", lambda *_: None)
            assert chat({"messages": turns}) == together


def test_long_conversations_are_rendered_a_fixed_number_of_times(monkeypatch):
    chat = encoder(type="chat_template", chat_template="chatml").encode
    renders = []
    real = type(chat).text
    monkeypatch.setattr(type(chat), "text", lambda self, *args: renders.append(1) or real(self, *args))
    chat({"messages": TURNS * 50})
    assert len(renders) == 2
