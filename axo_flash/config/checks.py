"""What a value of the YAML may be: a check turns what was written into what the program uses, or says what it wanted.

A check is a `Check`: calling it with a raw value returns the normal form or raises `Wrong`. Checks know no keys.
"""

import difflib
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


class Wrong(ValueError):
    """A value that a check refuses.

    Attributes:
        problem: what was got and what was expected.
        advice: what to do about it, if there is more to say than that.
        parts: for a list or mapping, what is wrong inside it: (path, Wrong) pairs that replace the rest.
    """

    def __init__(self, problem: str, advice: str = "", parts: Sequence[tuple[tuple[str | int, ...], "Wrong"]] = ()):
        super().__init__(problem)
        self.problem, self.advice, self.parts = problem, advice, parts

    def flat(self, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], str]]:
        """(path inside the value, message) of every single problem."""
        for inside, part in self.parts:
            yield from part.flat((*path, *inside))
        if not self.parts:
            yield path, f"{self.problem}; {self.advice}" if self.advice else self.problem


@dataclass(frozen=True)
class Check:
    """One kind of value: `expected` says which in words; `convert` returns the normal form or raises Wrong."""

    expected: str
    convert: Callable[[Any], Any]

    def __call__(self, value: Any) -> Any:
        return self.convert(value)


def nearest(name: Any, known: Iterable[str]) -> str:
    """`did you mean 'x'?` for the nearest known name, or nothing."""
    name, known = str(name).lower(), sorted(known)
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not matches and len(name) >= 3:
        matches = [other for other in known if other.startswith(name)]
    return f"did you mean {matches[0]!r}?" if matches else ""


