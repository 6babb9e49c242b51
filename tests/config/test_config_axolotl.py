"""Axolotl's keys that are not served, and whole files as Axolotl's users have them."""

import dataclasses

import pytest
import yaml

from axo_flash.config import Config, DatasetConfig
from axo_flash.config.load import ATTENTION_SWITCHES
from axo_flash.config.unsupported import ALWAYS, DATASET_UNSUPPORTED, RENAMED, TUNES, TUNING, UNSUPPORTED

SMALL = """\
base_model: model
datasets:
  - path: data.jsonl
    type: alpaca
learning_rate: 1e-4
"""


# ------------------------------------------------------------------------------------------------ the tables of Axolotl
ON = [True, 3, "something", ["x"], {"enabled": True}]
OFF = [None, False, 0, "", [], {}, {"enabled": False, "more": None}]


def refusals(errors: list[str], keys: dict[str, str], place: str = "") -> None:
    """Every key is refused once, in the order of the file, by its name and with its reason."""
    assert len(errors) == len(keys)
    for error, (key, reason) in zip(errors, keys.items(), strict=True):
        assert f": {place}{key}: got " in error and f": {reason}; remove it" in error
        assert len(reason.split()) >= 4, "a reason, not a word"


@pytest.mark.parametrize("off", OFF, ids=repr)
def test_unsupported_keys_are_accepted_off(load, off):
    assert load(SMALL + yaml.safe_dump(dict.fromkeys(UNSUPPORTED, off), sort_keys=False)) == load(SMALL)


@pytest.mark.parametrize("on", ON, ids=repr)
def test_unsupported_keys_are_refused_on(problems, on):
    refusals(problems(SMALL + yaml.safe_dump(dict.fromkeys(UNSUPPORTED, on), sort_keys=False)), UNSUPPORTED)


def in_dataset(value) -> str:
    entry = {"path": "data.jsonl", "type": "alpaca"} | dict.fromkeys(DATASET_UNSUPPORTED, value)
    return yaml.safe_dump({"base_model": "m", "learning_rate": 1, "datasets": [entry]}, sort_keys=False)


@pytest.mark.parametrize("off", OFF, ids=repr)
def test_unsupported_keys_of_a_dataset_are_accepted_off(load, off):
    assert load(in_dataset(off)).datasets == load(SMALL).datasets


@pytest.mark.parametrize("on", ON, ids=repr)
def test_unsupported_keys_of_a_dataset_are_refused_on(problems, on):
    refusals(problems(in_dataset(on)), DATASET_UNSUPPORTED, "datasets[0].")


def test_tuning_of_features_that_are_off_is_accepted(load, problems):
    tuning = yaml.safe_dump(dict.fromkeys(TUNING, 128))
    assert load(SMALL + tuning) == load(SMALL)
    features = {feature: UNSUPPORTED[feature] for feature in TUNES}
    refusals(problems(SMALL + tuning + yaml.safe_dump(dict.fromkeys(TUNES, True), sort_keys=False)), features)


@pytest.mark.parametrize("key", sorted(ALWAYS))
def test_what_is_always_so_may_be_said(load, problems, key):
    accepted, reason = ALWAYS[key]
    for value in (None, *accepted):
        assert load(SMALL + yaml.safe_dump({key: value})) == load(SMALL)
    other = [value for value in (True, False, 1, 3, "something") if not any(value is one for one in accepted)]
    assert len(other) >= 3
    for value in other:
        refusals(problems(SMALL + yaml.safe_dump({key: value})), {key: reason})


def test_tables_do_not_overlap():
    fields = {field.name for field in dataclasses.fields(Config)}
    tables = [fields, set(UNSUPPORTED), set(TUNING), set(ALWAYS), set(RENAMED), set(ATTENTION_SWITCHES)]
    assert len(set().union(*tables)) == sum(map(len, tables)) > 400
    assert set(TUNES) <= set(UNSUPPORTED) and set(RENAMED.values()) <= fields
    assert not {field.name for field in dataclasses.fields(DatasetConfig)} & set(DATASET_UNSUPPORTED)


