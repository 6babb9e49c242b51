"""From a row to the tokens and the loss mask, exactly as Axolotl 0.19 computes them (tests/data/golden proves it).

`make_encoder(dataset, config, tokenizer)` returns a callable: row -> list of `Document`. An encoder is a plain
picklable object, so that it can be sent to the processes that tokenise. What it cannot use raises `RowError`, which is
counted and reported with the row's place; a configuration that can never work raises `DataError` at once.

Differences from Axolotl, all of them on rows that it would crash on or train as garbage: a null `instruction` (Axolotl
trains on the word "None"), turns without content, text that is not valid Unicode, a mask with zeros in tokenised rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from axo_flash.data.chat import make_chat_encoder
from axo_flash.data.document import IGNORE, Document, RowError, column, missing_column, shortened, text_of, written
from axo_flash.data.files import DataError

if TYPE_CHECKING:
    from axo_flash.config import Config, DatasetConfig

PRETOKENIZED = {"input_ids", "attention_mask", "labels"}
MIN_LEN = 2  # tokens: one to predict from, one to predict
COMPLETION_MAX_ROWS = 64  # a completion text longer than 64 x sequence_len is cut there, as in Axolotl


Encoder = Callable[[Mapping[str, Any]], list[Document]]


# ------------------------------------------------------------------------------------------------ instruction formats
class Style(NamedTuple):
    """How one turn is written, with and without an input, and how the system prompt is."""

    turn: str
    turn_without_input: str
    system: str


INSTRUCT = Style(
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
    "### Instruction:\n{instruction}\n\n### Response:\n",
    "{system}\n\n",
)
CHAT = Style("USER: {instruction}\n{input}\nASSISTANT:", "USER: {instruction}\nASSISTANT:", "SYSTEM: {system}\n")
CHATML = Style(
    "<|im_start|>user\n{instruction}\n{input}<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\n{instruction}<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>system\n{system}<|im_end|>\n",
)
PHI = Style(
    "<|user|>\n{instruction}<|end|>{input}<|assistant|>",
    "<|user|>\n{instruction}<|end|>\n<|assistant|>\n",
    "<|system|>\n{system}<|end|>\n",
)
ORCA = Style(
    "### Human:\n{instruction}\n### Additional Context:\n{input}\n### Assistant:\n",
    "### Human:\n{instruction}\n### Assistant:\n",
    "### System:\n{system}\n",
)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction format: which columns it reads and how it writes them.

    `system_with_input` and `system_without_input` are fixed texts; a format with a `system_column` takes the row's
    instead, and `default_system` where the row has no such column. `output_required` false lets a row have no answer.
    """

    style: Style
    instruction: str = "instruction"
    input: str | None = "input"
    output: str = "output"
    system_with_input: str = ""
    system_without_input: str = ""
    system_column: str | None = None
    default_system: str | None = None
    output_required: bool = True

    def prompt(self, instruction: str, input: str, row: Mapping[str, Any]) -> str:
        """Everything before the answer."""
        if self.system_column:
            if self.system_column not in row and self.default_system is None:
                raise missing_column(row, self.system_column)
            system = row.get(self.system_column, self.default_system)
        else:
            system = self.system_with_input if input else self.system_without_input
        head = self.style.system.format(system=system) if system and self.style.system else ""
        if input:
            return head + self.style.turn.format(instruction=instruction, input=input)
        return head + self.style.turn_without_input.format(instruction=instruction)


ALPACA_SYSTEM = {
    "system_with_input": "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.",
    "system_without_input": "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.",
}
CHAT_SYSTEM = {
    "system_with_input": "Below is an instruction from a USER that describes a task, paired with an input that "
    "provides further context. The ASSISTANT writes a response that concisely and appropriately completes the "
    "request.\n\n",
    "system_without_input": "Below is an instruction from a USER that describes a task. The ASSISTANT writes a "
    "response that appropriately and concisely completes the request.\n\n",
}
_ORCA_COLUMNS = {"instruction": "question", "input": None, "output": "response", "system_column": "system_prompt"}
INSTRUCTION_TYPES = {
    "alpaca": Instruction(INSTRUCT, **ALPACA_SYSTEM),
    "alpaca:instruct": Instruction(INSTRUCT, **ALPACA_SYSTEM),
    "alpaca:chat": Instruction(CHAT, **ALPACA_SYSTEM),
    "alpaca:chatml": Instruction(CHATML, **ALPACA_SYSTEM),
    "alpaca:phi": Instruction(PHI, **ALPACA_SYSTEM),
    "alpaca_chat": Instruction(CHAT, **ALPACA_SYSTEM),
    "alpaca_chat.load_concise": Instruction(CHAT, **CHAT_SYSTEM),
    "alpaca_chat.load_qa": Instruction(CHAT, "question", None, "answer", **CHAT_SYSTEM),
    "alpaca_chat.load_camel_ai": Instruction(CHAT, "message_1", None, "message_2", **CHAT_SYSTEM),
    "alpaca_chat.load_no_prompt": Instruction(CHAT),
    "alpaca_instruct": Instruction(INSTRUCT, **ALPACA_SYSTEM),
    "alpaca_instruct.load_no_prompt": Instruction(INSTRUCT),
    "alpaca_w_system": Instruction(CHAT, system_column="system"),
    "alpaca_w_system.load_chat": Instruction(CHAT, system_column="system"),
    "alpaca_w_system.load_instruct": Instruction(INSTRUCT, system_column="system"),
    "alpaca_w_system.load_open_orca": Instruction(ORCA, **_ORCA_COLUMNS),
    "alpaca_w_system.load_open_orca_chatml": Instruction(CHATML, **_ORCA_COLUMNS),
    "gpteacher": Instruction(INSTRUCT, output="response", **ALPACA_SYSTEM),
}
SUPPORTED_TYPES = (*INSTRUCTION_TYPES, "completion", "chat_template", "input_output")
_USER_DEFINED_KEYS = {
    "system_prompt", "system_format", "field_system", "field_instruction", "field_input", "field_output",
    "format", "no_input_format",
}  # fmt: skip


