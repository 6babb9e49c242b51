"""A YAML file to a Config: Axolotl's older spellings, the schema, the rules between keys; all problems at once."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from axo_flash.config.checks import show
from axo_flash.config.reader import Others, Reader, is_required
from axo_flash.config.rules import RULES, dataset_problems
from axo_flash.config.schema import Config, DatasetConfig
from axo_flash.config.source import ConfigError, read_source
from axo_flash.config.unsupported import ALWAYS, DATASET_UNSUPPORTED, RENAMED, TUNING, UNSUPPORTED

# Axolotl's older way to choose: a switch -> the attention it stands for
ATTENTION_SWITCHES = {"flash_attention": "axo_fa", "sdp_attention": "sdpa", "eager_attention": "eager"}
_CONFIG_KEYS = {field.name for field in dataclasses.fields(Config)}
_DATASET_KEYS = {field.name for field in dataclasses.fields(DatasetConfig)}
TOP_LEVEL = Others(
    UNSUPPORTED, TUNING, ALWAYS, dict.fromkeys(_DATASET_KEYS - _CONFIG_KEYS, "it belongs in an entry of datasets")
)
IN_DATASET = Others(
    DATASET_UNSUPPORTED,
    elsewhere=dict.fromkeys(_CONFIG_KEYS - _DATASET_KEYS, "it belongs at the top of the file, not in a dataset"),
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read, check and normalise the YAML of a run.

    Args:
        path: the YAML file.
        overrides: `key=value` texts that win over the file; the value is YAML, dots lead inwards (datasets.0.path=x).

    Raises:
        ConfigError: anything at all is wrong with them; its `errors` hold every problem, each with its place.
    """
    source = read_source(path, overrides)
    reader = Reader(source)
    raw = _attention(_renamed(source.values, reader), reader)
    datasets = {key: _datasets(key, raw.get(key), reader) for key in ("datasets", "test_datasets")}
    values = reader.read(Config, raw, (), TOP_LEVEL)
    values |= {key: entries for key, entries in datasets.items() if key in values or key == "datasets"}
    absent = [field.name for field in dataclasses.fields(Config) if is_required(field) and field.name not in values]
    config = Config(**values, **dict.fromkeys(absent))  # whole enough for the rules that read nothing of what failed
    for keys, rule in RULES:
        if not reader.failed.intersection(keys):
            for key, problem in rule(config):
                reader.report((key,), problem)
    if reader.errors:
        raise ConfigError(reader.errors)
    return _normalised(config)


def _renamed(raw: dict, reader: Reader) -> dict:
    """`raw` under the names of our fields where Axolotl has two for one thing."""
    result = dict(raw)
    for old, new in RENAMED.items():
        value = result.pop(old, None)
        if value is None:
            continue
        if result.get(new) is not None:
            reader.report((old,), f"is another name of {new}, which is set too; keep {new}")
            continue
        result[new] = value
        reader.source.places[(new,)] = reader.source.where((old,))
    return result


def _attention(raw: dict, reader: Reader) -> dict:
    """`raw` with Axolotl's older switches turned into attn_implementation; `flash_attention: false` is sdpa."""
    result = {name: value for name, value in raw.items() if name not in ATTENTION_SWITCHES}
    switches = {name: raw[name] for name in ATTENTION_SWITCHES if raw.get(name) is not None}
    for name, value in switches.items():
        if not isinstance(value, bool):
            reader.report((name,), f"got {show(value)}, expected true or false")
    on = [name for name, value in switches.items() if value is True]
    chosen = raw.get("attn_implementation")
    if chosen is not None:
        for name in on:
            reader.report(
                (name,), f"excludes attn_implementation, which is {show(chosen)}; keep attn_implementation alone"
            )
    elif len(on) > 1:
        reader.report((on[1],), f"excludes {on[0]}, which is true too; keep one of them")
    elif on or switches.get("flash_attention") is False:
        result["attn_implementation"] = ATTENTION_SWITCHES[on[0]] if on else "sdpa"
    return result


def _datasets(key: str, raw: Any, reader: Reader) -> list[DatasetConfig]:
    """The entries of `datasets` or `test_datasets`; none for what is reported elsewhere as missing or as no list."""
    datasets = []
    for index, entry in enumerate(raw if isinstance(raw, list) else []):
        where = (key, index)
        if not isinstance(entry, dict):
            reader.report(where, f"got {show(entry)}, expected a mapping; write '- path: ...' and below it 'type: ...'")
            continue
        before = len(reader.errors)
        values = reader.read(DatasetConfig, entry, where, IN_DATASET)
        if len(reader.errors) == before:
            datasets.append(DatasetConfig(**values))
            for inside, problem in dataset_problems(datasets[-1]):
                reader.report((*where, inside), problem)
    return datasets


def _normalised(config: Config) -> Config:
    if config.fp16:  # bf16: auto leaves the choice to fp16, as in Axolotl
        config.bf16 = False
    datasets = [*config.datasets, *(config.test_datasets or [])]
    for holder in (config, *datasets):
        if holder.chat_template_jinja:
            holder.chat_template = "jinja"
    for dataset in datasets:
        for name in ("role", "content"):
            old = getattr(dataset, f"message_field_{name}")
            if old:
                dataset.message_property_mappings[name] = old
            setattr(dataset, f"message_field_{name}", None)
    return config
