"""The YAML as a user writes it, right and wrong: what comes out, and what each error says."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import axo_flash
from axo_flash.config import Config, ConfigError, DatasetConfig, key_docs, load_config, values
from axo_flash.config.checks import nearest
from axo_flash.data import files, formats, templates
from axo_flash.kernels import backends

SMALL = """\
base_model: model
datasets:
  - path: data.jsonl
    type: alpaca
learning_rate: 1e-4
"""
SMALL_LINES = SMALL.count("\n")


# ------------------------------------------------------------------------------------------------------- what comes out
def test_small_file_gets_axolotls_defaults(load):
    config = load(SMALL)
    assert (config.base_model, config.learning_rate, config.datasets[0].path) == ("model", 1e-4, "data.jsonl")
    assert (config.output_dir, config.seed, config.save_total_limit, config.sequence_len) == ("./model-out", 42, 4, 512)
    assert (config.micro_batch_size, config.gradient_accumulation_steps, config.num_epochs) == (1, 1, 1.0)
    assert (config.optimizer, config.lr_scheduler, config.bf16, config.tf32) == (
        "adamw_torch_fused", "cosine", "auto", "auto",
    )  # fmt: skip
    assert (config.val_set_size, config.adapter, config.train_on_inputs, config.trust_remote_code) == (
        0,
        None,
        False,
        False,
    )
    assert (config.attn_implementation, config.attention_backend) == ("axo_fa", "auto")


@pytest.mark.parametrize("written", ["5e-5", "'5e-5'", "5.0e-5", "0.00005", "'0.00005'"])
def test_learning_rate_in_any_spelling_is_a_float(load, written):
    config = load(SMALL, f"learning_rate={written}")
    assert config.learning_rate == 5e-5 and isinstance(config.learning_rate, float)


@pytest.mark.parametrize(
    ("written", "size"),
    [("0", 0), ("0.0", 0), ("0.05", 0.05), ("24", 24), ("24.0", 24), ("'0.1'", 0.1), ("1", 1), ("", 0), ("null", 0)],
)
def test_val_set_size_is_nothing_a_fraction_or_a_count(load, written, size):
    config = load(SMALL, f"val_set_size={written}")
    assert config.val_set_size == size and isinstance(config.val_set_size, type(size))


@pytest.mark.parametrize(
    ("lines", "evaluation", "padding"),
    [
        ("", False, False),
        ("sample_packing: true", True, True),
        ("sample_packing: true\neval_sample_packing: false", False, True),
        ("sample_packing: true\npad_to_sequence_len: false", True, False),
        ("pad_to_sequence_len: true", False, True),
        ("sample_packing: true\neval_sample_packing:\npad_to_sequence_len:", True, True),
    ],
)
def test_packing_sets_what_depends_on_it(load, lines, evaluation, padding):
    config = load(SMALL + lines)
    assert (config.eval_sample_packing, config.pad_to_sequence_len) == (evaluation, padding)
    assert config.sample_packing == ("sample_packing" in lines)


@pytest.mark.parametrize(
    ("lines", "attention"),
    [
        ("", "axo_fa"),
        ("flash_attention: true", "axo_fa"),
        ("flash_attention:", "axo_fa"),
        ("flash_attention: false", "sdpa"),
        ("flash_attention: false\nsdp_attention: true", "sdpa"),
        ("flash_attention: false\neager_attention: true", "eager"),
        ("flash_attention: false\nattn_implementation: flash_attention_2", "axo_fa"),
        ("attn_implementation: flash_attention_2", "axo_fa"),
        ("attn_implementation: axo_fa", "axo_fa"),
        ("attn_implementation: sdpa", "sdpa"),
        ("attn_implementation: eager", "eager"),
        ("sdp_attention: true", "sdpa"),
        ("eager_attention: true", "eager"),
        ("xformers_attention: false\nflash_attention: true", "axo_fa"),
    ],
)
def test_attention_by_any_of_axolotls_names(load, lines, attention):
    assert load(SMALL + lines).attn_implementation == attention


@pytest.mark.parametrize(
    ("lines", "bf16", "fp16"),
    [
        ("bf16: auto", "auto", False),
        ("bf16: true", True, False),
        ("bf16: false", False, False),
        ("bf16: auto\nfp16: false", "auto", False),
        ("bf16: auto\nfp16: true", False, True),
        ("fp16: true", False, True),
        ("bf16:\nfp16:", "auto", False),
    ],
)
def test_precision(load, lines, bf16, fp16):
    config = load(SMALL + lines)
    assert (config.bf16, config.fp16) == (bf16, fp16)


def test_paths_are_expanded_not_resolved(load, monkeypatch):
    monkeypatch.setenv("DATA", "/mnt/data")
    monkeypatch.setenv("HOME", "/home/someone")
    config = load(
        SMALL,
        "datasets.0.path=$DATA/a/../b.jsonl",
        "output_dir=~/out",
        "base_model=org/name",
        "datasets.0.data_files='${DATA}/*'",
    )
    assert config.datasets[0].path == "/mnt/data/a/../b.jsonl"
    assert (config.output_dir, config.base_model, config.datasets[0].data_files) == (
        "/home/someone/out",
        "org/name",
        ["/mnt/data/*"],
    )


def test_null_is_absent_for_every_key(load):
    names = [field.name for field in dataclasses.fields(Config) if field.name not in yaml.safe_load(SMALL)]
    assert load(SMALL + "".join(f"{name}:\n" for name in names)) == load(SMALL)


def test_null_is_absent_for_every_key_of_a_dataset(load):
    names = [field.name for field in dataclasses.fields(DatasetConfig) if field.name not in ("path", "type")]
    text = SMALL.replace("    type: alpaca\n", "    type: alpaca\n" + "".join(f"    {name}:\n" for name in names))
    assert load(text) == load(SMALL)


@pytest.mark.parametrize(
    "name",
    [
        "max_steps",
        "eval_steps",
        "evals_per_epoch",
        "save_steps",
        "early_stopping_patience",
        "lora_model_dir",
        "resume_from_checkpoint",
    ],
)
@pytest.mark.parametrize("off", ["0", "false", "''"])
def test_off_is_absent_where_a_key_may_be_absent(load, name, off):
    assert getattr(load(SMALL, f"{name}={off}"), name) is None


def test_bare_no_of_yaml_is_the_word_no(load):
    config = load(SMALL + "save_strategy: no\neval_strategy: 'no'\nval_set_size: 5\n")
    assert config.save_schedule() == config.eval_schedule() == ("no", None)


def test_legacy_message_fields_become_mappings(load):
    text = SMALL.replace("alpaca", "chat_template\n    message_field_role: from\n    message_field_content: value")
    assert load(text).datasets[0].message_property_mappings == {"role": "from", "content": "value"}
    assert load(text).datasets[0].message_field_role is None


def test_template_text_implies_jinja(load):
    assert load(SMALL + "chat_template_jinja: '{{ messages }}'").chat_template == "jinja"
    in_dataset = SMALL.replace("alpaca", "chat_template\n    chat_template_jinja: '{{ messages }}'")
    assert load(in_dataset).datasets[0].chat_template == "jinja"


def test_own_format_and_renamed_keys(load):
    text = SMALL.replace("type: alpaca", "type:\n      field_instruction: q\n      system_prompt: ''\n      format:")
    config = load(text + "dataset_processes: 3\ntype_of_model: MistralForCausalLM\n")
    assert config.datasets[0].type == {"field_instruction": "q", "system_prompt": ""}
    assert (config.dataset_num_proc, config.model_type) == (3, "MistralForCausalLM")


def test_anchors_and_merge_keys_work(load):
    config = load(
        SMALL.replace(
            "  - path: data.jsonl\n    type: alpaca\n",
            "  - &c {path: a.jsonl, type: alpaca}\n  - {<<: *c, path: b.jsonl}\n",
        )
    )
    assert [(d.path, d.type) for d in config.datasets] == [("a.jsonl", "alpaca"), ("b.jsonl", "alpaca")]


def test_to_dict_is_plain_and_complete(load):
    config = load(SMALL + "special_tokens: {pad_token: <pad>}\nlora_target_modules: [q_proj]\n")
    plain = json.loads(json.dumps(config.to_dict()))
    assert set(plain) == {field.name for field in dataclasses.fields(Config)}
    assert plain["datasets"] == [dataclasses.asdict(config.datasets[0])]
    assert Config(**(plain | {"datasets": [DatasetConfig(**plain["datasets"][0])]})) == config


# ------------------------------------------------------------------------------------------------------------ schedules
@pytest.mark.parametrize(
    ("lines", "schedule"),
    [
        ("", ("epoch", None)),
        ("saves_per_epoch: 4", ("steps", 0.25)),
        ("saves_per_epoch: 1\nnum_epochs: 4", ("steps", 0.25)),
        ("saves_per_epoch: 1", ("epoch", None)),
        ("saves_per_epoch: 1\nnum_epochs: 0.5", ("epoch", None)),
        ("save_steps: 50", ("steps", 50)),
        ("save_steps: 0.1", ("steps", 0.1)),
        ("save_steps: 50\nsave_strategy: steps", ("steps", 50)),
        ("save_strategy: 'no'", ("no", None)),
        ("saves_per_epoch: 2\nmax_steps: 30", ("steps", 0.5)),
    ],
)
def test_when_to_save_and_evaluate(load, lines, schedule):
    assert load(SMALL + lines).save_schedule() == schedule
    evaluation = load(SMALL + "val_set_size: 9\n" + lines.replace("save", "eval"))
    assert evaluation.eval_schedule() == schedule


def test_nothing_to_evaluate_on(load):
    assert load(SMALL + "evals_per_epoch: 4\nval_set_size: 0.0").eval_schedule() == ("no", None)


@pytest.mark.parametrize(
    ("line", "steps"),
    [("", 30), ("warmup_steps: 0", 0), ("warmup_steps: 7", 7), ("warmup_ratio: 0.1", 100), ("warmup_ratio: 0", 0)],
)
def test_warmup(load, line, steps):
    assert load(SMALL + line).warmup_for(1000) == steps


def test_warmup_and_logging_defaults_are_axolotls(load):
    config = load(SMALL)
    assert [config.warmup_for(n) for n in (10, 100, 10_000)] == [0, 3, 100]
    assert [config.logging_interval(n) for n in (10, 1000, 10_000)] == [1, 5, 10]
    assert load(SMALL + "logging_steps: 3").logging_interval(10_000) == 3


def test_wandb_is_its_environment(load):
    assert load(SMALL + "wandb_project:\nwandb_watch: false\n").wandb_environment() is None
    assert load(SMALL + "wandb_project: p\nwandb_name: n\nwandb_mode: offline").wandb_environment() == {
        "WANDB_PROJECT": "p", "WANDB_NAME": "n", "WANDB_MODE": "offline",
    }  # fmt: skip
    assert load(SMALL + "wandb_project: p\nuse_wandb: false").wandb_environment() is None
    assert load(SMALL + "wandb_project: p\nwandb_mode: disabled").wandb_environment() is None
    assert load(SMALL + "use_wandb: true").wandb_environment() == {}


# ----------------------------------------------------------------------------------------------- one wrong value a line
WRONG = [  # the line, and what the message says after `run.yml:6: `
    ("micro_batch_size: 0", "micro_batch_size: got 0, expected a whole number, 1 or more"),
    ("micro_batch_size: 1.5", "micro_batch_size: got 1.5, expected a whole number, 1 or more"),
    ("micro_batch_size: two", "micro_batch_size: got 'two', expected a whole number, 1 or more"),
    ("micro_batch_size: true", "micro_batch_size: got true, expected a whole number, 1 or more"),
    ("micro_batch_size: [1]", "micro_batch_size: got [1], expected a whole number, 1 or more"),
    ("num_epochs: -1", "num_epochs: got -1, expected a number above 0"),
    ("num_epochs: .nan", "num_epochs: got nan, expected a number above 0"),
    ("weight_decay: .inf", "weight_decay: got inf, expected a number, 0 or more"),
    ("lora_dropout: 1", "lora_dropout: got 1, expected a number from 0 up to, but not including, 1"),
    ("warmup_ratio: 1.5", "warmup_ratio: got 1.5, expected a number from 0 up to, but not including, 1"),
    ("val_set_size: -3", "val_set_size: got -3, expected 0, a whole number, 1 or more, or a fraction below 1"),
    (
        "val_set_size: 1.0",
        "or a fraction below 1; 1.0 would be the whole; for one, write 1",
    ),
    ("val_set_size: 2.5", "val_set_size: got 2.5, expected 0, a whole number, 1 or more, or a fraction below 1"),
    ("save_steps: -5", "save_steps: got -5, expected a whole number, 1 or more, or a fraction below 1"),
    ("sample_packing: yes please", "sample_packing: got 'yes please', expected true or false"),
    ("sample_packing: 1", "sample_packing: got 1, expected true or false"),
    ("bf16: ture", "bf16: got 'ture', expected true, auto or false"),
    (
        "gradient_checkpointing: offload",
        "gradient_checkpointing: got 'offload', expected true or false; activations stay on the device: write true",
    ),
    (
        "optimizer: adamw_torch_fussed",
        "expected one of adamw_torch_fused, adamw_torch, ... (12 in all); did you mean 'adamw_torch_fused'?",
    ),
    ("lr_scheduler: cosin", "did you mean 'cosine'?"),
    ("excess_length_strategy: drops", "expected one of drop, truncate, raise; did you mean 'drop'?"),
    (
        "attn_implementation: flash_attention_3",
        "our kernels take its place, the fastest that the GPU has: write axo_fa",
    ),
    ("attn_implementation: flash_attention", "did you mean 'flash_attention_2'?"),
    ("flash_attention: yup", "flash_attention: got 'yup', expected true or false"),
    ("adapter: loar", "adapter: got 'loar', expected one of lora, qlora; did you mean 'lora'?"),
    ("adapter: 5", "adapter: got 5, expected one of lora, qlora"),
    ("output_dir: 7", "output_dir: got 7, expected a text; quote it"),
    ("output_dir: 2024-01-01", "expected a text; quote it"),
    (
        "output_dir: $NO_SUCH_VARIABLE/x",
        "expected a path; the environment variable NO_SUCH_VARIABLE is not set: export it",
    ),
    ("tokens: <extra>", "tokens: got '<extra>', expected a list, each entry a text; write it as [a, b]"),
    ("tokens: [<a>, 3]", "tokens[1]: got 3, expected a text; quote it"),
    (
        "lora_target_modules: '(q_proj'",
        "lora_target_modules: got '(q_proj', expected a list of layer names, or one regular expression; missing )",
    ),
    ("resume_from_checkpoint: 3", "resume_from_checkpoint: got 3, expected a text; quote it"),
    (
        "save_strategy: best",
        "save_strategy: got 'best', expected one of no, epoch, steps; no best checkpoint is kept; use epoch",
    ),
    ("special_tokens: <pad>", "special_tokens: got '<pad>', expected a mapping with bos_token, eos_token"),
    ("special_tokens: {eos: x}", "special_tokens.eos: unknown key, expected bos_token or eos_token or"),
    (
        "gradient_checkpointing_kwargs: {use_reentrant: maybe}",
        "gradient_checkpointing_kwargs.use_reentrant: got 'maybe', expected true or false",
    ),
    ("chat_template: chatm", "did you mean 'chatml'?"),
    ("model_type: LlamaForCausaLM", "did you mean 'LlamaForCausalLM'?"),
    (
        "plugins: [axolotl.integrations.liger.LigerPlugin]",
        "plugins[0]: got 'axolotl.integrations.liger.LigerPlugin', expected a plugin of this package",
    ),
    ("attention_backend: cuda", "attention_backend: got 'cuda', expected one of auto, hopper, triton, reference"),
    (
        "save_safetensors: false",
        "save_safetensors: got false, expected true or nothing: weights are always saved as safetensors; remove it",
    ),
    ("7: x", "7: got the key 7, expected text; quote the key"),
]


@pytest.mark.parametrize(("line", "message"), WRONG, ids=[line for line, _ in WRONG])
def test_wrong_value_names_line_key_value_and_remedy(problems, line, message):
    (error,) = problems(SMALL + line)
    assert error.startswith(f"run.yml:{SMALL_LINES + 1}: ") and message in error


WRONG_IN_DATASET = [
    ("type: alpacca", "datasets[0].type: got 'alpacca', expected one of alpaca,"),
    ("type: sharegpt", "write type: chat_template, field_messages: conversations"),
    ("type: {field_instruction: 3}", "datasets[0].type.field_instruction: got 3, expected a text; quote it"),
    ("type: {field_instructions: q}", "datasets[0].type.field_instructions: unknown key, expected"),
    ("ds_type: jsn", "did you mean 'json'?"),
    ("shards: 0.5", "datasets[0].shards: got 0.5, expected a whole number, 1 or more"),
    ("shards_idx: 2", "datasets[0].shards_idx: got 2, expected shards to be set too"),
    ("shards: 2\n    shards_idx: 2", "datasets[0].shards_idx: got 2, expected less than shards, which is 2"),
    ("field: body", "datasets[0].field: acts with type: completion alone, but the type is null; remove it"),
    ("type: alpaca\n    roles_to_train: [a]", "acts with type: chat_template alone, but the type is alpaca; remove it"),
    (
        "type: chat_template\n    train_on_eos: always",
        "datasets[0].train_on_eos: got 'always', expected one of turn, all, last, none",
    ),
    (
        "type: chat_template\n    roles: {user: human}",
        "datasets[0].roles.user: got 'human', expected a list, each entry a text",
    ),
    ("type: chat_template\n    chat_template: jinja", "in chat_template_jinja"),
    (
        "type: chat_template\n    chat_template: chatml\n    chat_template_jinja: x",
        "is read with chat_template: jinja alone",
    ),
    (
        "type: chat_template\n    message_field_role: from\n    message_property_mappings: {role: speaker}",
        "got 'from', but message_property_mappings.role is 'speaker'; keep the latter",
    ),
    (
        "sequence_len: 512",
        "datasets[0].sequence_len: unknown key here; it belongs at the top of the file, not in a dataset",
    ),
    ("field_mesages: turns", "datasets[0].field_mesages: unknown key; did you mean 'field_messages'?"),
]


@pytest.mark.parametrize(("lines", "message"), WRONG_IN_DATASET, ids=[lines for lines, _ in WRONG_IN_DATASET])
def test_wrong_value_in_a_dataset(problems, lines, message):
    (error,) = problems(SMALL.replace("    type: alpaca\n", f"    {lines}\n"))
    assert error.startswith("run.yml:") and message in error
    line = int(error.split(":")[1])
    assert 4 <= line <= 6, "the line of the key itself"


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        ("datasets: []", "datasets: got [], expected a list of datasets"),
        ("datasets: data.jsonl", "datasets: got 'data.jsonl', expected a list of datasets; write '- path: ...'"),
        ("datasets: {path: data.jsonl}", "datasets: got {'path': 'data.jsonl'}, expected a list of datasets"),
        ("datasets: [data.jsonl]", "datasets[0]: got 'data.jsonl', expected a mapping; write '- path: ...'"),
        ("datasets: [{type: alpaca}]", "datasets[0].path: missing; expected a path: a file, a directory or a glob"),
        ("datasets:", "datasets: missing; expected a list of datasets"),
    ],
)
def test_datasets_must_be_datasets(problems, datasets, message):
    (error,) = problems(f"base_model: m\nlearning_rate: 1\n{datasets}\n")
    assert error.startswith("run.yml:3: ") and message in error


# ----------------------------------------------------------------------------------------------------- between the keys
BETWEEN = [
    ("warmup_steps: 10\nwarmup_ratio: 0.1", "warmup_ratio: excludes warmup_steps"),
    ("evals_per_epoch: 4\neval_steps: 10\nval_set_size: 9", "evals_per_epoch: excludes eval_steps"),
    ("saves_per_epoch: 4\nsave_steps: 10", "saves_per_epoch: excludes save_steps"),
    ("save_steps: 10\nsave_strategy: epoch", "save_strategy: got 'epoch', which excludes save_steps"),
    ("saves_per_epoch: 2\nsave_strategy: no", "save_strategy: got 'no', which excludes saves_per_epoch"),
    ("save_strategy: steps", "save_strategy: got 'steps'; say how many with save_steps or saves_per_epoch"),
    ("eval_steps: 10", "eval_steps: there are no rows to evaluate on; set val_set_size"),
    ("eval_strategy: epoch\nval_set_size: 0", "eval_strategy: there are no rows to evaluate on"),
    (
        "early_stopping_patience: 3",
        "early_stopping_patience: watches the evaluation loss, but nothing is evaluated; set val_set_size",
    ),
    (
        "early_stopping_patience: 3\nval_set_size: 9\neval_strategy: no",
        "nothing is evaluated; remove eval_strategy: no",
    ),
    (
        "adapter: qlora\nlora_r: 8\nlora_alpha: 8\nlora_target_linear: true",
        "adapter: qlora trains an adapter on 4 bit weights; set load_in_4bit: true",
    ),
    (
        "adapter: qlora\nload_in_8bit: true\nlora_r: 8\nlora_alpha: 8\nlora_target_linear: true",
        "set load_in_4bit: true, and remove load_in_8bit",
    ),
    (
        "adapter: lora\nload_in_4bit: true\nlora_r: 8\nlora_alpha: 8\nlora_target_linear: true",
        "lora on 4 bit weights is qlora; set adapter: qlora",
    ),
    ("load_in_4bit: true\nload_in_8bit: true", "load_in_8bit: excludes load_in_4bit"),
    ("load_in_8bit: true", "load_in_8bit: weights in 8 bit cannot be trained; set adapter: lora or qlora"),
    ("lora_model_dir: x", "lora_model_dir: is a saved adapter, but adapter is null"),
    (
        "adapter: lora\nlora_r: 8\nlora_target_linear: true",
        "lora_alpha: missing, and adapter: lora needs it; set for example lora_alpha: 32",
    ),
    ("adapter: lora\nlora_r: 8\nlora_alpha: 8", "adapter: no layer to adapt; set lora_target_linear: true"),
    ("bf16: true\nfp16: true", "fp16: excludes bf16, which is true too"),
    ("sample_packing: true\ngroup_by_length: true", "group_by_length: excludes sample_packing"),
    ("streaming: true", "streaming: needs max_steps, as the number of rows is not known before they are read"),
    ("streaming: true\nmax_steps: 9\nval_set_size: 9", "val_set_size: rows cannot be held out of a stream"),
    ("streaming: true\nmax_steps: 9\ngroup_by_length: true", "group_by_length: a stream has no lengths to sort by"),
    ("streaming: true\nmax_steps: 9\ndemo: true", "streaming: the demo's mount is gone when training begins"),
    ("streaming: true\nmax_steps: 9\nsaves_per_epoch: 2", "saves_per_epoch: the length of an epoch is not known"),
    ("streaming: true\nmax_steps: 9\nsave_strategy: epoch", "save_strategy: the length of an epoch is not known"),
    ("streaming: true\nmax_steps: 9\nevals_per_epoch: 2", "evals_per_epoch: the length of an epoch is not known"),
    ("test_datasets: [{path: x, type: alpaca}]", "test_datasets: acts with streaming: true alone; hold rows out"),
    ("test_datasets: [{path: x, tpye: alpaca}]", "test_datasets[0].tpye: unknown key; did you mean 'type'?"),
    ("streaming: true\nmax_steps: 9\ntest_datasets: x", "test_datasets: got 'x', expected a list of datasets"),
    ("streaming_prefetch_shards: 2", "streaming_prefetch_shards: acts with streaming: true alone"),
    (
        "streaming_multipack_buffer_size: 9\nsample_packing: true",
        "streaming_multipack_buffer_size: acts with streaming: true alone; set it, or remove this",
    ),
    (
        "streaming: true\nmax_steps: 9\nstreaming_multipack_buffer_size: 9",
        "streaming_multipack_buffer_size: acts with sample_packing: true alone",
    ),
    ("data_timeout: 60", "stall_timeout: got 330, expected less than data_timeout, which is 60"),
    (
        "attn_implementation: sdpa\nattention_backend: triton",
        "attention_backend: got 'triton', which is a kernel of axo_fa, but the attention is sdpa",
    ),
    (
        "attn_implementation: sdpa\nflash_attention: true",
        "flash_attention: excludes attn_implementation, which is 'sdpa'",
    ),
    ("flash_attention: true\nsdp_attention: true", "sdp_attention: excludes flash_attention, which is true too"),
    ("chat_template: jinja", "chat_template: got 'jinja'; give the template"),
    (
        "chat_template: chatml\nchat_template_jinja: x",
        "chat_template_jinja: is read with chat_template: jinja alone, not chatml",
    ),
    (
        "dataset_processes: 2\ndataset_num_proc: 3",
        "dataset_processes: is another name of dataset_num_proc, which is set too",
    ),
]


@pytest.mark.parametrize(("lines", "message"), BETWEEN, ids=[lines.replace("\n", " ") for lines, _ in BETWEEN])
def test_rules_between_keys(problems, lines, message):
    (error,) = problems(SMALL + lines)
    assert message in error and error.startswith("run.yml")


def test_rows_to_evaluate_a_stream_on(load):
    lines = "streaming: true\nmax_steps: 9\neval_steps: 3\ntest_datasets: [{path: x, type: completion, field: y}]\n"
    config = load(SMALL + lines, "test_datasets.0.field=z")
    assert [(entry.path, entry.field) for entry in config.test_datasets] == [("x", "z")]
    assert config.eval_schedule() == ("steps", 3) and load(SMALL + "test_datasets: []").test_datasets is None


@pytest.mark.parametrize("line", ["shards: 4", "split: train[:100]"])
def test_a_stream_reads_whole_files(problems, load, line):
    streamed = (
        SMALL.replace("    type: alpaca\n", f"    type: alpaca\n    {line}\n") + "streaming: true\nmax_steps: 9\n"
    )
    (error,) = problems(streamed)
    assert f"datasets: entry 0: {line.split(':')[0]} chooses among all rows of a dataset" in error
    assert load(streamed.replace(line, "split: train")).streaming
    assert not load(streamed, "streaming=false").streaming


@pytest.mark.parametrize(
    "lines",
    [
        "adapter:\nlora_r: 32\nlora_alpha: 16\nlora_target_linear: true",
        "adapter: lora\nlora_model_dir: saved",
        "adapter: lora\nload_in_8bit: true\nlora_r: 8\nlora_alpha: 8\nlora_target_modules: [q_proj]",
        "adapter: qlora\nload_in_4bit: true\nlora_r: 8\nlora_alpha: 8\nlora_target_modules: '.*q_proj'",
        "warmup_steps: 0\nwarmup_ratio: 0.1",
        "max_steps: 10\nnum_epochs: 3",
        "eval_steps: 10\nval_set_size: 0.1\neval_strategy: steps",
        "plugins: [axo_flash.integrations.axolotl.AxoFlashPlugin]",
        "attn_implementation: axo_fa\nattention_backend: reference",
    ],
)
def test_what_axolotl_allows_is_allowed(load, lines):
    load(SMALL + lines)


# --------------------------------------------------------------------------------------------------------- unknown keys
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("lerning_rates: 1", "lerning_rates: unknown key; did you mean 'learning_rate'?"),
        ("Sample_Packing: true", "Sample_Packing: unknown key; did you mean 'sample_packing'?"),
        ("deepsped: x", "deepsped: unknown key; did you mean 'deepspeed'?"),
        ("zzz: 1", "zzz: unknown key; it is none of Axolotl 0.19: remove it"),
        ("field_messages: x", "field_messages: unknown key here; it belongs in an entry of datasets"),
    ],
)
def test_unknown_key_names_the_nearest(problems, line, message):
    assert problems(SMALL + line) == [f"run.yml:{SMALL_LINES + 1}: {message}"]


def test_misspelt_required_key_is_one_error(problems):
    assert problems(SMALL.replace("learning_rate", "lerning_rate")) == [
        "run.yml:5: lerning_rate: unknown key; did you mean 'learning_rate'?"
    ]


def test_every_missing_key_is_named(problems):
    errors = problems("seed: 1")
    assert [error.split(":")[1].strip() for error in errors] == ["base_model", "datasets", "learning_rate"]
    assert errors[2] == "run.yml: learning_rate: missing; expected a number above 0: peak learning rate"


@pytest.mark.parametrize("schema", [Config, DatasetConfig])
def test_every_key_is_documented_in_one_line(schema):
    docs = key_docs(schema)
    for field in dataclasses.fields(schema):
        assert len(field.metadata["doc"].split()) >= 2 and field.metadata["doc"].endswith((".", "]."))
        assert field.metadata["check"].expected in docs[field.name] and "\n" not in docs[field.name]
    assert len({field.metadata["doc"] for field in dataclasses.fields(schema)}) == len(docs)


def test_every_default_passes_its_own_check(load):
    config = load(SMALL)
    for field in dataclasses.fields(Config):
        value = getattr(config, field.name)
        if value is not None and field.name != "datasets":
            assert field.metadata["check"](value) == value


# ---------------------------------------------------------------------------------------------------------- all at once
def test_all_errors_of_a_file_come_at_once_in_its_order(problems, load):
    text = """\
