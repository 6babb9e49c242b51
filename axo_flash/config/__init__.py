"""The YAML of a run, under Axolotl's keys. Loading it needs PyYAML alone: what depends on the device stays as written.

schema.py       every key that acts: one dataclass field each, with its check and its documentation
    load.py         load_config
rules.py        what must hold between keys
unsupported.py  Axolotl's other keys: accepted while off, refused with a reason
source.py       the file and the overrides as plain values, with the place of each
reader.py       source -> schema, all problems at once
checks.py       the kinds of values
"""

from axo_flash.config.load import load_config
from axo_flash.config.schema import Config, DatasetConfig, key_docs
from axo_flash.config.source import ConfigError

__all__ = ["Config", "ConfigError", "DatasetConfig", "key_docs", "load_config"]
