"""A run.yml in a directory of its own, loaded or refused."""

from pathlib import Path

import pytest

from axo_flash.config import Config, ConfigError, load_config


@pytest.fixture
def load(tmp_path, monkeypatch):
    """load(text, *overrides): the Config of a run.yml with that text."""
    monkeypatch.chdir(tmp_path)

    def load(text: str, *overrides: str) -> Config:
        Path("run.yml").write_text(text, encoding="utf-8")
        return load_config("run.yml", overrides)

    return load


@pytest.fixture
def problems(load):
    """problems(text, *overrides): the errors of a run.yml with that text; there must be some."""

    def problems(text: str, *overrides: str) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            load(text, *overrides)
        assert all(error in str(caught.value) for error in caught.value.errors)
        return caught.value.errors

    return problems