def show(value: Any) -> str:
    """A value as an error message quotes it: short, and recognisable as what stands in the YAML."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:76] + " ..."


def wrong(value: Any, expected: str, advice: str = "") -> Wrong:
    """The usual Wrong: got this, expected that."""
    return Wrong(f"got {show(value)}, expected {expected}", advice)


def check(expected: str) -> Callable[[Callable[[Any], Any]], Check]:
    """Decorator: a Check of a function from the raw value to the normal form."""
    return lambda convert: Check(expected, convert)


@check("true or false")
def flag(value: Any) -> bool:
    """A YAML boolean."""
    if isinstance(value, bool):
        return value
    raise wrong(value, "true or false")


def flag_or(*words: str, refused: Mapping[str, str] | None = None) -> Check:
    """A flag or one of a few words, with the reason why other words that users know are not taken."""
    expected = ", ".join(("true", *words, "false")[:-1]) + " or false"

    def convert(value: Any) -> bool | str:
        if isinstance(value, bool) or value in words:
            return value
        known = (refused or {}).get(value) if isinstance(value, str) else None
        raise wrong(value, expected, known or "")

    return Check(expected, convert)


@check("a text")
def any_text(value: Any) -> str:
    """Any text, the empty one too."""
    if isinstance(value, str):
        return value
    scalar = isinstance(value, (int, float, bool)) or hasattr(value, "isoformat")
    raise wrong(value, "a text", "quote it" if scalar else "")


@check("a text")
def text(value: Any) -> str:
    """A text with something in it."""
    if not any_text(value).strip():
        raise wrong(value, "a text that is not empty")
    return value


@check("a path")
def file_path(value: Any) -> str:
    """A path, with `~` and environment variables put in."""
    expanded = os.path.expandvars(os.path.expanduser(text(value)))
    if missing := re.search(r"\$(\w+|\{\w+\})", expanded):
        raise wrong(value, "a path", f"the environment variable {missing[1].strip('{}')} is not set: export it")
    return expanded


def _to_number(value: Any, expected: str) -> int | float:
    """YAML 1.1 reads `5e-5` (no dot) as text, and people quote numbers: both are numbers here, as in Axolotl."""
    result = value
    if isinstance(value, str):
        try:
            result = int(value) if re.fullmatch(r"\s*[+-]?\d+\s*", value) else float(value)
        except ValueError:
            raise wrong(value, expected) from None
    if isinstance(result, bool) or not isinstance(result, (int, float)) or not math.isfinite(result):
        raise wrong(value, expected)
    return result


def integer(least: int) -> Check:
    """A whole number, `least` or more."""
    expected = f"a whole number, {least} or more"

    def convert(value: Any) -> int:
        number = _to_number(value, expected)
        if number != int(number) or number < least:
            raise wrong(value, expected)
        return int(number)

    return Check(expected, convert)


def number(expected: str, fits: Callable[[float], bool]) -> Check:
    """A float for which `fits` holds; `expected` says so in words."""

    def convert(value: Any) -> float:
        result = float(_to_number(value, expected))
        if not fits(result):
            raise wrong(value, expected)
        return result

    return Check(expected, convert)


positive = number("a number above 0", lambda x: x > 0)
not_negative = number("a number, 0 or more", lambda x: x >= 0)
share = number("a number from 0 up to, but not including, 1", lambda x: 0 <= x < 1)


def count_or_fraction(zero: bool) -> Check:
    """A whole number of 1 or more, or a fraction of the whole; 0 where `zero` allows it."""
    expected = ("0, " if zero else "") + "a whole number, 1 or more, or a fraction below 1"

    def convert(value: Any) -> int | float:
        result = _to_number(value, expected)
        if result < 0 or (result == 0 and not zero) or (result > 1 and result != int(result)):
            raise wrong(value, expected)
        if isinstance(result, float) and result == 1:
            raise wrong(value, expected, "1.0 would be the whole; for one, write 1")
        return int(result) if result == 0 or result >= 1 else result

    return Check(expected, convert)


def choice(names: str, refused: Mapping[str, str] | None = None) -> Check:
    """One of a few words, given as one text; `refused` says why a word that users know is not among them."""
    words = names.split()
    expected = f"one of {', '.join(words)}"

    def convert(value: Any) -> str:
        if value in words:
            return value
        reason = (refused or {}).get(value) if isinstance(value, str) else None
        near = difflib.get_close_matches(str(value).lower(), words, n=3) if len(words) > 7 else []
        few = f"one of {', '.join(near)}, ... ({len(words)} in all)" if near else expected
        raise wrong(value, few, reason or nearest(value, words))

    return Check(expected, convert)


def list_of(item: Check) -> Check:
    """A list whose entries all pass `item`."""
    expected = f"a list, each entry {item.expected}"

    def convert(value: Any) -> list:
        if not isinstance(value, list):
            raise wrong(value, expected, "write it as [a, b]")
        return [entry for _, entry in _all_of(((index, item, entry) for index, entry in enumerate(value)), expected)]

    return Check(expected, convert)


def mapping(keys: Mapping[str, Check] | Check) -> Check:
    """A mapping without its null entries: with the names in `keys` alone or, for one check, of any names."""
    named = not isinstance(keys, Check)
    expected = f"a mapping with {', '.join(keys)}" if named else f"a mapping of names, each to {keys.expected}"

    def unknown(key: Any) -> Check:
        def convert(_: Any) -> None:
            raise Wrong(f"unknown key, expected {' or '.join(keys)}", nearest(key, keys))

        return Check(expected, convert)

    def convert(value: Any) -> dict:
        if not isinstance(value, dict):
            raise wrong(value, expected)
        entries = ((str(key), keys.get(key) or unknown(key) if named else keys, entry) for key, entry in value.items())
        return dict(_all_of(((key, one, entry) for key, one, entry in entries if entry is not None), expected))

    return Check(expected, convert)


def _all_of(entries: Iterable[tuple[str | int, Check, Any]], expected: str) -> list[tuple[str | int, Any]]:
    """(key, normal form) of every (key, check, raw value); one Wrong with all that is wrong."""
    values, parts = [], []
    for key, one, entry in entries:
        try:
            values.append((key, one(entry)))
        except Wrong as error:
            parts.append(((key,), error))
    if parts:
        raise Wrong(f"expected {expected}", parts=parts)
    return values


def either(when: Callable[[Any], bool], first: Check, second: Check) -> Check:
    """`first` for values of which `when` holds, `second` for all others."""
    return Check(f"{second.expected}, or {first.expected}", lambda value: (first if when(value) else second)(value))
