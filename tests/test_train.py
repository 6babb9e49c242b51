"""Whole runs on a tiny model: what they leave behind, that they resume bit-identically, and that every key acts."""

import dataclasses
import importlib.util
import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import write_yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import axo_flash
from axo_flash.config import Config, DatasetConfig, load_config
from axo_flash.errors import UserError
from axo_flash.train import train
from axo_flash.trainer import count_steps, training_arguments

FULL = {"adapter": None, "lora_r": None, "lora_alpha": None, "lora_target_linear": None, "learning_rate": 1e-3}
PADDED = {"sample_packing": False, "micro_batch_size": 2}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("train")


def run(directory, name, **changes):
    """Train with the tiny run's YAML and these changes; the report. Output goes to `directory`/`name`."""
    said = []
    path = write_yaml(directory, output_dir=str(directory / name), **changes)
    report = train(load_config(path), said.append)
    assert report.status == "finished"
    return report


def adapter(directory, name):
    return load_file(directory / name / "adapter_model.safetensors")


def losses(report, key="loss"):
    return [row[key] for row in report.history if key in row]


# --------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("batches", [{}, PADDED], ids=["packed", "padded"])
def test_lora_learns(directory, family, batches):
    report = run(directory, f"lora-{family}", family=family, max_steps=12, **batches)
    assert report.eval_loss_after < report.eval_loss_before - 0.1
    assert report.steps == 12
    assert len(losses(report)) == 12
    assert report.attention.layers == 2
    assert report.attention.calls == {"reference": sum(report.attention.calls.values())}
    assert report.attention.fell_back == 0


def test_what_a_lora_run_leaves(directory):
    report = run(directory, "leaves", save_strategy="steps", save_steps=2, save_total_limit=1)
    out = directory / "leaves"
    saved = json.loads((out / "run_report.json").read_text())
    assert saved["status"] == "finished"
    assert saved["eval_loss_after"] == report.eval_loss_after
    assert saved["versions"]["torch"] == torch.__version__
    assert saved["config"]["sequence_len"] == 256
    assert saved["data"]["rows_read"] == 60
    assert saved["speed"]["packing_efficiency"] > 0.9
    assert set(saved["seconds"]) == {
        *("demo", "data", "model", "before", "training", "after", "saving", "publishing"),
    }
    assert (out / "loss.png").stat().st_size > 10_000
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-4"}
    assert AutoTokenizer.from_pretrained(out).eos_token == "<|im_end|>"
    assert adapter(directory, "leaves")


def test_what_a_full_run_leaves(directory):
    run(directory, "full", **FULL)
    config = json.loads((directory / "full" / "config.json").read_text())
    assert config["use_cache"] is True
    assert "axo" not in json.dumps(config)
    model = AutoModelForCausalLM.from_pretrained(directory / "full")
    before = AutoModelForCausalLM.from_pretrained(directory / "tiny-llama")
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before.model.layers[0].mlp.up_proj.weight)


def test_numbers_of_the_report_are_those_of_the_run(directory):
    report = run(directory, "numbers", max_steps=None, num_epochs=1, gradient_accumulation_steps=2)
    assert report.speed.tokens == report.data["tokens"]  # one epoch sees every token once
    assert report.data["rows_used"] == 60
    rows = report.data["packed_rows"]
    assert report.steps == -(-rows // 2)
    assert report.epochs == pytest.approx(1.0)
    assert report.speed.tokens_per_second > 0
    assert 0 < report.speed.first_step_seconds < report.speed.seconds < report.seconds["training"] + 0.1
    assert report.speed.flops > 0
    assert report.speed.mfu is None


def test_packed_and_padded_rows_give_one_validation_loss(directory):
    packed = run(directory, "eval-packed", max_steps=1)
    padded = run(directory, "eval-padded", max_steps=1, **PADDED)
    apart = run(directory, "eval-apart", max_steps=1, eval_sample_packing=False)
    assert padded.eval_loss_before == pytest.approx(packed.eval_loss_before, rel=1e-6)
    assert apart.eval_loss_before == pytest.approx(packed.eval_loss_before, rel=1e-6)


def test_our_attention_and_sdpa_give_one_loss_curve(directory):
    ours = run(directory, "ours", **PADDED)
    theirs = run(directory, "sdpa", attn_implementation="sdpa", **PADDED)
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-5)
    assert theirs.attention.backend is None


