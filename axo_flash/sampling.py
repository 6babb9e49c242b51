"""One question out of the data, put to the model before and after training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

ANSWER_TOKENS = 40
PROMPT_TOKENS = 16  # taken off the front of a document that is trained as a whole
SEARCHED_ROWS = 50
MIN_CHARACTERS = 20  # of a question and an answer worth reading


@dataclass(frozen=True)
class Question:
    """Token ids of a prompt and of the answer that the data gives to it."""

    prompt: list[int]
    expected: list[int]

    def prompt_text(self, tokenizer: Any) -> str:
        """The prompt as a person reads it: its last turn, where special tokens part turns, else all of it."""
        special = set(tokenizer.all_special_ids)
        parts: list[list[int]] = [[]]
        for token in self.prompt:
            if token in special:
                parts.append([])
            else:
                parts[-1].append(token)
        texts = [text for part in parts if (text := tokenizer.decode(part).strip())]
        # with several parts the last one is the header of the answer ("assistant")
        return texts[-2].removeprefix("user\n") if len(texts) > 1 else "".join(texts)

    def expected_text(self, tokenizer: Any) -> str:
        """The data's answer."""
        return tokenizer.decode(self.expected, skip_special_tokens=True).strip()


def documents(row: Mapping[str, Sequence[int]]) -> Iterator[tuple[list[int], list[int]]]:
    """(input_ids, labels) of every document in a packed row; padding at its end is left out."""
    length = row["length"]
    starts = [i for i in range(length) if row["position_ids"][i] == 0]
    for start, end in zip(starts, [*starts[1:], length], strict=True):
        yield list(row["input_ids"][start:end]), list(row["labels"][start:end])


def split_document(input_ids: list[int], labels: list[int]) -> Question | None:
    """The prompt before the first trained stretch and that stretch; the beginning and the rest of a text trained whole.

    None for a document without either.
    """
    trained = [label != -100 for label in labels]
    if not any(trained):
        return None
    start = trained.index(True)
    if start <= 1:  # nothing but a BOS before it
        start = min(PROMPT_TOKENS, len(input_ids) // 2)
    end = next((i for i in range(start, len(trained)) if not trained[i]), len(trained))
    if start == 0 or end <= start:
        return None
    return Question(input_ids[:start], input_ids[start:end])


def find_question(rows: Any, tokenizer: Any) -> Question | None:
    """The first real question in the first rows: one that ends in a question mark, has some length, and an answer of
    some length too. Without any, the first prompt at all."""
    fallback = None
    for index in range(min(len(rows), SEARCHED_ROWS)):
        for input_ids, labels in documents(rows[index]):
            question = split_document(input_ids, labels)
            if question is None:
                continue
            fallback = fallback or question
            asked, expected = question.prompt_text(tokenizer), question.expected_text(tokenizer)
            if asked.endswith("?") and min(len(asked), len(expected)) >= MIN_CHARACTERS:
                return question
    return fallback


@torch.no_grad()
def answer(model: torch.nn.Module, tokenizer: Any, question: Question) -> str:
    """The model's greedy answer, at most 40 tokens. Leaves the model's mode and settings as they were."""
    prompt = torch.tensor([question.prompt], device=model.device)
    with evaluating(model):
        output = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=ANSWER_TOKENS,
            do_sample=False,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    return tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True).strip()


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """The model in evaluation mode for the length of the block."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
