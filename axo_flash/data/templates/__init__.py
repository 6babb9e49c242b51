"""Chat templates by name, and what can be read off a template. The .jinja files here are Axolotl's (Apache-2.0)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from axo_flash.data.files import DataError

TEMPLATES = Path(__file__).parent
FALLBACK = "tokenizer_default_fallback_"


def template_names() -> list[str]:
    """Every value that `chat_template` may have."""
    named = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
    return ["tokenizer_default", *named, *(FALLBACK + name for name in named), "jinja"]


def chat_template(name: str | None, jinja: str | None, tokenizer: Any) -> str:
    """The template that `chat_template: name` means; `jinja` is the text of an own one. Raises DataError."""
    if name == "jinja" or (not name and jinja):
        if not jinja:
            raise DataError("chat_template: jinja needs chat_template_jinja (the template, or a path to it).")
        return jinja
    name = name or "tokenizer_default"
    if name == "tokenizer_default" or name.startswith(FALLBACK):
        if tokenizer.chat_template:
            return tokenizer.chat_template
        if name == "tokenizer_default":
            raise DataError(
                "this tokenizer has no chat template: set chat_template to one of "
                f"{', '.join(n for n in template_names() if not n.startswith('tokenizer_default'))}."
            )
        name = name.removeprefix(FALLBACK)
    path = TEMPLATES / f"{name}.jinja"
    if name not in template_names() or not path.is_file():
        raise DataError(f"chat_template {name!r} is not known; use one of {', '.join(template_names())}.")
    return path.read_text(encoding="utf-8")


def template_words(template: str) -> frozenset[str]:
    """Properties that a template takes from `message` or `messages`, as `message.name` or `message['name']`.

    Only variables of these names are looked at: so it is in Axolotl, whose tokens these have to be.
    """
    chains = re.findall(r"\bmessages?((?:\s*\.\s*\w+|\s*\[[^\]]*\])+)", template)
    return frozenset(word for chain in chains for word in re.findall(r"[^\W\d]\w*", chain))


def end_of_turn_ids(tokens: list[str] | None, template: str, tokenizer: Any) -> frozenset[int]:
    """Ids of the tokens that end a turn: `eot_tokens` that the template holds, or EOS. Raises DataError."""
    given = tokens if tokens is not None else [tokenizer.eos_token] if tokenizer.eos_token is not None else []
    ids = {token: tokenizer.encode(token, add_special_tokens=False) for token in given}
    if tokens is not None:
        ids = {token: value for token, value in ids.items() if token in template}
        for token, value in ids.items():
            if len(value) != 1:
                raise DataError(f"eot_tokens: {token!r} is {len(value)} tokens {value}, not one; add it under tokens.")
    return frozenset(value[0] for value in ids.values() if len(value) == 1)
