"""All of Liger's kernels beside ours in bf16, as they run in training."""

import copy

import pytest
import torch
from hf_models import batch_of, run, tiny
from test_liger import apply_liger, undo_liger  # noqa: F401 (a fixture, and skips where there is no Liger)

import axo_flash

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm GPU")
BATCHES = {"plain": batch_of([[90], [90]]), "packed": batch_of([[40, 1, 49], [90]])}


@pytest.mark.parametrize("case", BATCHES)
@pytest.mark.parametrize("first", ["liger", "ours"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_step_in_bf16_is_as_near_to_fp32_as_eager_attentions(family, first, case):
    """The error of every gradient against fp32 is at most 3x that of plain transformers in bf16."""
    exact = tiny(family).cuda()
    eager = copy.deepcopy(exact).bfloat16()
    ours = copy.deepcopy(eager)
    inputs = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in BATCHES[case].to_model().items()}
    (_, loss, gradients), (_, _, eagers) = run(exact, inputs), run(eager, inputs)
    if first == "liger":
        apply_liger(family, "fused_linear_cross_entropy", ours)
    report = axo_flash.patch_model(ours, backend="triton")
    if first == "ours":
        apply_liger(family, "fused_linear_cross_entropy", ours)
    out = ours(**inputs)
    out.loss.backward()
    assert out.logits is None and report.calls() == {"triton": 2}
    assert abs(out.loss.float() - loss) < 0.01 * loss
    for name, parameter in ours.named_parameters():
        error, error_of_eager = ((g.float() - gradients[name]).norm() for g in (parameter.grad, eagers[name]))
        assert error < 3 * error_of_eager, name
