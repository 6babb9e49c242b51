"""`type: chat_template`: a conversation to tokens and loss mask, exactly as Axolotl 0.19's ChatTemplateStrategy.

The conversation is rendered by the template and tokenised once. Where a turn's content lies in the render is found by
rendering again with the content replaced by a placeholder: what differs is the content. Axolotl does that twice for
every trained turn, which is quadratic in the number of turns; here all contents are replaced in one render, and the
slow way is taken only if that render does not explain the original exactly (templates that look into the contents).
"""

from __future__ import annotations

import dataclasses
import json
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from axo_flash.data.document import IGNORE, Document, RowError, column, shortened
from axo_flash.data.files import DataError
from axo_flash.data.inputs import template_text
from axo_flash.data.templates import chat_template, end_of_turn_ids, template_words

if TYPE_CHECKING:
    from axo_flash.config import Config, DatasetConfig

DEFAULT_ROLES = {
    "human": "user", "user": "user", "assistant": "assistant", "gpt": "assistant", "system": "system", "tool": "tool",
}  # fmt: skip
# Axolotl's placeholders: no edge character in common, so that whatever a content shares with one it does not with the
# other
PLACEHOLDERS = ("[[dummy_message]]", "zzdummymessagezz")
END_TOKEN_REACH = 3  # an end-of-turn token is looked for at most so many tokens after the content
NOT_FOUND = (-1, -1)


def make_chat_encoder(dataset: DatasetConfig, config: Config, tokenizer: Any) -> ChatEncoder:
    """The encoder of a `type: chat_template` dataset. Raises DataError."""
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"chat_template needs a fast tokenizer (with character offsets), got {type(tokenizer).__name__}."
        )
    name, jinja = dataset.chat_template, dataset.chat_template_jinja
    if name in (None, "tokenizer_default") and not jinja:  # the file's template stands in for the tokenizer's
        name, jinja = config.chat_template, config.chat_template_jinja
    template = chat_template(name, template_text(jinja, config), tokenizer)
    roles = DEFAULT_ROLES
    if dataset.roles:
        roles = {source: target for target, sources in dataset.roles.items() for source in sources}
    to_train = dataset.roles_to_train if dataset.roles_to_train is not None else ["assistant"]
    train_on_eos = dataset.train_on_eos or "turn"
    train_on_eot = dataset.train_on_eot or train_on_eos
    if tokenizer.eos_token in (config.eot_tokens or []) and train_on_eos != train_on_eot:
        raise DataError(
            f"eot_tokens holds the EOS token {tokenizer.eos_token!r}: train_on_eos ({train_on_eos}) and train_on_eot "
            f"({train_on_eot}) must then be the same."
        )
    return ChatEncoder(
        tokenizer=tokenizer,
        template=template,
        messages=dataset.field_messages or "messages",
        properties={"role": "role", "content": "content", **(dataset.message_property_mappings or {})},
        # properties that are passed on only if the template speaks of them
        template_words=template_words(template),
        roles=roles,
        roles_to_train={roles.get(role, role) for role in to_train},
        train_on_eos=train_on_eos,
        train_on_eot=train_on_eot,
        eot_ids=end_of_turn_ids(config.eot_tokens, template, tokenizer),
        training_flag=dataset.message_field_training,
        training_detail=dataset.message_field_training_detail,
        drop_system=bool(dataset.drop_system_message),
        train_on_inputs=bool(config.train_on_inputs),
    )


@dataclasses.dataclass
class Render:
    """A rendered conversation: text, its token ids and the character range of every token."""

    text: str
    ids: list[int]
    starts: list[int]
    ends: list[int]

    def tokens_between(self, start: int, end: int) -> tuple[int, int]:
        """Token range that touches the characters start..end; NOT_FOUND if there are none."""
        if end <= start:
            return NOT_FOUND
        # a character may be split over tokens of equal offsets: bisecting the starts keeps all of its pieces
        first, last = bisect_right(self.ends, start), bisect_left(self.starts, end)
        return (first, last) if first < last else NOT_FOUND


