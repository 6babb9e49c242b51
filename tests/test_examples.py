"""The scripts under scripts/examples as a user runs them, on a tiny model; and TRL's packing by itself."""

import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from hf_models import patched_copy
from tiny_run import write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

EXAMPLES = Path(__file__).parent.parent / "scripts" / "examples"
needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs TRL: pip install trl")


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    """A model and a file of texts in an own directory, which is the current one."""
    write_model(tmp_path / "model")
    texts = ["one two three four five", "sun and moon", "a cat sleeps", "a dog runs far away"] * 3
    (tmp_path / "texts.jsonl").write_text("".join(f'{{"text": "{text} {i}"}}\n' for i, text in enumerate(texts)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.parametrize(
    "name, calls",
    [
        ("trainer", 3 * 2 * 2),  # steps, layers, once more in the backward
        ("loop", 3 * 2 * 2),
        pytest.param("trl_sft", 3 * 2 * 2, marks=needs_trl),
    ],
)
def test_example(name, calls, monkeypatch, capsys):
    arguments = ["--model", "model", "--data", "texts.jsonl", "--steps", "3", "--output", "out"]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    runpy.run_path(str(EXAMPLES / f"{name}.py"))
    assert f"attention of 2 layers, calls by backend: {{'reference': {calls}}}" in capsys.readouterr().out
    assert AutoTokenizer.from_pretrained("out").eos_token == "<|im_end|>"
    if name == "trl_sft":
        assert Path("out/adapter_model.safetensors").is_file()
        return
    trained, before = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in ("out", "model"))
    assert any(not torch.equal(trained[name], before[name]) for name in before)


def test_the_example_that_chooses_by_name_needs_nothing_but_its_import():
    """In a process of its own: here the name is registered already."""
    arguments = ["--model", "model", "--data", "texts.jsonl", "--steps", "3", "--output", "out"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(EXAMPLES.parent.parent), *sys.path])}
    command = [sys.executable, str(EXAMPLES / "peft_lora.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    calls = re.fullmatch(r"attention calls by backend: {'reference': (\d+)}", done.stdout.splitlines()[-1])
    assert 3 * 2 < int(calls[1]) <= 3 * 2 + 20 * 2  # training, then at most 20 tokens, of two layers each
    assert Path("out/adapter_model.safetensors").is_file()


@needs_trl
def test_rows_that_trl_packs_are_documents_apart():
    from trl import SFTConfig, SFTTrainer

    eager = AutoModelForCausalLM.from_pretrained("model", attn_implementation="eager")
    model, _ = patched_copy(eager)
    options = {"packing": True, "max_length": 128, "per_device_train_batch_size": 2, "bf16": False, "report_to": "none"}
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(output_dir="out", gradient_checkpointing=False, **options),
        train_dataset=datasets.load_dataset("json", data_files="texts.jsonl", split="train"),
        processing_class=AutoTokenizer.from_pretrained("model"),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert batch["input_ids"].shape[0] == 1 and len(starts) > 4 and "attention_mask" not in batch
    with torch.no_grad():
        got = model(**{name: x for name, x in batch.items() if name != "labels"}).logits[0]
        documents = batch["input_ids"][0].tensor_split(starts[1:])
        alone = torch.cat([eager(document[None]).logits[0] for document in documents])
    torch.testing.assert_close(got, alone, rtol=1e-4, atol=1e-5)
