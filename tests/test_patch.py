"""Patching keeps a model what it was, and undoing gives back the very same one."""

import contextlib
import copy
import dataclasses
import functools
import importlib
import pickle
import sys

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from hf_models import KINDS, assert_same_step, batch_of, patched_copy, run, tiny
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaModel
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralModel

import axo_flash
from axo_flash.patch import FAMILIES, FlashAttention, patched_layers, unpatch_llama, unpatch_mistral

BATCH = batch_of([[4, 7], [11]])
IDS = BATCH.inputs["input_ids"]
CLASSES = {"llama": LlamaAttention, "mistral": MistralAttention}


def attentions(model):
    return [module for module in model.modules() if isinstance(module, tuple(CLASSES.values()))]


def logits(model, **inputs):
    with torch.no_grad():
        return model(**{"input_ids": IDS, **inputs}).logits


def lora(model, **options):
    torch.manual_seed(0)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **options))


# --- what changes, and what does not --------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
def test_undo_gives_back_the_same_classes_and_bits(kind, implementation):
    model = tiny(kind)
    model.set_attn_implementation(implementation)
    modules, before = list(model.modules()), run(model, BATCH.to_model())
    classes, keys = [type(module) for module in modules], list(model.state_dict())

    report = axo_flash.patch_model(model)
    family = kind.partition("_")[0]
    assert (report.family, report.layers) == (family, 2)
    assert {type(a) is not CLASSES[family] and isinstance(a, CLASSES[family]) for a in attentions(model)} == {True}
    assert list(model.modules()) == modules and list(model.state_dict()) == keys
    assert model.config._attn_implementation == "axo_fa"
    assert {type(m).forward for m in attentions(model)} == {FlashAttention.forward}

    report.undo()
    assert [type(module) for module in modules] == classes
    assert model.config._attn_implementation == implementation
    after = run(model, BATCH.to_model())
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    assert all(torch.equal(before[2][name], after[2][name]) for name in before[2])
    assert axo_flash.unpatch_model(model) == 0


def test_patched_layers_are_those_that_compute_by_ours():
    model = tiny("llama")
    assert patched_layers(model) == 0
    axo_flash.patch_model(model)
    assert patched_layers(model) == 2
    first = attentions(model)[0]
    first.forward = functools.partial(type(first).forward, first)  # as other tools replace it
    assert patched_layers(model) == 1
    del first.forward
    add_hook_to_module(first, ModelHook())  # as device_map does: the hook calls ours
    assert patched_layers(model) == 2
    axo_flash.unpatch_model(model)
    assert patched_layers(model) == 0


def test_projections_that_axolotl_fused_are_used():
    """Its LoRA kernels replace the projections of an attention module by methods on it."""
    model, _ = patched_copy(tiny("llama"))
    expected, used = logits(model), []
    for module in attentions(model):

        def apply_qkv(x, module=module):
            used.append("qkv")
            return module.q_proj(x), module.k_proj(x), module.v_proj(x)

        def apply_o(x, module=module):
            used.append("o")
            return module.o_proj(x)

        module.apply_qkv, module.apply_o = apply_qkv, apply_o
    assert torch.equal(logits(model), expected)
    assert used == ["qkv", "o"] * 2


def test_patching_twice_changes_nothing():
    model = tiny("llama")
    first = axo_flash.patch_model(model)
    classes, expected = [type(a) for a in attentions(model)], logits(model)
    second = axo_flash.patch_model(model)
    assert [type(a) for a in attentions(model)] == classes and torch.equal(logits(model), expected)
    assert (second.family, second.layers, second.backend) == (first.family, first.layers, first.backend)
    second.undo()
    assert {type(a) for a in attentions(model)} == {LlamaAttention}
    assert model.config._attn_implementation == "eager"
    first.undo()
    assert {type(a) for a in attentions(model)} == {LlamaAttention}


def test_patching_again_with_another_backend_changes_the_backend(monkeypatch):
    asked = []
    original = axo_flash.attention.flash_attn_func
    spy = lambda *args, backend, **options: asked.append(backend) or original(*args, **options)  # noqa: E731
    monkeypatch.setattr(axo_flash.attention, "flash_attn_func", spy)
    model = tiny("llama")
    axo_flash.patch_model(model)
    logits(model)
    axo_flash.patch_model(model, backend="reference")
    logits(model)
    assert asked == ["auto", "auto", "reference", "reference"]
    axo_flash.unpatch_model(model)
    assert {type(a) for a in attentions(model)} == {LlamaAttention}


