"""FLOPs against brute force and against PyTorch's own counter."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from axo_flash import metrics


@pytest.mark.parametrize("seqlen", [0, 1, 3, 17, 64])
@pytest.mark.parametrize("window", [None, 1, 5, 64, 100])
def test_visible_pairs_is_the_area_of_the_mask(seqlen, window):
    mask = [[k <= q and (window is None or q - k < window) for k in range(seqlen)] for q in range(seqlen)]
    assert metrics.visible_pairs(seqlen, window=window) == sum(map(sum, mask))


def test_visible_pairs_without_causality():
    assert metrics.visible_pairs(7, causal=False) == 49
    with pytest.raises(ValueError, match="window"):
        metrics.visible_pairs(7, causal=False, window=2)


def test_packed_documents_cost_what_they_cost_alone():
    lengths = [5, 17, 1, 40]
    alone = sum(metrics.attention_flops([n], 4, 16) for n in lengths)
    assert metrics.attention_flops(lengths, 4, 16) == alone
    assert metrics.attention_flops([sum(lengths)], 4, 16) > alone
    assert metrics.attention_flops(lengths, 4, 16, backward=True) == 2 * alone


def tiny_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, attn_implementation="eager",
    )  # fmt: skip
    return LlamaForCausalLM(config)


def counted_flops(model: torch.nn.Module, seqlen: int) -> int:
    ids = torch.arange(seqlen)[None] % 50
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return counter.get_total_flops()


def test_step_cost_of_full_training_is_what_pytorch_counts():
    model, seqlen = tiny_llama(), 24
    # eager attention computes all pairs, masked ones too; some versions count the rotary angles as a (tiny) product
    cost = metrics.step_cost(model).flops(seqlen, seqlen * seqlen)
    assert cost == pytest.approx(counted_flops(model, seqlen), rel=1e-4)


def test_step_cost_of_lora_is_what_pytorch_counts():
    model, seqlen = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules="all-linear")), 24
    model.enable_input_require_grads()  # as checkpointing does: the first layer computes its input's gradient
    cost = metrics.step_cost(model).flops(seqlen, seqlen * seqlen)
    assert cost == pytest.approx(counted_flops(model, seqlen), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("Tesla T4", 65.1),
        ("A card of next year", None),
    ],
)
def test_peak_of_known_gpus(name, peak):
    assert metrics.peak_tflops(name) == peak


def test_mfu():
    assert metrics.mfu(989.4e12, 2.0, "NVIDIA H200") == pytest.approx(0.5)
    assert metrics.mfu(1e12, 1.0, None) is None
    assert metrics.mfu(1e12, 1.0, "A card of next year") is None


def test_peak_memory_is_this_process_at_least():
    count, kind = metrics.peak_memory_bytes()
    assert count > 50 << 20
    assert "memory" in kind