def test_accumulated_small_batches_are_one_large_batch(directory):
    plain = {"sample_packing": False, "max_steps": 3}
    large = run(directory, "large", micro_batch_size=4, **plain)
    small = run(directory, "small", micro_batch_size=1, gradient_accumulation_steps=4, **plain)
    assert losses(small) == pytest.approx(losses(large), rel=1e-4)


def test_without_validation_rows(directory):
    report = run(directory, "no-eval", val_set_size=0, eval_strategy=None)
    assert report.eval_loss_before is None
    assert report.eval_loss_after is None
    assert report.sample.after is not None


def test_same_seed_same_run(directory):
    one, two = run(directory, "one", lora_dropout=0.1), run(directory, "two", lora_dropout=0.1)
    other = run(directory, "other", lora_dropout=0.1, seed=7)
    assert losses(one) == losses(two)
    assert losses(one) != losses(other)
    assert one.config_hash != other.config_hash


def test_evaluation_and_saving_during_the_run(directory):
    report = run(directory, "schedule", evals_per_epoch=2, saves_per_epoch=4, eval_strategy=None, save_strategy=None)
    assert [row["step"] for row in report.history if "eval_loss" in row] == [0, 2, 4]
    assert sorted(path.name for path in (directory / "schedule").glob("checkpoint-*")) == [
        f"checkpoint-{step}" for step in (1, 2, 3, 4)
    ]


# -------------------------------------------------------------------------------------------------- resume and stopping


@pytest.mark.parametrize(
    "changes",
    [{}, FULL, {"sample_packing": False, "group_by_length": True}, {"gradient_accumulation_steps": 2}],
    ids=["packed-lora", "full", "grouped", "accumulated"],
)
def test_resumed_run_is_bit_identical(directory, tmp_path, changes):
    # the checkpoint lies within the second of three epochs, so the order of the rows has to be found again too
    keys = {"max_steps": None, "num_epochs": 3, "save_strategy": None, "save_steps": 0.6, "lora_dropout": 0.1} | changes
    name = "adapter_model.safetensors" if "adapter" not in changes else "model.safetensors"
    whole = run(directory, f"whole-{tmp_path.name}", **keys)
    checkpoint = directory / f"whole-{tmp_path.name}" / f"checkpoint-{math.ceil(0.6 * whole.steps)}"
    resumed = run(directory, f"resumed-{tmp_path.name}", resume_from_checkpoint=str(checkpoint), **keys)

    one = load_file(directory / f"whole-{tmp_path.name}" / name)
    two = load_file(directory / f"resumed-{tmp_path.name}" / name)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert losses(whole) == losses(resumed)
    assert whole.eval_loss_before == resumed.eval_loss_before
    assert resumed.resumed_from == str(checkpoint)


def test_early_stopping(directory):
    report = run(
        directory, "early", early_stopping_patience=2, eval_strategy=None, eval_steps=1, max_steps=30, learning_rate=1.0
    )
    assert report.steps < 30
    assert "early_stopping_patience" in report.stopped_because


def test_loss_watchdog(directory):
    report = run(directory, "watchdog", loss_watchdog_threshold=0.5, loss_watchdog_patience=3, max_steps=30)
    assert report.steps == 3
    assert "loss_watchdog_threshold" in report.stopped_because


# ------------------------------------------------------------------------------------------------------------ arguments