def test_patched_is_undone_when_the_block_fails():
    model = tiny("llama")
    with pytest.raises(KeyError), axo_flash.patched(model) as report:
        assert report.layers == 2 and isinstance(attentions(model)[0], FlashAttention)
        raise KeyError
    assert {type(a) for a in attentions(model)} == {LlamaAttention}


@pytest.mark.parametrize("first", ["patch_model", "patched"])
def test_patched_leaves_a_model_patched_that_was(first):
    """A block inside a block, or on a patched model, gives back the backend that it found; the last one unpatches."""
    model = tiny("llama")
    outer = axo_flash.patched(model) if first == "patched" else contextlib.nullcontext(axo_flash.patch_model(model))
    with outer:
        classes = [type(a) for a in attentions(model)]
        with pytest.raises(KeyError), axo_flash.patched(model, backend="reference"):
            assert [a.backend for a in attentions(model)] == ["reference", "reference"]
            raise KeyError
        assert [type(a) for a in attentions(model)] == classes and classes[0].backend == "auto"
        assert model.config._attn_implementation == "axo_fa"
        logits(model)
    assert {isinstance(a, FlashAttention) for a in attentions(model)} == {first == "patch_model"}
    assert axo_flash.unpatch_model(model) == (2 if first == "patch_model" else 0)
    assert {type(a) for a in attentions(model)} == {LlamaAttention}
    assert model.config._attn_implementation == "eager"


def test_patched_trains_and_generates_a_wrapped_model():
    model = lora(tiny("llama"))
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    expected, tokens = run(model, BATCH.to_model()), model.generate(input_ids=IDS, **options)
    with axo_flash.patched(model) as report:
        got = run(model, BATCH.to_model())
        assert torch.equal(model.generate(input_ids=IDS, **options), tokens)
    assert report.calls() == {"reference": 2 + 2 * 5}
    assert_same_step(got, expected, BATCH.real)
    assert torch.equal(run(model, BATCH.to_model())[0], expected[0])


def test_undo_leaves_an_attention_that_was_chosen_since():
    model = tiny("llama")
    report = axo_flash.patch_model(model)
    model.set_attn_implementation("sdpa")
    report.undo()
    assert model.config._attn_implementation == "sdpa"


def test_two_models_are_patched_apart():
    first, second = tiny("llama"), tiny("llama")
    axo_flash.patch_model(first)
    assert {type(a) for a in attentions(second)} == {LlamaAttention}
    assert second.config._attn_implementation == "eager"


def test_hooks_stay_and_are_called():
    model = tiny("llama")
    shapes = []
    attentions(model)[0].register_forward_hook(lambda module, args, out: shapes.append(out[0].shape))
    with axo_flash.patched(model):
        logits(model)
    assert shapes == [(2, 11, 48)]