def user_defined(settings: Mapping[str, str | None]) -> Instruction:
    """The format of `type: {field_instruction: ..., format: ...}`, with Axolotl's defaults. Raises DataError."""
    unknown = set(settings) - _USER_DEFINED_KEYS
    if unknown:
        raise DataError(
            f"datasets[].type: unknown {', '.join(sorted(unknown))}; known are {', '.join(sorted(_USER_DEFINED_KEYS))}."
        )
    given = {name: value for name, value in settings.items() if value is not None}
    style = Style(
        given.get("format", "{instruction} {input} "),
        given.get("no_input_format", "{instruction} "),
        given.get("system_format", "{system}"),
    )
    for key, template, names in zip(
        ("format", "no_input_format", "system_format"),
        style,
        (("instruction", "input"), ("instruction",), ("system",)),
        strict=True,
    ):
        try:
            template.format(**dict.fromkeys(names, ""))
        except (KeyError, IndexError, ValueError) as error:
            raise DataError(
                f"datasets[].type.{key} {template!r} does not work ({type(error).__name__}: {error}): it may hold "
                f"{{{'}, {'.join(names)}}}; write {{{{ and }}}} for braces."
            ) from error
    return Instruction(
        style,
        given.get("field_instruction", "instruction"),
        given.get("field_input", "input"),
        given.get("field_output", "output"),
        system_column=given.get("field_system", "system"),
        default_system=given.get("system_prompt", ""),
        output_required=False,
    )


@dataclasses.dataclass
class Tokenization:
    """The tokenizer as Axolotl calls it on a piece of text: BOS as the tokenizer adds it, EOS added by hand."""

    tokenizer: Any

    def __call__(self, text: str, max_length: int, add_eos: bool = True, strip_bos: bool = False) -> list[int]:
        if not text:
            return []
        ids = self.tokenizer(text, truncation=True, max_length=max_length)["input_ids"]
        if not ids:
            return []
        if add_eos and ids[-1] != self.tokenizer.eos_token_id and len(ids) < max_length:
            ids = [*ids, self.tokenizer.eos_token_id]
        return ids[1:] if strip_bos and ids[0] == self.tokenizer.bos_token_id else ids


@dataclasses.dataclass
class InstructionEncoder:
    """Prompt and answer are tokenised apart: the prompt is masked, the answer and its EOS are trained."""

    tokenize: Tokenization
    layout: Instruction
    sequence_len: int
    train_on_inputs: bool

    def __call__(self, row: Mapping[str, Any]) -> list[Document]:
        layout = self.layout
        instruction = written(row, layout.instruction)
        input = written(row, layout.input, optional=True) if layout.input else ""
        output = text_of(row, layout.output, optional=not layout.output_required, nullable=True)
        prompt = self.tokenize(layout.prompt(instruction, input, row), self.sequence_len, add_eos=False)
        answer = self.tokenize(output, self.sequence_len, strip_bos=True)
        return [Document(prompt + answer, (prompt if self.train_on_inputs else [IGNORE] * len(prompt)) + answer)]


@dataclasses.dataclass
class CompletionEncoder:
    """A text, all of it trained, cut into consecutive documents of at most sequence_len tokens."""

    tokenize: Tokenization
    column: str
    sequence_len: int

    def __call__(self, row: Mapping[str, Any]) -> list[Document]:
        text = text_of(row, self.column, nullable=True)
        ids = self.tokenize(text, self.sequence_len * COMPLETION_MAX_ROWS)
        if not ids:
            raise RowError("empty text", f"column {self.column!r} is empty")
        parts = [ids[start : start + self.sequence_len] for start in range(0, len(ids), self.sequence_len)]
        return [Document(part, list(part)) for part in parts]