def test_every_key_of_the_yaml_is_read_somewhere():
    """A field that nothing reads would be a key that is accepted and ignored."""
    package = Path(axo_flash.__file__).parent
    readers = [path for path in package.rglob("*.py") if "config" not in path.relative_to(package).parts[:1]]
    source = "\n".join(path.read_text(encoding="utf-8") for path in readers)
    schema = "\n".join(path.read_text(encoding="utf-8") for path in (package / "config").glob("*.py"))
    unread = []
    for cls in (Config, DatasetConfig):
        for field in dataclasses.fields(cls):
            reads = re.findall(rf'\.{field.name}\b|getattr\(\w+, "{field.name}"', source)
            reads += re.findall(rf"self\.{field.name}\b", schema)
            if not reads and field.name not in ALLOWED_UNREAD:
                unread.append(f"{cls.__name__}.{field.name}")
    assert unread == []


# read as a group by Config.wandb_environment; a list that may only name this package, where there is nothing to do;
# merged into message_property_mappings when the YAML is loaded
ALLOWED_UNREAD = {
    *(f.name for f in dataclasses.fields(Config) if f.name.startswith("wandb_")),
    "plugins",
    "message_field_role",
    "message_field_content",
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"warmup_steps": 7}, {"warmup_steps": 7}),
        ({"warmup_ratio": 0.25}, {"warmup_steps": 10}),
        ({"lr_scheduler": "linear", "weight_decay": 0.1}, {"lr_scheduler_type": "linear", "weight_decay": 0.1}),
        ({"max_grad_norm": 0.3, "adam_beta2": 0.95}, {"max_grad_norm": 0.3, "adam_beta2": 0.95}),
        ({"adam_beta1": 0.8, "adam_epsilon": 1e-6}, {"adam_beta1": 0.8, "adam_epsilon": 1e-6}),
        ({"save_strategy": None, "save_steps": 0.25}, {"save_strategy": "steps", "save_steps": 0.25}),
        ({"group_by_length": True, "sample_packing": False}, {"train_sampling_strategy": "group_by_length"}),
        ({"optimizer": "adamw_torch_fused", "logging_steps": None}, {"optim": "adamw_torch_fused", "logging_steps": 1}),
        ({"wandb_project": "p", "wandb_name": "n"}, {"report_to": ["wandb"], "run_name": "n"}),
        ({"wandb_project": "p", "wandb_mode": "disabled"}, {"report_to": []}),
    ],
)
def test_training_arguments(directory, monkeypatch, changes, expected):
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_MODE"):
        monkeypatch.setenv(name, "set, so that what the run sets is undone")
    arguments = training_arguments(
        load_config(write_yaml(directory, **changes)), directory, torch.float32, total_steps=40
    )
    assert {key: getattr(arguments, key) for key in expected} == expected
    assert arguments.remove_unused_columns is False


def test_optimizers_of_bitsandbytes_name_their_package(directory):
    config = load_config(write_yaml(directory, optimizer="adamw_bnb_8bit"))
    if importlib.util.find_spec("bitsandbytes"):
        assert training_arguments(config, directory, torch.float32, 4).optim == "adamw_bnb_8bit"
    else:
        with pytest.raises(UserError, match=r'optimizer: adamw_bnb_8bit needs .* pip install "axo-flash\[qlora\]"'):
            training_arguments(config, directory, torch.float32, 4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without TF32")
def test_tf32_where_there_is_none(directory):
    with pytest.raises(UserError, match="tf32: true needs an NVIDIA GPU"):
        training_arguments(load_config(write_yaml(directory, tf32=True)), directory, torch.float32, 4)


@pytest.mark.parametrize(("rows", "steps"), [(1, 2), (6, 2), (7, 4), (12, 4), (13, 6)])
def test_steps_are_counted_as_trainer_does(directory, rows, steps):
    keys = {"micro_batch_size": 2, "gradient_accumulation_steps": 3, "num_epochs": 2, "max_steps": None}
    assert count_steps(load_config(write_yaml(directory, **keys)), rows) == steps
