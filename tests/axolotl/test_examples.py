"""Axolotl's own llama-2 and mistral examples, out of its source distribution: taken as they are, meaning the same, or
refused by the names of the keys that we do not do."""

import tarfile
from pathlib import Path

import pytest
import yaml

pytest.importorskip("axolotl.integrations", reason="needs Axolotl, in an environment of its own: see .ci/run")

from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault

from axo_flash.config import ConfigError, load_config

ARCHIVE = Path(__file__).parents[2] / ".axolotl" / "axolotl-0.19.0.tar.gz"
if not ARCHIVE.exists():
    pytest.skip(f"needs {ARCHIVE}, which .ci/run fetches", allow_module_level=True)

FSDP = ["fsdp", "fsdp_config"]
# example -> the keys that it is refused for; none: it is taken
EXAMPLES = {
    "llama-2/fft_optimized.yml": ["flash_attn_fuse_mlp"],
    "llama-2/gptq-lora.yml": ["gptq", "gptq_disable_exllama", "adam_eps", "lr_quadratic_warmup", "float16"],
    "llama-2/lisa.yml": ["lisa_n_layers", "lisa_step_interval", "flash_attn_fuse_mlp"],
    "llama-2/loftq.yml": ["peft"],
    "llama-2/lora.yml": [],
    "llama-2/qlora-fsdp.yml": FSDP,
    "llama-2/qlora.yml": [],
    "llama-2/relora.yml": ["relora", "jagged_restart_steps"],
    "mistral/bigstral/bigstral-ds-zero3.yaml": ["unfrozen_parameters", "model_config", "deepspeed"],
    "mistral/config.yml": [],
    "mistral/dpo/mistral-dpo-qlora.yml": ["rl", "datasets[0].type", "datasets[0].field_chosen", "datasets[0].field_rejected"],
    "mistral/lora.yml": [],
    "mistral/mistral-qlora-fsdp.yml": ["model_config", *FSDP],
    "mistral/mixtral/mixtral-8x22b-qlora-fsdp.yml": ["model_config", *FSDP],
    "mistral/mixtral/mixtral-qlora-fsdp.yml": ["model_config", *FSDP],
    "mistral/mixtral/mixtral.yml": ["model_config", "deepspeed"],
    "mistral/mixtral/mixtral_22.yml": ["unfrozen_parameters", "model_config", "deepspeed"],
    "mistral/mps/lora-mps.yml": [],
    "mistral/orpo/mistral-qlora-orpo.yml": ["rl", "orpo_alpha", "datasets[0].type"],
    "mistral/qlora.yml": [],
}  # fmt: skip


@pytest.fixture(scope="module")
def examples() -> dict[str, str]:
    """The text of every example, by its path below examples/."""
    with tarfile.open(ARCHIVE) as archive:
        names = {name.partition("/examples/")[2]: name for name in archive.getnames()}
        wanted = [name for name in names if name.startswith(("llama-2/", "mistral/")) and name.endswith(("ml", "yaml"))]
        return {name: archive.extractfile(names[name]).read().decode() for name in wanted}


def test_none_is_left_out(examples):
    assert sorted(examples) == sorted(EXAMPLES)


@pytest.mark.parametrize("name", [name for name, refused in EXAMPLES.items() if refused])
def test_refused_by_name(name, examples, tmp_path):
    path = tmp_path / "run.yml"
    path.write_text(examples[name], encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert [error.removeprefix(f"{path}:").split(": ")[1] for error in caught.value.errors] == EXAMPLES[name]


@pytest.mark.parametrize("name", [name for name, refused in EXAMPLES.items() if not refused])
def test_means_the_same(name, examples, tmp_path):
    """Every key that Axolotl's validation leaves in, and that we have too, has the value that we give it."""
    path = tmp_path / "run.yml"
    path.write_text(examples[name], encoding="utf-8")
    ours, theirs = load_config(path).to_dict(), validate_config(DictDefault(yaml.safe_load(examples[name])))
    if ours["attn_implementation"] == "axo_fa":
        ours["attn_implementation"] = "flash_attention_2"
    elsewhere = {"datasets", "streaming_multipack_buffer_size"}  # compared below; a default, of a run that streams
    compared = {key for key, value in theirs.items() if key in ours and value is not None} - elsewhere
    assert {"sequence_len", "sample_packing", "micro_batch_size", "optimizer", "learning_rate"} <= compared
    different = {key: (ours[key], theirs[key]) for key in compared if not _same(ours[key], theirs[key])}
    assert not different
    for mine, other in zip(ours["datasets"], theirs.datasets, strict=True):
        mine["message_property_mappings"] = {"role": "role", "content": "content"} | mine["message_property_mappings"]
        assert not {key: (mine[key], other[key]) for key in other if key in mine and mine[key] != other[key]}


def _same(ours, theirs) -> bool:
    if isinstance(ours, float):
        return float(theirs) == ours  # Axolotl leaves a learning rate of "5e-5" a text
    return ours == theirs or (not ours and not theirs)
