"""What every format makes of a row: a document, or the reason why the row cannot be used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

IGNORE = -100


class Document(NamedTuple):
    """Token ids and labels of equal length; a label is its token, or -100 where no loss is taken."""

    input_ids: list[int]
    labels: list[int]


class RowError(ValueError):
    """A row that cannot be used: counted under `reason`; the message says what is wrong with it."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reason, str(self))


# ---------------------------------------------------------------------------------------------------- values of a row
def column(row: Mapping[str, Any], name: str) -> Any:
    """The value under `name`; RowError that names the columns there are, if it is absent or null."""
    if name not in row:
        raise missing_column(row, name)
    if row[name] is None:
        raise RowError(f"null {name!r}", f"column {name!r} is null")
    return row[name]


def text_of(row: Mapping[str, Any], name: str, optional: bool = False, nullable: bool = False) -> str:
    """The text under `name`. "" where it is absent (`optional`) or null (`nullable`)."""
    if (optional and name not in row) or (nullable and name in row and row[name] is None):
        return ""
    value = column(row, name)
    if not isinstance(value, str):
        raise RowError(
            f"{name!r} is not text", f"column {name!r} holds {type(value).__name__} {shortened(value)}; text is wanted"
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(
            "broken Unicode", f"column {name!r} holds a lone surrogate at character {error.start}"
        ) from error
    return value


def written(row: Mapping[str, Any], name: str, optional: bool = False) -> str:
    """As text_of, for a value that is written into a template: numbers are welcome, an optional null is ""."""
    value = row.get(name)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    return text_of(row, name, optional, nullable=optional)


def shortened(value: Any, limit: int = 60) -> str:
    """repr for an error message."""
    shown = repr(value)
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


def missing_column(row: Mapping[str, Any], name: str) -> RowError:
    """The error for a row without the column, which names those it has."""
    return RowError(
        f"missing column {name!r}", f"no column {name!r}; the row has {', '.join(map(str, row)) or 'no columns'}"
    )
