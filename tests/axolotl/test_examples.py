"""Axolotl's own llama-2 and mistral examples, out of its source distributions: taken as they are, meaning the same, or
refused by the names of the keys that we do not do.

Those of 0.6.0, of December 2024, are the oldest that PyPI has; what else a configuration of that year may say is in the keys
that 0.6.0 knows (and in tests/config/test_config_axolotl.py).
"""

import ast
import tarfile
from pathlib import Path

import pytest
import yaml

pytest.importorskip("axolotl.integrations", reason="needs Axolotl, in an environment of its own: see .ci/run")

from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault

from axo_flash.config import ConfigError, load_config

DPO = ["rl", "datasets[0].type", "datasets[0].field_chosen", "datasets[0].field_rejected"]
FSDP = ["fsdp", "fsdp_config"]
FUSED = ["flash_attn_rms_norm", "flash_attn_fuse_mlp"]
# version -> example -> the keys that it is refused for; none: it is taken
EXAMPLES = {
    "0.6.0": {
        "llama-2/fft_optimized.yml": FUSED,
        "llama-2/gptq-lora.yml": ["gptq", "gptq_disable_exllama", "adam_eps", "lr_quadratic_warmup", "float16"],
        "llama-2/lisa.yml": ["lisa_n_layers", "lisa_step_interval", *FUSED],
        "llama-2/loftq.yml": ["peft"],
        "llama-2/lora.yml": [],
        "llama-2/qlora-fsdp.yml": FSDP,
        "llama-2/qlora.yml": [],
        "llama-2/relora.yml": ["relora_steps"],
        "mistral/bigstral-ds-zero3.yaml": ["unfrozen_parameters", "model_config", "deepspeed"],
        "mistral/config.yml": [],
        "mistral/lora-mps.yml": [],
        "mistral/lora.yml": [],
        "mistral/mistral-dpo-qlora.yml": DPO,
        "mistral/mistral-qlora-fsdp.yml": ["model_config", *FSDP],
        "mistral/mistral-qlora-orpo.yml": ["rl", "orpo_alpha", "datasets[0].type"],
        "mistral/mixtral-8x22b-qlora-fsdp.yml": ["model_config", *FSDP],
        "mistral/mixtral-qlora-fsdp.yml": ["model_config", *FSDP],
        "mistral/mixtral.yml": ["model_config", "deepspeed"],
        "mistral/mixtral_22.yml": ["unfrozen_parameters", "model_config", "deepspeed"],
        "mistral/qlora.yml": [],
    },
    "0.19.0": {
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
        "mistral/dpo/mistral-dpo-qlora.yml": DPO,
        "mistral/lora.yml": [],
        "mistral/mistral-qlora-fsdp.yml": ["model_config", *FSDP],
        "mistral/mixtral/mixtral-8x22b-qlora-fsdp.yml": ["model_config", *FSDP],
        "mistral/mixtral/mixtral-qlora-fsdp.yml": ["model_config", *FSDP],
        "mistral/mixtral/mixtral.yml": ["model_config", "deepspeed"],
        "mistral/mixtral/mixtral_22.yml": ["unfrozen_parameters", "model_config", "deepspeed"],
        "mistral/mps/lora-mps.yml": [],
        "mistral/orpo/mistral-qlora-orpo.yml": ["rl", "orpo_alpha", "datasets[0].type"],
        "mistral/qlora.yml": [],
    },
}  # fmt: skip
TAKEN = [(version, name) for version, table in EXAMPLES.items() for name, refused in table.items() if not refused]
REFUSED = [(version, name) for version, table in EXAMPLES.items() for name, refused in table.items() if refused]

ARCHIVES = {version: Path(__file__).parents[2] / ".axolotl" / f"axolotl-{version}.tar.gz" for version in EXAMPLES}
for archive in ARCHIVES.values():
    if not archive.exists():
        pytest.skip(f"needs {archive}, which .ci/run fetches", allow_module_level=True)


@pytest.fixture(scope="module")
def examples() -> dict[str, dict[str, str]]:
    """The text of every example, by the version and its path below examples/."""
    return {version: _texts(archive) for version, archive in ARCHIVES.items()}


