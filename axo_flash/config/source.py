"""A YAML file and its command line overrides as plain values, with the place that every value came from.

Nothing here knows a key: which keys exist and what they may hold is `axo_flash.config`.
"""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

KeyPath = tuple[str | int, ...]  # ("datasets", 0, "path")


class ConfigError(ValueError):
    """A configuration that cannot be used.

    Attributes:
        errors: one message for each problem, every one with its own `file:line` or override. `str()` shows them all.
    """

    def __init__(self, errors: Sequence[str]):
        self.errors = list(errors)
        if len(self.errors) == 1:
            text = self.errors[0]
        else:
            text = f"{len(self.errors)} problems:\n" + "\n".join(f"  {error}" for error in self.errors)
        super().__init__(text)


@dataclass
class Source:
    """The values of one YAML file with its overrides applied, and where each came from.

    Attributes:
        name: the file, as given.
        values: plain values, nothing checked.
        places: where each key stands, as messages quote it.
        errors: keys given twice, and overrides that could not be applied.
    """

    name: str
    values: dict[Any, Any] = field(default_factory=dict)
    places: dict[KeyPath, str] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    def where(self, path: KeyPath) -> str:
        """`file:line` or `override 'key=value'` of a key, or of the nearest thing that encloses it."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.places:
                return self.places[path[:end]]
        return self.name

    def set(self, names: Sequence[str], value: Any, override: str) -> None:
        """Put an override's value where its names lead, through mappings that may have to be made.

        Raises:
            ConfigError: they lead through a value that holds nothing, or to a list entry that is not there.
        """
        values = copy.deepcopy(self.values)
        holder: Any = values
        path: KeyPath = ()
        for name in names[:-1]:
            path = (*path, _step(holder, path, name, override))
            if isinstance(holder, dict) and holder.get(path[-1]) is None:
                holder[path[-1]] = {}
            holder = holder[path[-1]]
        path = (*path, _step(holder, path, names[-1], override))
        holder[path[-1]] = value
        self.values = values
        for replaced in [known for known in self.places if known[: len(path)] == path]:
            del self.places[replaced]
        for end in range(1, len(path) + 1):
            self.places.setdefault(path[:end], f"override {override!r}")


def _step(holder: Any, path: KeyPath, name: str, override: str) -> str | int:
    """The key or index that `name` is in the value at `path`."""
    where = dotted(path)
    if isinstance(holder, dict):
        return name
    if not isinstance(holder, list):
        raise ConfigError(
            [f"override {override!r}: {where} is {holder!r}, in which nothing can be set; override {where} as a whole"]
        )
    if not name.isdecimal() or int(name) >= len(holder):
        expected = f"an index from 0 to {len(holder) - 1}" if holder else "no index: the list is empty"
        raise ConfigError([f"override {override!r}: got {name!r} after {where}, expected {expected}"])
    return int(name)


def dotted(path: KeyPath) -> str:
    """A path as the user writes it: `datasets[0].path`."""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else str(step)
    return text


def read_source(path: str | Path, overrides: Sequence[str] = ()) -> Source:
    """Read one YAML mapping and apply `key=value` overrides to it.

    Args:
        path: the YAML file.
        overrides: `key=value` texts; the value is YAML, dots and list indexes lead inwards (`datasets.0.path=x`).

    Raises:
        ConfigError: the file cannot be read or is not one YAML mapping. Smaller problems are left in `errors`.
    """
    source = _read_yaml(Path(path).expanduser())
    for override in overrides:
        try:
            source.set(*_parse_override(override), override)
        except ConfigError as error:
            source.errors += error.errors
    return source


def _parse_override(override: str) -> tuple[list[str], Any]:
    key, equals, text = override.partition("=")
    key = key.strip()
    if key.startswith("-"):
        bare = f"{key.lstrip('-')}={text if equals else 'VALUE'}"
        raise ConfigError([f"override {override!r}: expected key=value; write {bare!r}, without dashes"])
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
        raise ConfigError([f"override {override!r}: expected key=value; write for example 'learning_rate=1e-4'"])
    try:
        return key.split("."), yaml.safe_load(text)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(
            [f"override {override!r}: the value is not YAML ({problem}); quote it: {key}='\"...\"'"]
        ) from error


def _read_yaml(path: Path) -> Source:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError([f"{path}: no such file; {_yaml_files(path.parent)}"]) from None
    except IsADirectoryError:
        raise ConfigError([f"{path}: is a directory; {_yaml_files(path)}"]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: not UTF-8 text (byte {error.start}: {error.reason}); save it as UTF-8"]) from None
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from error
    return parse_yaml(text, str(path))


def _yaml_files(directory: Path) -> str:
    names = sorted(path.name for path in directory.glob("*.y*ml")) if directory.is_dir() else []
    return f"the YAML files in {directory} are {', '.join(names[:8])}" if names else "give the path of a YAML file"


def parse_yaml(text: str, name: str) -> Source:
    """The one mapping of a YAML text, safely constructed (plain values only), with the line of every key.

    Raises:
        ConfigError: broken syntax, or no mapping; `name` stands for the file.
    """
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            raise ConfigError([f"{name}: the file is empty; it needs at least base_model, datasets and learning_rate"])
        if not isinstance(node, yaml.MappingNode):
            kind = "a list" if isinstance(node, yaml.SequenceNode) else "plain text"
            raise ConfigError([f"{name}:{_line(node)}: got {kind}, expected a mapping of 'key: value' lines"])
        source = Source(name)
        source.errors += _walk(node, (), source, set())
        source.values = loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ConfigError([_syntax_error(error, name)]) from error
    return source


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _walk(node: yaml.Node, path: KeyPath, source: Source, seen: set[int], above: tuple[int, ...] = ()) -> list[str]:
    """Note the line of every key below `node` in `source.places`; the errors for keys given twice.

    An anchored node is walked once: its other uses take the line of what encloses them.

    Raises:
        ConfigError: a key that is no plain value, or a node that holds itself.
    """
    if isinstance(node, yaml.ScalarNode):
        return []
    if id(node) in above:
        raise ConfigError([f"{source.name}:{_line(node)}: an anchor holds its own alias; write the value out"])
    if id(node) in seen:
        return []
    seen.add(id(node))
    above = (*above, id(node))
    errors = []
    if isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            source.places[(*path, index)] = f"{source.name}:{_line(child)}"
            errors += _walk(child, (*path, index), source, seen, above)
        return errors
    lines: dict[str, int] = {}
    for key, child in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError([f"{source.name}:{_line(key)}: a key must be text, got a list or mapping"])
        child_path = (*path, key.value)
        place = f"{source.name}:{_line(key)}"
        if key.value in lines and key.tag != "tag:yaml.org,2002:merge":
            errors.append(f"{place}: {dotted(child_path)}: given twice, first in line {lines[key.value]}; keep one")
        lines.setdefault(key.value, _line(key))
        source.places[child_path] = place
        errors += _walk(child, child_path, source, seen, above)
    return errors


def _syntax_error(error: yaml.YAMLError, name: str) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return f"{name}: not a YAML text: {' '.join(str(error).split())}"
    problem = error.problem or "broken syntax"
    advice = "indent with spaces, and quote texts that hold ': ', '#', '{', '[', '%' or '@'"
    if "single document" in str(error.context):
        problem, advice = "a second document starts here", "keep one configuration to a file, without '---' lines"
    elif "\\t" in problem:
        problem, advice = "a tab character", "indent with spaces"
    elif "could not determine a constructor" in problem:
        advice = "remove the '!' tag: only plain values are read"
    elif "undefined alias" in problem:
        advice = "define the anchor first, or quote the text if it is no alias"
    return f"{name}:{mark.line + 1}: not YAML: {problem} (column {mark.column + 1}); {advice}"
