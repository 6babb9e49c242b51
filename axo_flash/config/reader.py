"""Raw values into the fields of a schema: each checked by its field, every other key explained, all errors kept."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from axo_flash.config.checks import Wrong, nearest, show
from axo_flash.config.source import KeyPath, Source, dotted


@dataclasses.dataclass(frozen=True)
class Others:
    """The keys of a mapping that are known but no fields of its schema.

    Attributes:
        unsupported: key -> why it is refused when it is on.
        tuning: key -> the unsupported feature that it tunes; such a key may hold anything.
        always: key -> (the values that describe what is always done, what that is).
        elsewhere: key -> where it belongs instead.
    """

    unsupported: dict[str, str] = dataclasses.field(default_factory=dict)
    tuning: dict[str, str] = dataclasses.field(default_factory=dict)
    always: dict[str, tuple[tuple, str]] = dataclasses.field(default_factory=dict)
    elsewhere: dict[str, str] = dataclasses.field(default_factory=dict)


def is_off(value: Any) -> bool:
    """Whether a value switches a feature off: null, false, 0, empty, or a collection of nothing else."""
    if isinstance(value, dict):
        return all(is_off(entry) for entry in value.values())
    return value is None or value is False or (isinstance(value, (int, float)) and value == 0) or value in ("", [])


def is_required(field: dataclasses.Field) -> bool:
    """Whether a field has no default."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


class Reader:
    """Collects the fields of schemas out of a source, and the errors on the way.

    Attributes:
        failed: top level keys that cannot be relied on.
    """

    def __init__(self, source: Source):
        self.source = source
        self.failed: set[str] = set()
        self._errors: list[tuple[tuple[int, int], str]] = []
        self._meant: set[str] = set()  # fields that a misspelt key stands for: not reported as missing too

    @property
    def errors(self) -> list[str]:
        """What the source itself holds against it, then the keys' problems in the order of the file, overrides last."""
        return self.source.errors + [message for _, message in sorted(self._errors, key=lambda error: error[0])]

    def report(self, path: KeyPath, problem: str) -> None:
        """Keep one problem of the key at `path`."""
        where = self.source.where(path)
        if where == self.source.name:  # what the file lacks
            order = (0, 0)
        elif where.startswith("override "):
            order = (2, 0)
        else:
            order = (1, int(where.rpartition(":")[2]))
        self._errors.append((order, f"{where}: {dotted(path)}: {problem}"))
        self.failed.add(str(path[0]))

    def read(self, schema: type, raw: dict, path: KeyPath, others: Others) -> dict[str, Any]:
        """Checked values of the fields of `schema` that `raw` gives; the rest of `raw` must be `others` at rest."""
        fields = {field.name: field for field in dataclasses.fields(schema)}
        values: dict[str, Any] = {}
        self._meant = set()
        for key, value in raw.items():
            if not isinstance(key, str):
                self.report((*path, str(key)), f"got the key {show(key)}, expected text; quote the key")
            elif key not in fields:
                self._other_key((*path, key), value, fields, others)
            elif value is not None:
                self._value(fields[key], value, (*path, key), values)
        for field in fields.values():
            if is_required(field) and raw.get(field.name) is None and field.name not in self._meant:
                expected, doc = field.metadata["check"].expected, field.metadata["doc"]
                self.report((*path, field.name), f"missing; expected {expected}: {doc[0].lower()}{doc[1:].rstrip('.')}")
        return values

    def _value(self, field: dataclasses.Field, value: Any, path: KeyPath, values: dict[str, Any]) -> None:
        try:
            values[field.name] = field.metadata["check"](value)
        except Wrong as wrong:
            if field.default is None and not isinstance(value, dict) and is_off(value):
                return  # 0, false or "" for a key that may be absent: absent, as in Axolotl
            for inside, problem in wrong.flat(path):
                self.report(inside, problem)

    def _other_key(self, path: KeyPath, value: Any, fields: Iterable[str], others: Others) -> None:
        key = str(path[-1])
        if key in others.unsupported:
            if not is_off(value):
                self.report(path, f"got {show(value)}, which is not supported: {others.unsupported[key]}; remove it")
        elif key in others.always:
            accepted, reason = others.always[key]
            if value is not None and not any(type(value) is type(one) and value == one for one in accepted):
                expected = " or ".join(show(one) for one in accepted)
                self.report(path, f"got {show(value)}, expected {expected} or nothing: {reason}; remove it")
        elif key in others.elsewhere:
            self.report(path, f"unknown key here; {others.elsewhere[key]}")
        elif key not in others.tuning:
            advice = nearest(key, fields) or nearest(key, [*others.unsupported, *others.always, *others.tuning])
            self._meant.update(name for name in fields if repr(name) in advice)
            self.report(path, f"unknown key; {advice or 'it is none of Axolotl 0.19: remove it'}")
