"""The files in configs/: each loads, opens with the command that runs it, and says what it is for."""

import re
from pathlib import Path

import pytest
import yaml

from axo_flash.config import load_config

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yml"))


def test_all_are_there():
    assert {path.stem for path in CONFIGS} >= {
        "demo", "llama2-7b-lora", "llama2-7b-qlora", "llama2-7b-full", "mistral-7b-lora", "mistral-7b-qlora",
        "hopsworks-llama2-7b-lora",
    }  # fmt: skip


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_loads_and_opens_with_its_command(path):
    config = load_config(path)
    text = path.read_text(encoding="utf-8")
    assert text.startswith(f"# axo-flash train configs/{path.name}\n#\n# ")
    assert config.attn_implementation == "axo_fa" and config.sample_packing and config.datasets


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_says_what_the_knobs_of_speed_and_memory_do(path):
    for key in (
        "sequence_len",
        "sample_packing",
        "micro_batch_size",
        "gradient_accumulation_steps",
        "bf16",
        "gradient_checkpointing",
    ):
        assert re.search(rf"^{key}: .*# \S", path.read_text(encoding="utf-8"), re.MULTILINE), key


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_name_says_what_it_trains(path):
    config = load_config(path)
    if path.stem == "demo":
        return
    family = {"llama2": "Llama", "mistral": "Mistral"}[path.stem.removeprefix("hopsworks-").split("-")[0]]
    assert config.model_type == f"{family}ForCausalLM" and family in config.base_model
    assert config.adapter == {"lora": "lora", "qlora": "qlora", "full": None}[path.stem.rsplit("-", 1)[1]]
    assert config.load_in_4bit == (config.adapter == "qlora")
    assert path.stem.removeprefix("hopsworks-") in config.output_dir


def test_demo_is_small_and_reproducible():
    config = load_config(next(path for path in CONFIGS if path.stem == "demo"))
    assert config.demo and config.data_mount is None and config.adapter == "lora"
    assert config.datasets[0].type == "chat_template" and config.val_set_size and config.max_steps
    assert "seed" in yaml.safe_load(next(path for path in CONFIGS if path.stem == "demo").read_text())


def test_hopsworks_file_stays_on_the_mount_and_off_it_with_the_cache():
    config = load_config(next(path for path in CONFIGS if path.stem.startswith("hopsworks")))
    assert config.data_mount == "/hopsfs" and config.datasets[0].path == "/hopsfs/Resources/train.jsonl"
    assert config.output_dir.startswith("/hopsfs/Models/")
    assert config.dataset_prepared_path and not config.dataset_prepared_path.startswith("/hopsfs")