@dataclasses.dataclass
class SegmentsEncoder:
    """`input_output`: segments {label, text} joined as they are, without any special token; label true is trained."""

    tokenizer: Any
    train_on_inputs: bool

    def __call__(self, row: Mapping[str, Any]) -> list[Document]:
        segments = column(row, "segments")
        if not isinstance(segments, list) or not all(
            isinstance(s, Mapping) and {"label", "text"} <= set(s) for s in segments
        ):
            raise RowError(
                "malformed segments",
                f"segments must be a list of {{label: bool, text: str}}, got {shortened(segments)}",
            )
        ids, labels = [], []
        for segment in segments:
            part = self.tokenizer(text_of(segment, "text"), add_special_tokens=False)["input_ids"]
            ids += part
            labels += part if segment["label"] or self.train_on_inputs else [IGNORE] * len(part)
        return [Document(ids, labels)]


@dataclasses.dataclass
class TokenizedEncoder:
    """Rows that hold `input_ids` and `labels` already (an `attention_mask` of ones may be there too)."""

    vocabulary: int

    def __call__(self, row: Mapping[str, Any]) -> list[Document]:
        ids, labels = list(column(row, "input_ids")), list(column(row, "labels"))
        mask = row.get("attention_mask")
        if len(ids) != len(labels) or (mask is not None and len(mask) != len(ids)):
            raise RowError(
                "unequal lengths", f"{len(ids)} input_ids, {len(labels)} labels, {len(mask or ids)} attention_mask"
            )
        if mask is not None and not all(mask):
            raise RowError("padded row", "attention_mask has zeros: store rows without padding")
        for name, values in (("input_ids", ids), ("labels", [v for v in labels if v != IGNORE])):
            if not all(isinstance(v, int) and 0 <= v < self.vocabulary for v in values):
                raise RowError(
                    "unknown token",
                    f"{name} must be integers from 0 to {self.vocabulary - 1} (the tokenizer's), got "
                    f"{shortened(values)}",
                )
        return [Document(ids, labels)]


@dataclasses.dataclass
class RowEncoder:
    """What `make_encoder` returns: rows with all three token columns pass through whatever the type, as in Axolotl."""

    encode: Encoder
    encode_tokenized: TokenizedEncoder

    def __call__(self, row: Mapping[str, Any]) -> list[Document]:
        return (self.encode_tokenized if row.keys() >= PRETOKENIZED else self.encode)(row)


def make_encoder(dataset: DatasetConfig, config: Config, tokenizer: Any) -> RowEncoder:
    """The encoder of one entry of `datasets`. Raises DataError for a type or template that is not supported."""
    tokenized = TokenizedEncoder(len(tokenizer))
    return RowEncoder(_encoder(dataset, config, tokenizer, tokenized), tokenized)


def _encoder(dataset: DatasetConfig, config: Config, tokenizer: Any, tokenized: TokenizedEncoder) -> Encoder:
    kind, train_on_inputs = dataset.type, bool(config.train_on_inputs)
    if not kind:
        return tokenized
    if isinstance(kind, Mapping) or kind in INSTRUCTION_TYPES:
        layout = user_defined(kind) if isinstance(kind, Mapping) else INSTRUCTION_TYPES[kind]
        return InstructionEncoder(Tokenization(tokenizer), layout, config.sequence_len, train_on_inputs)
    if kind == "completion":
        return CompletionEncoder(Tokenization(tokenizer), dataset.field or "text", config.sequence_len)
    if kind == "input_output":
        return SegmentsEncoder(tokenizer, train_on_inputs)
    if kind == "chat_template":
        return make_chat_encoder(dataset, config, tokenizer)
    if kind.split(".")[0].split(":")[0] == "sharegpt":
        raise DataError(
            "type: sharegpt is no longer a format of its own, in Axolotl neither. Write type: chat_template, "
            "field_messages: conversations, message_property_mappings: {role: from, content: value}."
        )
    raise DataError(
        f"datasets[].type {kind!r} is not supported. Supported are {', '.join(SUPPORTED_TYPES)}, "
        "a mapping with field_instruction, field_output, format, ..., and null for rows with input_ids and labels."
    )


def fit(document: Document, sequence_len: int, strategy: str = "drop") -> Document:
    """The document as it is trained on. RowError if it is too long (see `strategy`), too short, or masked throughout.

    With "raise" an over-long row raises as with "drop"; the caller makes it an error of the whole run.
    """
    length = len(document.input_ids)
    if length < MIN_LEN:
        raise RowError("too short", f"{length} tokens, at least {MIN_LEN} are wanted")
    if length > sequence_len:
        if strategy != "truncate":
            raise RowError("too long", f"{length} tokens, sequence_len is {sequence_len}")
        document = Document(document.input_ids[:sequence_len], document.labels[:sequence_len])
    if all(label == IGNORE for label in document.labels[1:]):  # the first token is predicted from nothing
        raise RowError("no trained token", "every label is masked (empty answer, or a prompt that fills sequence_len?)")
    return document
