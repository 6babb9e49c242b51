"""Weights, tokenizer, dtype and adapter as the YAML asks, and one clear error where that cannot be."""

import importlib.util

import pytest
import torch
from tiny_run import write_model, write_yaml

from axo_flash import model as model_module
from axo_flash.config import load_config
from axo_flash.model import ModelError, compute_dtype, load_model, load_tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("model")


def configured(directory, **changes):
    return load_config(write_yaml(directory, **changes))


def loaded(directory, **changes):
    config = configured(directory, **changes)
    return load_model(config, load_tokenizer(config))


def test_lora_on_all_linear_layers_but_the_head(directory):
    model = loaded(directory)
    trained = {name for name, parameter in model.model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    layers = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in trained} == layers
    trainable, total = model.parameter_counts()
    assert trainable == sum(p.numel() for p in model.model.parameters() if p.requires_grad)
    assert trainable < total


def test_target_modules_add_to_target_linear(directory):
    config = configured(directory, lora_target_modules=["embed_tokens"])
    names = dict(load_model(config, load_tokenizer(config)).model.named_parameters())
    assert any("embed_tokens.lora_embedding" in name for name in names)
    assert any("q_proj.lora_A" in name for name in names)


def test_only_the_target_modules_named(directory):
    model = loaded(directory, lora_target_linear=False, lora_target_modules=["q_proj", "v_proj"])
    trained = {name for name, parameter in model.model.named_parameters() if parameter.requires_grad}
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in trained} == {"q_proj", "v_proj"}


def test_modules_to_save_are_trained_whole(directory):
    model = loaded(directory, lora_modules_to_save=["lm_head"])
    assert model.model.get_submodule("base_model.model.lm_head").modules_to_save["default"].weight.requires_grad


def test_full_training_trains_everything(directory):
    model = loaded(directory, adapter=None, lora_r=None, lora_alpha=None, lora_target_linear=None)
    trainable, total = model.parameter_counts()
    assert trainable == total


def test_the_seed_decides_the_adapter(directory):
    def first_matrix(seed):
        torch.manual_seed(torch.seed() % 1000)  # whatever state the process is in
        return next(p for n, p in loaded(directory, seed=seed).model.named_parameters() if "lora_A" in n)

    assert torch.equal(first_matrix(1), first_matrix(1))
    assert not torch.equal(first_matrix(1), first_matrix(2))


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_attention_is_patched(directory, family):
    model = loaded(directory, family=family)
    assert model.family == family
    assert (model.patch_report.family, model.patch_report.layers) == (family, 2)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_models_own_attention_stays_on_request(directory, implementation):
    model = loaded(directory, attn_implementation=implementation)
    assert model.patch_report is None
    assert model.model.config._attn_implementation == implementation


def test_gradient_checkpointing_reaches_the_adapter(directory):
    for reentrant in (True, False):
        keys = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        model = loaded(directory, **keys).model
        assert model.is_gradient_checkpointing
        ids = torch.arange(20)[None]
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        grads = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
        assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)


def test_saved_adapter_goes_on(directory, tmp_path):
    first = loaded(directory).model
    with torch.no_grad():
        for name, parameter in first.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.25)
    first.save_pretrained(tmp_path)
    second = loaded(directory, lora_model_dir=str(tmp_path)).model
    values = {n: p for n, p in second.named_parameters() if "lora_B" in n}
    assert values
    assert all(p.requires_grad and torch.equal(p, torch.full_like(p, 0.25)) for p in values.values())


# ---------------------------------------------------------------------------------------------------------- tokenizer


def test_padding_falls_back_to_the_end_token(directory):
    tokenizer = load_tokenizer(configured(directory))
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.padding_side == "right"


def test_special_tokens_by_role(directory):
    tokenizer = load_tokenizer(configured(directory, special_tokens={"pad_token": "<unk>", "eos_token": "</s>"}))
    assert (tokenizer.pad_token, tokenizer.eos_token, len(tokenizer)) == ("<unk>", "</s>", 261)


def test_new_tokens_grow_the_embeddings(directory):
    changes = {"tokens": ["<tool>", "<answer>"], "lora_modules_to_save": ["embed_tokens", "lm_head"]}
    config = configured(directory, **changes)
    tokenizer = load_tokenizer(config)
    assert tokenizer.encode("<tool>", add_special_tokens=False) == [261]
    assert load_model(config, tokenizer).model.get_input_embeddings().weight.shape[0] == 263


def test_new_tokens_with_frozen_embeddings_are_refused(directory):
    with pytest.raises(ModelError, match=r"<answer>, <tool>.*lora_modules_to_save: \[embed_tokens, lm_head\]"):
        loaded(directory, tokens=["<tool>", "<answer>"])


