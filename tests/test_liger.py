"""Liger's kernels beside our attention, applied before or after it: the step of plain eager attention.

On a CPU Liger's rotary embedding and losses run in Triton's interpreter; its RMS norm and SwiGLU, which the interpreter
cannot run (they call `.to` on Python floats), are compared on a GPU.
"""

import copy

import pytest
import torch
from hf_models import _distance, batch_of, run, tiny
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral

import axo_flash

liger = pytest.importorskip("liger_kernel.transformers", reason="needs Liger: pip install liger-kernel")
MODULES = {"llama": modeling_llama, "mistral": modeling_mistral}
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
BATCH = batch_of([[9, 1, 7], [4, 13]])  # packed


@pytest.fixture(autouse=True)
def undo_liger(monkeypatch):
    """Liger patches transformers' modules for good: after the test they are what they were."""
    for family, module in MODULES.items():
        name = family.capitalize()
        for attribute in ("apply_rotary_pos_emb", f"{name}RMSNorm", f"{name}MLP"):
            monkeypatch.setattr(module, attribute, getattr(module, attribute))
        model_class = getattr(module, f"{name}ForCausalLM")
        monkeypatch.setattr(model_class, "forward", model_class.forward)
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", torch.nn.functional.cross_entropy)


def apply_liger(family, loss, model=None):
    apply = getattr(liger, f"apply_liger_kernel_to_{family}")
    losses = {name: name == loss for name in ("cross_entropy", "fused_linear_cross_entropy")}
    apply(rope=True, rms_norm=ON_GPU, swiglu=ON_GPU, model=model, **losses)


@pytest.mark.parametrize("loss", ["cross_entropy", "fused_linear_cross_entropy"])
@pytest.mark.parametrize("order", ["liger, model, ours", "ours, liger on the model", "ours, liger on the module"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_step_with_liger_is_a_step_without(family, order, loss, monkeypatch):
    inputs = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in BATCH.to_model().items()}
    eager = tiny(family).to(DEVICE)
    expected = run(eager, inputs)

    if order == "liger, model, ours":
        apply_liger(family, loss)
        model = tiny(family).to(DEVICE)
    else:
        model = copy.deepcopy(eager)
    report = axo_flash.patch_model(model)
    if order != "liger, model, ours":
        apply_liger(family, loss, model if order == "ours, liger on the model" else None)
    rotated = []
    rope = MODULES[family].apply_rotary_pos_emb
    assert rope is liger.liger_rotary_pos_emb
    monkeypatch.setattr(MODULES[family], "apply_rotary_pos_emb", lambda *a, **k: rotated.append(1) or rope(*a, **k))

    model.zero_grad()
    out = model(**inputs)
    out.loss.backward()
    assert len(rotated) == 2 and sum(report.calls().values()) == 2
    assert (out.logits is None) is (loss == "fused_linear_cross_entropy")  # Liger's loss really ran
    assert abs(out.loss - expected[1]) < 2e-5 * expected[1]
    distances = {name: _distance(p.grad, expected[2][name]) for name, p in model.named_parameters()}
    assert max(distances.values()) < 2e-5, distances


def test_unpatching_leaves_liger_in_place():
    model = tiny("llama").to(DEVICE)
    report = axo_flash.patch_model(model)
    apply_liger("llama", "fused_linear_cross_entropy", model)
    inputs = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in BATCH.to_model().items()}
    expected = model(**inputs).loss
    report.undo()
    out = model(**inputs)
    assert out.logits is None and abs(out.loss - expected) < 2e-5 * expected
    assert type(model.model.layers[0].self_attn) is modeling_llama.LlamaAttention