def test_accelerates_hooks_call_the_patched_forward():
    """device_map replaces the forward of the instance by one that calls the forward it found."""
    model = tiny("llama")
    expected = logits(model)
    for module in attentions(model):
        add_hook_to_module(module, ModelHook())
    report = axo_flash.patch_model(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert attentions(model)[0]._old_forward.__func__ is FlashAttention.forward
    report.undo()
    assert attentions(model)[0]._old_forward.__func__ is LlamaAttention.forward
    assert torch.equal(logits(model), expected)


def test_checkpoints_do_not_know_of_the_patch(tmp_path):
    model = tiny("mistral")
    expected = logits(model)
    axo_flash.patch_model(model)
    model.save_pretrained(tmp_path)
    assert "axo" not in (tmp_path / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(logits(loaded), expected)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_stay_patched_and_can_be_undone(duplicate):
    patched, _ = patched_copy(tiny("mistral"))
    other = duplicate(patched)
    assert {type(a) for a in attentions(other)} == {type(a) for a in attentions(patched)}
    assert torch.equal(logits(other), logits(patched))
    assert axo_flash.unpatch_model(other) == 2
    assert {type(a) for a in attentions(other)} == {MistralAttention}
    assert other.config._attn_implementation == "eager"
    assert isinstance(attentions(patched)[0], FlashAttention)


def test_a_rotary_embedding_replaced_in_transformers_is_called(monkeypatch):
    """Liger and others replace the function in transformers' module, before or after the model is patched."""
    patched, _ = patched_copy(tiny("llama"))
    expected, called = logits(patched), []
    original = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda *a, **k: called.append(1) or original(*a, **k))
    assert torch.equal(logits(patched), expected) and len(called) == 2


# --- the report -----------------------------------------------------------------------------------------------------


def test_the_report_counts_the_calls_of_each_backend():
    model = tiny("llama")
    report = axo_flash.patch_model(model)
    assert repr(report).startswith("PatchReport(family='llama', layers=2, backend='reference', reason='not hopper: ")
    assert report.calls() == {}
    logits(model)
    assert report.calls() == {"reference": 2}
    later = axo_flash.patch_model(model)
    logits(model)
    assert (report.calls(), later.calls()) == ({"reference": 4}, {"reference": 2})


def test_a_backend_that_cannot_serve_is_refused_with_the_reason():
    model = tiny("llama")
    with pytest.raises(ValueError, match="not triton: "):
        axo_flash.patch_model(model, backend="triton")  # fp32, on a CPU
    with pytest.raises(ValueError, match="unknown attention backend 'tritn'"):
        axo_flash.patch_model(model, backend="tritn")
    assert {type(a) for a in attentions(model)} == {LlamaAttention}
    assert model.config._attn_implementation == "eager"


def test_the_dtype_of_autocast_can_be_told(monkeypatch):
    asked = []
    original = axo_flash.patch.choose_backend
    spy = lambda spec, *args: asked.append(spec.dtype) or original(spec, *args)  # noqa: E731
    monkeypatch.setattr(axo_flash.patch, "choose_backend", spy)
    axo_flash.patch_model(tiny("llama"))
    axo_flash.patch_model(tiny("llama"), dtype=torch.bfloat16)
    assert asked == ["float32", "float32", "bfloat16", "bfloat16"]


# --- models that cannot be patched ----------------------------------------------------------------------------------


def test_another_family_is_refused():
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16))
    with pytest.raises(ValueError, match="GPT2LMHeadModel has the attention classes GPT2Attention; supported are"):
        axo_flash.patch_model(model)
    with pytest.raises(ValueError, match=r"import axo_flash\.hf, and model\.set_attn_implementation\('axo_fa'\)$"):
        axo_flash.patch_model(model)
    bloom = BloomForCausalLM(BloomConfig(n_layer=1, n_head=2, hidden_size=8, vocab_size=16))  # takes no name
    with pytest.raises(
        ValueError, match=r"the attention classes BloomAttention; supported are .*\(MistralAttention\)$"
    ):
        axo_flash.patch_model(bloom)
    with pytest.raises(ValueError, match="Linear has no attention"):
        axo_flash.patch_model(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"a torch\.nn\.Module.*got str"):
        axo_flash.patch_model("HuggingFaceTB/SmolLM2-135M")
    with pytest.raises(ValueError, match=r"a torch\.nn\.Module.*got str"), axo_flash.patched("SmolLM2-135M"):
        pass
    with pytest.raises(ValueError, match="give the whole model, got LlamaDecoderLayer"):
        axo_flash.patch_model(tiny("llama").model.layers[0])


def test_attention_dropout_acts_in_training_only():
    patched, _ = patched_copy(tiny("llama", attention_dropout=0.5))
    plain, _ = patched_copy(tiny("llama"))
    assert torch.equal(logits(patched.eval()), logits(plain))
    patched.train()
    torch.manual_seed(0)
    first, second = logits(patched), logits(patched)
    torch.manual_seed(0)
    assert torch.equal(logits(patched), first)
    assert not torch.equal(first, second) and not torch.equal(first, logits(plain))