# --------------------------------------------------------------------------------------------- Axolotl users' own files
LLAMA_2024 = """\
is_llama_derived_model: true
load_in_8bit: true
load_in_4bit: false
strict: false
dataset_prepared_path:
val_set_size: 0.05
sequence_len: 4096
sample_packing: true
pad_to_sequence_len: true
adapter: lora
lora_model_dir:
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
lora_fan_in_fan_out:
wandb_project:
wandb_entity:
wandb_watch:
wandb_name:
wandb_log_model:
gradient_accumulation_steps: 4
micro_batch_size: 2
optimizer: adamw_bnb_8bit
train_on_inputs: false
group_by_length: false
bf16: auto
fp16: false
tf32: false
gradient_checkpointing: true
early_stopping_patience:
resume_from_checkpoint:
local_rank:
logging_steps: 1
xformers_attention:
flash_attention: true
loss_watchdog_threshold: 5.0
loss_watchdog_patience: 3
warmup_steps: 10
evals_per_epoch: 4
eval_table_size:
eval_table_max_new_tokens: 128
eval_max_new_tokens: 128
saves_per_epoch: 1
debug:
deepspeed:
fsdp:
fsdp_config:
special_tokens:
  bos_token: "<s>"
"""
MISTRAL_019 = """\
model_type: MistralForCausalLM
tokenizer_type: LlamaTokenizer
load_in_8bit: false
load_in_4bit: true
val_set_size: 0.1
adapter: qlora
lora_model_dir:
sequence_len: 8192
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
lora_target_modules: [gate_proj, down_proj, up_proj, q_proj, v_proj, k_proj, o_proj]
wandb_project:
num_epochs: 1
optimizer: adamw_bnb_8bit
bf16: auto
tf32: false
gradient_checkpointing: true
resume_from_checkpoint:
attn_implementation: flash_attention_2
warmup_ratio: 0.1
evals_per_epoch: 4
saves_per_epoch: 1
special_tokens:
"""


@pytest.mark.parametrize(
    ("extra", "refused"),
    [
        ("", []),
        ("deepspeed: zero2.json\n", ["deepspeed"]),
        ("fsdp: [full_shard, auto_wrap]\nfsdp_config:\n  fsdp_offload_params: true\n", ["fsdp", "fsdp_config"]),
        ("flash_attn_rms_norm: true\nflash_attn_fuse_mlp: true\n", ["flash_attn_rms_norm", "flash_attn_fuse_mlp"]),
        ("gptq: true\ngptq_disable_exllama: true\nadam_eps: 1e-5\n", ["gptq", "gptq_disable_exllama", "adam_eps"]),
        (
            "lisa_n_layers: 4\nlisa_step_interval: 20\nlisa_layers_attribute: model.layers\n",
            ["lisa_n_layers", "lisa_step_interval"],
        ),
        ("relora: true\njagged_restart_steps: 150\n", ["relora", "jagged_restart_steps"]),
        ("relora_steps: 150\nrelora_warmup_steps: 10\nrelora_cpu_offload: false\n", ["relora_steps"]),  # of 2024
        ("peft:\n  loftq_config:\n    loftq_bits: 4\n", ["peft"]),
        ("rl: orpo\norpo_alpha: 0.1\n", ["rl", "orpo_alpha"]),
        ("model_config:\n  output_router_logits: true\n", ["model_config"]),
        ("unfrozen_parameters:\n", []),
    ],
)
@pytest.mark.parametrize("base", [LLAMA_2024, MISTRAL_019], ids=["llama-2024", "mistral-0.19"])
def test_axolotl_files_load_or_name_exactly_what_is_not_served(load, problems, base, extra, refused):
    text = SMALL + base.replace("deepspeed:\nfsdp:\nfsdp_config:\n", "") + extra
    if not refused:
        assert load(text).sample_packing
        return
    assert [error.split(": ")[1] for error in problems(text)] == refused