def test_a_new_padding_token_needs_no_training(directory):
    model = loaded(directory, special_tokens={"pad_token": "<pad>"})
    assert model.model.get_input_embeddings().weight.shape[0] == 262


def test_chat_template_of_the_yaml(directory):
    tokenizer = load_tokenizer(configured(directory, chat_template="llama3"))
    assert "<|start_header_id|>" in tokenizer.chat_template


# -------------------------------------------------------------------------------------------------------------- dtype


@pytest.mark.parametrize(
    ("keys", "gpu", "hardware", "expected"),
    [
        ({"bf16": "auto"}, False, True, torch.bfloat16),
        ({"bf16": "auto"}, False, False, torch.float32),
        ({"bf16": "auto"}, True, True, torch.bfloat16),
        ({"bf16": "auto"}, True, False, torch.float16),
        ({"bf16": True}, False, False, torch.bfloat16),
        ({"bf16": False}, True, True, torch.float32),
        ({"bf16": False, "fp16": True}, True, False, torch.float16),
    ],
)
def test_dtype(directory, monkeypatch, keys, gpu, hardware, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: hardware)
    monkeypatch.setattr(model_module, "cpu_has_bf16", lambda: hardware)
    dtype, reason = compute_dtype(configured(directory, **keys))
    assert dtype == expected
    assert reason.startswith(("bf16:", "fp16:"))


def test_dtypes_that_the_device_does_not_have(directory, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match="fp16: true needs a GPU"):
        compute_dtype(configured(directory, bf16=False, fp16=True))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    with pytest.raises(ModelError, match="Tesla T4 has no bfloat16: write bf16: auto"):
        compute_dtype(configured(directory, bf16=True))


def test_float16_weights_are_trained_in_float32(directory):
    full = {"adapter": None, "lora_r": None, "lora_alpha": None, "lora_target_linear": None}
    assert model_module.weights_dtype(configured(directory, **full), torch.float16) == torch.float32
    assert model_module.weights_dtype(configured(directory), torch.float16) == torch.float16
    assert model_module.weights_dtype(configured(directory, **full), torch.bfloat16) == torch.bfloat16


# ------------------------------------------------------------------------------------------------------------- errors


def no_tokenizer(path):
    write_model(path)
    for file in path.glob("tokenizer*"):
        file.unlink()
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model": "/no/such/model"}, "there is no directory /no/such/model"),
        ({"base_model": "./nowhere"}, "there is no directory ./nowhere"),
        ({"base_model": "someone/no-such-model"}, "no local directory.*Hugging Face Hub.*Check the spelling"),
        ({"model_type": "MistralForCausalLM"}, "model_type: MistralForCausalLM does not fit .* family is llama"),
        ({"lora_model_dir": "/no/adapter"}, "no adapter_config.json in /no/adapter"),
        ({"lora_target_linear": False, "lora_target_modules": ["qq_proj"]}, "names no layer.*q_proj"),
        ({"attention_backend": "triton"}, "attention_backend: triton: .*float32"),
    ],
)
def test_one_clear_error(directory, changes, message):
    with pytest.raises(ModelError, match=message) as caught:
        loaded(directory, **changes)
    assert "\n" not in str(caught.value)


def test_directory_without_a_model(directory, tmp_path):
    with pytest.raises(ModelError, match="can be loaded from the directory"):
        loaded(directory, base_model=str(tmp_path))


def test_directory_without_a_tokenizer(directory, tmp_path):
    with pytest.raises(ModelError, match="no tokenizer can be loaded from the directory"):
        load_tokenizer(configured(directory, base_model=str(no_tokenizer(tmp_path))))


def test_other_families_are_refused(directory, tmp_path):
    write_model(tmp_path, "qwen2")
    with pytest.raises(ModelError, match="family qwen2; expected one of llama, mistral"):
        loaded(directory, base_model=str(tmp_path))


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
@pytest.mark.parametrize("keys", [{"adapter": "qlora", "load_in_4bit": True}, {"load_in_8bit": True}])
def test_quantisation_without_bitsandbytes(directory, keys):
    with pytest.raises(ModelError, match=r'bitsandbytes, which is not installed: pip install "axo-flash\[qlora\]"'):
        loaded(directory, **keys)


@pytest.mark.parametrize("keys", [{"adapter": "qlora", "load_in_4bit": True}, {"load_in_8bit": True}])
def test_quantised_weights_train(directory, keys):
    pytest.importorskip("bitsandbytes")
    model = loaded(directory, **keys)
    ids = torch.arange(20)[None]
    model.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert all(p.grad is not None for n, p in model.model.named_parameters() if "lora_B" in n)
    assert model.parameter_counts()[1] == loaded(directory).parameter_counts()[1]