base_model: model
lerning_rate: 5e-5
datasets:
  - path: a.jsonl
    type: alpacca
    field_mesages: x
  - b.jsonl
deepspeed: zero3.json
special_tokens:
  eos: </s>
  pad_token: 3
warmup_steps: 10
warmup_ratio: 0.1
seed: 1
seed: 2
"""
    errors = problems(text, "micro_batch_size=0", "nonsense")
    places = [error.split(": ")[0] for error in errors]
    assert places == [
        "run.yml:15", "override 'nonsense'",
        *(f"run.yml:{line}" for line in (2, 5, 6, 7, 8, 10, 11, 13)),
        "override 'micro_batch_size=0'",
    ]  # fmt: skip
    with pytest.raises(
        ConfigError, match=r"^11 problems:\n  run.yml:15: seed: given twice, first in line 14; keep one\n"
    ):
        load(text, "micro_batch_size=0", "nonsense")


def test_one_error_stands_alone(load):
    with pytest.raises(ConfigError) as caught:
        load(SMALL, "seed=x")
    assert str(caught.value) == "override 'seed=x': seed: got 'x', expected a whole number, 0 or more"


# ------------------------------------------------------------------------------------------------------------ bad files
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "run.yml: the file is empty; it needs at least base_model, datasets and learning_rate"),
        ("# only a comment\n", "run.yml: the file is empty; it needs"),
        ("- a\n- b\n", "run.yml:1: got a list, expected a mapping of 'key: value' lines"),
        ("just words\n", "run.yml:1: got plain text, expected a mapping of 'key: value' lines"),
        (
            "a: b: c\n",
            "run.yml:1: not YAML: mapping values are not allowed here (column 5); indent with spaces, and quote",
        ),
        ("a: 1\n\tb: 2\n", "run.yml:2: not YAML: a tab character (column 1); indent with spaces"),
        ("a: [1, 2\nb: 3\n", "run.yml:"),
        ("a: 1\n---\nb: 2\n", "run.yml:2: not YAML: a second document starts here"),
        ("a: !!python/object/apply:os.system ['true']\n", "remove the '!' tag: only plain values are read"),
        ("a: *nowhere\n", "define the anchor first"),
        ("? [a, b]\n: 1\n", "run.yml:1: a key must be text, got a list or mapping"),
        ("a: \x01\n", "run.yml: not a YAML text:"),
    ],
)
def test_bad_file_is_one_clear_error(problems, text, message):
    (error,) = problems(text)
    assert message in error and "\n" not in error


def test_duplicate_keys_at_every_depth(problems):
    text = SMALL.replace("    type: alpaca\n", "    type: alpaca\n    path: other.jsonl\n") + "base_model: again\n"
    assert problems(text) == [
        "run.yml:5: datasets[0].path: given twice, first in line 3; keep one",
        "run.yml:7: base_model: given twice, first in line 1; keep one",
    ]


def test_missing_file_directory_and_binary(tmp_path):
    (tmp_path / "here.yml").write_text(SMALL)
    for path, message in ((tmp_path / "no.yml", "no such file"), (tmp_path, "is a directory")):
        with pytest.raises(ConfigError, match=message) as caught:
            load_config(path)
        assert "here.yml" in str(caught.value) and len(caught.value.errors) == 1
    (tmp_path / "binary.yml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        load_config(tmp_path / "binary.yml")


def test_byte_order_mark_and_windows_line_ends(tmp_path):
    (tmp_path / "run.yml").write_bytes(b"\xef\xbb\xbf" + SMALL.replace("\n", "\r\n").encode())
    assert load_config(tmp_path / "run.yml").base_model == "model"


@pytest.mark.parametrize("line", ["tokens: &t [*t]", "deepspeed: &d {more: {again: *d}}"])
def test_yaml_that_holds_itself(problems, line):
    assert problems(SMALL + line) == ["run.yml:6: an anchor holds its own alias; write the value out"]


# ------------------------------------------------------------------------------------------------------------ overrides
def test_overrides_win_and_are_yaml(load):
    config = load(
        SMALL,
        "learning_rate=5e-5", "datasets.0.path=b.jsonl", "special_tokens.pad_token=<pad>", "tokens=[<a>, <b>]",
        "output_dir=a=b", "seed = 3", "sample_packing=true", "num_epochs=", "learning_rate=6e-5",
    )  # fmt: skip
    assert (config.learning_rate, config.datasets[0].path, config.datasets[0].type) == (6e-5, "b.jsonl", "alpaca")
    assert (config.special_tokens, config.tokens) == ({"pad_token": "<pad>"}, ["<a>", "<b>"])
    assert (config.output_dir, config.seed, config.sample_packing, config.num_epochs) == ("a=b", 3, True, 1.0)


def test_override_can_mend_a_file(load):
    assert load(SMALL + "micro_batch_size: none\n", "micro_batch_size=2").micro_batch_size == 2
    assert load(SMALL.replace("learning_rate: 1e-4", "seed: 1"), "learning_rate=1").learning_rate == 1.0
    whole = load("seed: 1", "base_model=m", "learning_rate=1", "datasets=[{path: a}]")
    assert whole.datasets[0].path == "a"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "override 'seed': expected key=value; write for example"),
        ("=3", "override '=3': expected key=value"),
        ("a..b=3", "override 'a..b=3': expected key=value"),
        ("--seed=3", "override '--seed=3': expected key=value; write 'seed=3', without dashes"),
        ("--seed", "override '--seed': expected key=value; write 'seed=VALUE', without dashes"),
        ("seed={a: ", "override 'seed={a: ': the value is not YAML"),
        ("sed=3", "override 'sed=3': sed: unknown key; did you mean 'seed'?"),
        ("seed=x", "override 'seed=x': seed: got 'x', expected a whole number, 0 or more"),
        ("seed.x=1", "override 'seed.x=1': seed: got {'x': 1}, expected a whole number"),
        ("base_model.x=1", "override 'base_model.x=1': base_model is 'model', in which nothing can be set"),
        ("datasets.1.path=x", "override 'datasets.1.path=x': got '1' after datasets, expected an index from 0 to 0"),
        ("datasets.path=x", "override 'datasets.path=x': got 'path' after datasets, expected an index from 0 to 0"),
        ("datasets.0.pth=x", "override 'datasets.0.pth=x': datasets[0].pth: unknown key; did you mean 'path'?"),
        ("datasets.0.type=alpacca", "override 'datasets.0.type=alpacca': datasets[0].type: got 'alpacca'"),
        (
            "special_tokens.eos_token=5",
            "override 'special_tokens.eos_token=5': special_tokens.eos_token: got 5, expected a text",
        ),
        ("deepspeed=x.json", "override 'deepspeed=x.json': deepspeed: got 'x.json', which is not supported"),
        ("val_set_size.0=1", "override 'val_set_size.0=1': "),
        ("warmup_ratio=0.1", "override 'warmup_ratio=0.1': warmup_ratio: excludes warmup_steps"),
    ],
)
def test_bad_override_names_itself(problems, override, message):
    (error,) = problems(SMALL + "warmup_steps: 5\n", override)
    assert error.startswith(message)


# -------------------------------------------------------------------------------------------------- against the program
def source_of(*files: Path) -> str:
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


@pytest.mark.parametrize("schema", [Config, DatasetConfig])
def test_every_key_is_read_by_what_runs(schema):
    """No key is accepted and then ignored."""
    package = Path(axo_flash.__file__).parent
    readers = source_of(*(file for file in package.rglob("*.py") if file.parent.name != "config"))
    helpers = source_of(package / "config" / "schema.py").partition("def __post_init__")[2]
    merged = {"message_field_role", "message_field_content"}  # into message_property_mappings, by load
    here = {"plugins"}  # Axolotl loads our plugin; where we are the host, there is nothing to load
    for name in {field.name for field in dataclasses.fields(schema)} - merged - here:
        read = rf"""\b(config|dataset|holder)\.{name}\b|getattr\((config|dataset), "{name}" """.strip()
        of_wandb = name.removeprefix("wandb_") if name.startswith("wandb_") else name
        in_helper = rf"self\.{name}\b|\"{of_wandb}\""
        assert re.search(read, readers) or re.search(in_helper, helpers), f"{schema.__name__}.{name} is read nowhere"


def test_words_are_those_of_the_parts_that_read_them():
    accepted = {name: set(check.expected.removeprefix("one of ").split(", ")) for name, check in words().items()}
    assert accepted["type"] == set(formats.SUPPORTED_TYPES)
    assert accepted["ds_type"] == set(files.FORMAT_OF_DS_TYPE)
    assert accepted["attention_backend"] == {"auto", *(row.name for row in backends.BACKENDS)}
    for name in templates.template_names():
        assert values.template(name) == name


def words() -> dict:
    checks = {
        field.name: field.metadata["check"]
        for schema in (Config, DatasetConfig)
        for field in dataclasses.fields(schema)
    }
    return {"type": values.named_format} | {name: checks[name] for name in ("ds_type", "attention_backend")}


# ------------------------------------------------------------------------------------------------------------ in itself
def test_loading_needs_neither_torch_nor_transformers(tmp_path):
    """In a process where axo_flash/__init__.py (which needs torch) does not run."""
    (tmp_path / "run.yml").write_text(SMALL)
    package = Path(axo_flash.__file__).parent
    code = f"""
import sys, types
sys.modules["axo_flash"] = package = types.ModuleType("axo_flash")
package.__path__ = [{str(package)!r}]
from axo_flash.config import load_config
load_config({str(tmp_path / "run.yml")!r})
heavy = {{"torch", "transformers", "datasets", "numpy", "pydantic"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nearest():
    assert nearest("learnign_rate", ["learning_rate", "seed"]) == "did you mean 'learning_rate'?"
    assert nearest("eos", ["bos_token", "eos_token"]) == "did you mean 'eos_token'?"
    assert nearest("x", ["learning_rate"]) == nearest(5, ["seed"]) == ""