@dataclasses.dataclass
class ChatEncoder:
    """Conversation -> one document. Trained are the contents of chosen turns and, by train_on_eos, their end token."""

    tokenizer: Any
    template: str
    messages: str
    properties: Mapping[str, str]
    template_words: frozenset[str]
    roles: Mapping[str, str]
    roles_to_train: set[str]
    train_on_eos: str
    train_on_eot: str
    eot_ids: frozenset[int]
    training_flag: str | None
    training_detail: str | None
    drop_system: bool
    train_on_inputs: bool

    def __call__(self, row: Mapping[str, Any]) -> list[Document]:
        row = _without_nulls(row)
        turns, tools = self.turns(row), _tools(row.get("tools"))
        render = self.render(turns, tools)
        spans = self.content_spans(render, turns, tools)
        labels = [IGNORE] * len(render.ids)
        last = {}
        for index, turn in enumerate(turns):
            trained = self.is_trained(turn)
            if not trained and "all" not in (self.train_on_eos, self.train_on_eot):
                continue
            start, end = spans(index)
            if trained and start != -1:
                self.mark(labels, render.ids, turn, start, end)
            for name, ids, when in self.end_tokens():
                position = _first_of(render.ids, ids, end)
                if position == -1:
                    continue
                last[name] = position
                if when == "all" or (when == "turn" and trained):
                    labels[position] = render.ids[position]
        for name, _, when in self.end_tokens():
            if when == "last" and name in last:
                labels[last[name]] = render.ids[last[name]]
        return [Document(render.ids, labels)]

    def end_tokens(self) -> tuple[tuple[str, frozenset[int], str], ...]:
        eos = frozenset({self.tokenizer.eos_token_id})
        return ("eot", self.eot_ids, self.train_on_eot), ("eos", eos, self.train_on_eos)

    def is_trained(self, turn: Mapping[str, Any]) -> bool:
        """A turn's own flag decides, then its detail, then its role."""
        if "training" in turn:
            return bool(turn["training"])
        if "training_detail" in turn:
            return bool(turn["training_detail"])
        return self.train_on_inputs or turn.get("role") in self.roles_to_train

    def mark(self, labels: list[int], ids: list[int], turn: Mapping[str, Any], start: int, end: int) -> None:
        """Write the labels of one trained turn whose content is tokens start..end."""
        if not turn.get("training_detail"):
            labels[start:end] = ids[start:end]
            return
        for index in _detailed_tokens(self.tokenizer, turn["content"], turn["training_detail"]):
            if start + index < len(ids):
                labels[start + index] = ids[start + index]

    # ------------------------------------------------------------------------------------------------ rows to turns
    def turns(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The conversation as the template wants it. Raises RowError."""
        messages = column(row, self.messages)
        if isinstance(messages, str):
            try:
                messages = json.loads(messages)
            except json.JSONDecodeError as error:
                raise RowError("malformed messages", f"{self.messages} is text but not JSON: {error}") from error
        if not isinstance(messages, list) or not messages or not all(isinstance(m, Mapping) for m in messages):
            raise RowError("malformed messages", f"{self.messages} must be a list of turns, got {shortened(messages)}")
        turns = [self.turn(message) for message in messages]
        if turns[0]["role"] != "system" and "system" in row:
            turns.insert(0, {"role": "system", "content": row["system"]})
        if self.drop_system and turns[0]["role"] == "system":
            turns = turns[1:]
        if not turns:
            raise RowError("malformed messages", f"{self.messages} holds nothing but a system turn, which is dropped")
        return turns

    def turn(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """One message under the template's names."""
        turn = {name: message[source] for name, source in self.properties.items() if message.get(source) is not None}
        if "role" not in turn:
            source = self.properties["role"]
            raise RowError(
                "turn without role",
                f"no {source!r} in the turn {shortened(dict(message))}; set message_property_mappings",
            )
        turn["role"] = self.roles.get(turn["role"], turn["role"])
        for name in message.keys() - set(self.properties.values()):
            if name in self.template_words and message[name] is not None:
                turn[name] = message[name]
        for name, source in (("training", self.training_flag), ("training_detail", self.training_detail)):
            if source and message.get(source) is not None:
                turn[name] = message[source]
        if isinstance(turn.get("content"), list):
            turn["content"], detail = _joined_parts(turn["content"])
            turn |= {"training_detail": detail} if detail is not None else {}
        if "content" not in turn and "tool_calls" not in turn:
            source = self.properties["content"]
            raise RowError(
                "turn without content",
                f"no {source!r} in the turn {shortened(dict(message))}; set message_property_mappings",
            )
        if turn.get("tool_calls"):
            turn["tool_calls"] = _with_parsed(turn["tool_calls"], "arguments")
        return turn

    # --------------------------------------------------------------------------------------------- turns to positions
    def text(self, turns: list[dict[str, Any]], tools: list[dict] | None) -> str:
        """Render the conversation. Raises RowError with the template's own complaint."""
        from jinja2.exceptions import TemplateError

        try:
            return self.tokenizer.apply_chat_template(turns, tools=tools, chat_template=self.template, tokenize=False)
        except (TemplateError, TypeError) as error:
            raise RowError("refused by the chat template", f"the chat template says: {error}") from error

    def render(self, turns: list[dict[str, Any]], tools: list[dict] | None) -> Render:
        text = self.text(turns, tools)
        try:
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        except (TypeError, UnicodeEncodeError) as error:  # a lone surrogate, which JSON can spell
            raise RowError("broken Unicode", f"the conversation cannot be tokenised: {error}") from error
        starts, ends = zip(*encoded["offset_mapping"], strict=True) if encoded["input_ids"] else ((), ())
        return Render(text, list(encoded["input_ids"]), list(starts), list(ends))

    def content_spans(self, render: Render, turns: list[dict[str, Any]], tools: list[dict] | None):
        """A function: index of a turn -> (first, one past last) token of its content, NOT_FOUND if it has none."""
        together = self._spans_together(render, turns, tools)

        def span(index: int) -> tuple[int, int]:
            # Axolotl's rule: Mistral's templates do not write a system turn of its own
            if index == 0 and turns[0]["role"] == "system" and "mistral" in str(self.tokenizer.name_or_path).lower():
                return NOT_FOUND
            # a content that begins like a placeholder can confuse Axolotl's diff: then its answer is asked for, not
            # ours
            if together and turns[index]["content"].lstrip()[0] not in (PLACEHOLDERS[0][0], PLACEHOLDERS[1][0]):
                return render.tokens_between(*together[index])
            return render.tokens_between(*self._span_alone(render, turns, index, tools))

        return span

    def _spans_together(
        self, render: Render, turns: list[dict], tools: list[dict] | None
    ) -> list[tuple[int, int]] | None:
        """Character range of every content, from one render of placeholders; None if that does not explain `render`."""
        plain = {"role", "content", "training", "training_detail"}
        if any(
            turn.keys() - plain or not isinstance(turn["content"], str) or not turn["content"].strip() for turn in turns
        ):
            return None
        dummies = [f"[[turn{index}]]" for index in range(len(turns))]
        if any(dummy in render.text for dummy in dummies):
            return None
        rendered = self.text([{"role": t["role"], "content": d} for t, d in zip(turns, dummies, strict=True)], tools)
        ranges, rebuilt, rest = [], "", rendered
        for turn, dummy in zip(turns, dummies, strict=True):
            before, found, rest = rest.partition(dummy)
            if not found:
                return None
            rebuilt += before
            content = turn["content"]
            if not render.text.startswith(content, len(rebuilt)):  # templates that trim
                content = content.strip()
            ranges.append((len(rebuilt), len(rebuilt) + len(content)))
            rebuilt += content
        return ranges if rebuilt + rest == render.text else None

    def _span_alone(self, render: Render, turns: list[dict], index: int, tools: list[dict] | None) -> tuple[int, int]:
        """Character range of one turn's content, by Axolotl's way: the widest difference to two placeholders."""
        ranges = []
        for placeholder in PLACEHOLDERS:
            dummy = {"role": turns[index].get("role"), "content": placeholder}
            text = self.text([*turns[:index], dummy, *turns[index + 1 :]], tools)
            ranges.append(_difference(render.text, text))
        return min(start for start, _ in ranges), max(end for _, end in ranges)


def _first_of(ids: list[int], wanted: frozenset[int], start: int) -> int:
    """First position from `start` on, but at most END_TOKEN_REACH after it, that holds one of the tokens; or -1."""
    for position in range(start, min(len(ids), start + END_TOKEN_REACH + 1)):
        if ids[position] in wanted:
            return position
    return -1


def _difference(text: str, other: str) -> tuple[int, int]:
    """Range of `text` that is left when the common prefix and then the common suffix with `other` are taken away."""
    limit = min(len(text), len(other))
    start = _common_prefix(text, other, limit)
    return start, len(text) - _common_prefix(text[::-1], other[::-1], limit - start)


def _common_prefix(left: str, right: str, limit: int) -> int:
    """Length of the common prefix, at most `limit`, by bisection: slices are compared in C, characters are not."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if left[low:middle] == right[low:middle] else (low, middle - 1)
    return low


def _joined_parts(parts: list[Any]) -> tuple[str, list[dict[str, Any]] | None]:
    """Content given as a list of parts: its text, and what to train of it if a part says so (`train` or `weight`)."""
    text, details, explicit = "", [], False
    for part in parts:
        if not isinstance(part, Mapping):
            continue
        piece = part.get("text") or part.get("content") or part.get("value") or ""
        flag = part.get("train")
        if flag is None and part.get("weight") is not None:
            flag = part["weight"] != 0
        explicit |= flag is not None
        if piece:
            span = {"begin_offset": len(text), "end_offset": len(text) + len(piece) - 1}
            details.append(span | {"train": True if flag is None else flag})
            text += piece
    return text, details if explicit else None


def _detailed_tokens(tokenizer: Any, text: Any, details: list[Mapping[str, Any]]) -> list[int]:
    """Indices of the tokens of `text` to train on, by details {begin_offset, end_offset (inclusive), train}.

    As in Axolotl a detail is widened to whole tokens, and a token counts if it lies within a trained one.
    """
    if not isinstance(text, str):
        raise RowError("malformed training detail", "training details need a turn whose content is text")
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    if not offsets:
        return []
    starts = [start for start, _ in offsets]
    ends = [start - 1 for start in starts[1:]] + [len(text) - 1]
    count, chosen = len(starts), set()
    for detail in details:
        try:
            begin, end, train = detail["begin_offset"], detail["end_offset"], detail["train"]
        except (KeyError, TypeError) as error:
            raise RowError(
                "malformed training detail", f"wanted {{begin_offset, end_offset, train}}, got {shortened(detail)}"
            ) from error
        first = next((i for i in range(count) if starts[i] >= begin), count)
        first -= first > 0 and ends[first - 1] > begin
        last = next((i for i in range(count - 1, -1, -1) if ends[i] <= end), -1)
        last += last < count - 1 and starts[last + 1] < end
        if train and first <= last:
            chosen |= {i for i in range(count) if starts[i] >= starts[first] and ends[i] <= ends[last]}
    return sorted(chosen)


def _tools(tools: Any) -> list[dict] | None:
    """The row's tool descriptions; JSON text is parsed, as are the parameters in them."""
    if tools is None:
        return None
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise RowError("malformed tools", f"tools is text but not JSON: {error}") from error
    if not isinstance(tools, list):
        raise RowError("malformed tools", f"tools must be a list, got {shortened(tools)}")
    return _with_parsed(tools, "parameters")


def _with_parsed(calls: list[Any], key: str) -> list[Any]:
    """Copies of calls or tools whose function's `key` is parsed where it is JSON text."""
    parsed = []
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        if isinstance(function, Mapping) and isinstance(function.get(key), str):
            try:
                call = {**call, "function": {**function, key: json.loads(function[key])}}
            except json.JSONDecodeError as error:
                raise RowError(
                    "malformed tools", f"{key} of {function.get('name', 'a function')} is not JSON: {error}"
                ) from error
        parsed.append(call)
    return parsed


def _without_nulls(value: Any) -> Any:
    """Nulls taken out of all mappings: Arrow adds them where rows differ in their keys."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