def _texts(path: Path) -> dict[str, str]:
    with tarfile.open(path) as archive:
        names = {name.partition("/examples/")[2]: name for name in archive.getnames()}
        wanted = [name for name in names if name.startswith(("llama-2/", "mistral/")) and name.endswith(("ml", "yaml"))]
        return {name: archive.extractfile(names[name]).read().decode() for name in wanted}


@pytest.mark.parametrize("version", EXAMPLES)
def test_none_is_left_out(version, examples):
    assert sorted(examples[version]) == sorted(EXAMPLES[version])


def test_every_key_of_2024_is_known(tmp_path):
    """Each key of 0.6.0's configuration, alone beside a plain run, is taken or refused for what it is."""
    with tarfile.open(ARCHIVES["0.6.0"]) as archive:
        source = archive.extractfile("axolotl-0.6.0/src/axolotl/utils/config/models/input/v0_4_1/__init__.py").read()
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}

    def keys_of(name):
        if name not in classes:
            return set()
        own = {node.target.id for node in classes[name].body if isinstance(node, ast.AnnAssign)}
        return own.union(*(keys_of(base.id) for base in classes[name].bases if isinstance(base, ast.Name)))

    keys = keys_of("AxolotlInputConfig")
    assert {"deepspeed", "gptq", "lisa_n_layers", "relora_steps", "peft", "rl", "s2_attention"} < keys
    plain = dict(
        base_model="NousResearch/Llama-2-7b-hf", datasets=[dict(path="tatsu-lab/alpaca", type="alpaca")],
        micro_batch_size=1, gradient_accumulation_steps=1, num_epochs=1, learning_rate=1e-4, output_dir="out",
    )  # fmt: skip
    path = tmp_path / "run.yml"
    unknown = []
    for key in sorted(keys):
        path.write_text(yaml.safe_dump({key: True} | plain), encoding="utf-8")
        try:
            load_config(path)
        except ConfigError as error:
            unknown += [line for line in error.errors if "unknown key" in line]
    assert not unknown


@pytest.mark.parametrize("version, name", REFUSED)
def test_refused_by_name(version, name, examples, tmp_path):
    path = tmp_path / "run.yml"
    path.write_text(examples[version][name], encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    refused = [error.removeprefix(f"{path}:").split(": ")[1] for error in caught.value.errors]
    assert refused == EXAMPLES[version][name]
    assert not [error for error in caught.value.errors if "unknown key" in error]  # it would name the key too


@pytest.mark.parametrize("version, name", TAKEN)
def test_means_the_same(version, name, examples, tmp_path):
    """Every key that Axolotl's validation leaves in, and that we have too, has the value that we give it.

    It is 0.19's validation for either version's examples: it takes those of 0.6.0 too.
    """
    text, path = examples[version][name], tmp_path / "run.yml"
    path.write_text(text, encoding="utf-8")
    written = yaml.safe_load(text)
    ours, theirs = load_config(path).to_dict(), validate_config(DictDefault(written))
    theirs["model_type"] = theirs.type_of_model  # its own name for it
    if ours["attn_implementation"] == "axo_fa":
        ours["attn_implementation"] = "flash_attention_2"
    elsewhere = {"datasets", "streaming_multipack_buffer_size"}  # compared below; a default, of a run that streams
    compared = {key for key, value in theirs.items() if key in ours and value is not None} - elsewhere
    given = {key for key, value in written.items() if key in ours and value is not None} - elsewhere
    assert given | {"attn_implementation"} <= compared  # an example may write its attention by another key
    assert {"sequence_len", "sample_packing", "micro_batch_size", "optimizer", "learning_rate"} <= given
    different = {key: (ours[key], theirs[key]) for key in compared if not _same(ours[key], theirs[key])}
    assert not different
    for mine, other in zip(ours["datasets"], theirs.datasets, strict=True):
        mine["message_property_mappings"] = {"role": "role", "content": "content"} | mine["message_property_mappings"]
        assert not {key: (mine[key], other[key]) for key in other if key in mine and mine[key] != other[key]}


def _same(ours, theirs) -> bool:
    if isinstance(ours, float):
        return float(theirs) == ours  # Axolotl leaves a learning rate of "5e-5" a text
    return ours == theirs or (not ours and not theirs)