def test_attention_dropout_is_the_same_when_recomputed():
    gradients = []
    for checkpointing in (False, True):
        patched, _ = patched_copy(tiny("llama", attention_dropout=0.5))
        if checkpointing:
            patched.gradient_checkpointing_enable({"use_reentrant": False})
        patched.train()
        torch.manual_seed(0)
        patched(IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append([p.grad for p in patched.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_the_backend_has_to_serve_attention_dropout(monkeypatch):
    """A Hopper kernel has none: asked for by name, that is said when patching, not in the first step."""
    seen = []
    original = axo_flash.patch.choose_backend
    monkeypatch.setattr(axo_flash.patch, "choose_backend", lambda spec, *a: seen.append(spec) or original(spec, *a))
    patched_copy(tiny("llama", attention_dropout=0.1))
    assert {spec.dropout_p for spec in seen} == {0.1}
    hopper = importlib.import_module("axo_flash.kernels.hopper")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    reason = hopper.supports(dataclasses.replace(seen[0], dtype="bfloat16", head_dim=64), torch.device("cuda"))
    assert "dropout: only the other backends have that" in reason


def test_a_forward_that_is_not_the_familys_is_not_replaced():
    class Own(LlamaAttention):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    model = tiny("llama")
    attentions(model)[0].__class__ = Own
    with pytest.raises(ValueError, match="Own has a forward of its own"):
        axo_flash.patch_model(model)
    model = tiny("llama")
    module = attentions(model)[0]
    module.forward = functools.partial(LlamaAttention.forward, module)
    with pytest.raises(ValueError, match="replaced by another tool"):
        axo_flash.patch_model(model)


def test_attention_weights_are_refused_and_not_none():
    patched, _ = patched_copy(tiny("llama"))
    with pytest.raises(ValueError, match="attention weights are never formed"):
        patched(IDS, output_attentions=True)


# --- PEFT -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["peft", "patch"])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_lora_trains_the_same_whichever_comes_first(kind, first):
    eager = lora(tiny(kind))
    if first == "peft":
        model, _ = patched_copy(eager)
    else:
        model = tiny(kind)
        axo_flash.patch_model(model)
        model = lora(model)
    expected, got = run(eager, BATCH.to_model() | {"use_cache": False}), run(model, BATCH.to_model())
    assert len(got[2]) == 2 * 4 * 2 and all("lora_" in name for name in got[2])
    assert_same_step(got, expected, BATCH.real)
    assert axo_flash.unpatch_model(model) == 2
    assert {type(a) for a in attentions(model)} == {CLASSES[kind]}


def test_dora_and_checkpointing_under_k_bit_preparation():
    eager = prepare_model_for_kbit_training(tiny("llama"), gradient_checkpointing_kwargs={"use_reentrant": False})
    eager = lora(eager, use_dora=True).train()
    patched, _ = patched_copy(eager)
    assert_same_step(run(patched, BATCH.to_model()), run(eager, BATCH.to_model()), BATCH.real)


def test_merged_adapters_stay_patched():
    model = lora(tiny("llama"))
    report = axo_flash.patch_model(model)
    expected = logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert report.calls() == {"reference": 4} and type(attentions(merged)[0].q_proj) is torch.nn.Linear
    assert axo_flash.unpatch_model(merged) == 2 and {type(a) for a in attentions(merged)} == {LlamaAttention}


# --- models made later ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, patch, unpatch, decoder",
    [
        ("llama", axo_flash.patch_llama, unpatch_llama, LlamaModel),
        ("mistral", axo_flash.patch_mistral, unpatch_mistral, MistralModel),
    ],
)
def test_every_model_made_after_the_one_line_patch_is_patched(family, patch, unpatch, decoder, tmp_path):
    plain = tiny(family)
    plain.save_pretrained(tmp_path)
    expected, original = logits(plain), decoder.__init__
    patch()
    patch()
    try:
        made = [AutoModelForCausalLM.from_pretrained(tmp_path), AutoModelForCausalLM.from_config(plain.config)]
    finally:
        unpatch()
    unpatch()
    for model in made:
        assert {isinstance(a, FlashAttention) for a in attentions(model)} == {True}
        assert model.config._attn_implementation == "axo_fa"
    torch.testing.assert_close(logits(made[0]), expected, rtol=1e-4, atol=1e-5)
    assert decoder.__init__ is original
    after = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert {type(a) for a in attentions(after)} == {CLASSES[family]} and torch.equal(logits(after), expected)
    assert axo_flash.unpatch_model(made[0]) == 2 and made[0].config._attn_implementation == "sdpa"


def test_the_one_line_patch_wants_a_backend_that_exists():
    with pytest.raises(ValueError, match="unknown attention backend 'tritn'"):
        axo_flash.patch_llama("tritn")
    assert {type(a) for a in attentions(tiny("llama"))} == {LlamaAttention}


def test_the_table_names_classes_that_exist():
    for family in FAMILIES:
        module = sys.modules[family.module]
        assert hasattr(module, family.attention) and hasattr(module, family.decoder)
        assert hasattr(module, "apply_rotary_pos_emb")


# --- the kernels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_patched_model_trains_on_the_triton_backend(kind):
    """One packed step in fp16, against eager attention's error in fp16; on a CPU in Triton's interpreter."""
    pytest.importorskip("triton", reason="needs triton: pip install 'axo-flash[flash-attn]'")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    exact = tiny(kind, num_hidden_layers=1, head_dim=16).to(device)
    eager = copy.deepcopy(exact).half()
    patched, report = patched_copy(eager, backend="triton")
    inputs = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in BATCH.to_model().items()}
    (logits, _, gradients), *others = (run(model, inputs) for model in (exact, eager, patched))
    assert report.backend == "triton" and report.calls() == {"triton": 1}
    errors = []
    for step in others:
        pairs = [(step[0], logits), *((step[2][name], gradients[name]) for name in gradients)]
        errors.append([float((got.float() - want).norm() / want.norm()) for got, want in pairs])
    for ours, eagers in zip(errors[1], errors[0], strict=True):
        assert ours < 3 * eagers + 1e-4
