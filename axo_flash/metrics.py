"""What a training step costs and how fast it went: attention and model FLOPs, tokens/s, MFU, peak memory.

Counting follows the PaLM paper (appendix B) with exact masks: a multiply-add is two operations, recomputation (flash
attention's backward, gradient checkpointing) is not counted, and only query-key pairs that the mask lets through are.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

# Dense bf16 (fp16 before Ampere) tensor-core peak with fp32 accumulation in TFLOP/s, from the vendors' data sheets.
# First match wins, so the special form of a card stands before the plain one.
PEAK_TFLOPS: tuple[tuple[str, float], ...] = (
    (r"B200|GB200", 2250.0),
    (r"H100 NVL", 835.0),
    (r"H100 PCIe", 756.0),
    (r"H200|H100|GH200", 989.4),
    (r"H20\b", 148.0),
    (r"H800", 989.4),
    (r"A100|A800", 312.0),
    (r"A30\b", 165.0),
    (r"A40\b", 149.7),
    (r"A10G", 70.0),
    (r"A10\b", 125.0),
    (r"L40S", 362.0),
    (r"L40\b", 181.0),
    (r"L4\b", 121.0),
    (r"RTX 6000 Ada", 364.2),
    (r"RTX A6000", 154.8),
    (r"RTX 5090", 209.5),
    (r"RTX 4090", 165.2),
    (r"RTX 3090", 71.2),
    (r"V100", 125.0),
    (r"T4\b", 65.1),
    (r"MI300X", 1307.4),
    (r"MI250X", 383.0),
)


def visible_pairs(seqlen: int, causal: bool = True, window: int | None = None) -> int:
    """How many (query, key) pairs the mask of one document of `seqlen` tokens lets through.

    `window` is the number of keys that a query sees, its own among them (Hugging Face's ``sliding_window``).
    """
    if not causal:
        if window is not None:
            raise ValueError("a window is counted for causal attention only")
        return seqlen * seqlen
    width = seqlen if window is None else min(window, seqlen)
    # the first `width` queries see 1, 2, ... width keys, the others `width`
    return width * (width + 1) // 2 + (seqlen - width) * width


def attention_flops(
    lengths: Iterable[int],
    num_heads: int,
    head_dim: int,
    *,
    causal: bool = True,
    window: int | None = None,
    backward: bool = False,
) -> int:
    """FLOPs of one attention layer over documents of these lengths (packed or not: no pair crosses a border).

    Forward: two products (q k^T and p v) of ``2 * head_dim`` a pair and head. Backward alone: four (dv, dp, dq, dk).
    """
    pairs = sum(visible_pairs(length, causal, window) for length in lengths)
    return (8 if backward else 4) * pairs * num_heads * head_dim


@dataclass(frozen=True)
class StepCost:
    """What one training token and one visible pair cost in a model, in FLOPs, forward and backward together."""

    per_token: float
    per_pair: float

    def flops(self, tokens: int, pairs: int) -> float:
        """FLOPs of a training step over `tokens` tokens whose mask lets `pairs` (query, key) pairs through."""
        return self.per_token * tokens + self.per_pair * pairs


def step_cost(model: Any) -> StepCost:
    """The cost of training `model` (a Hugging Face Llama or Mistral, PEFT-wrapped or not).

    Every linear layer costs ``2 * in * out`` a token forward, as much for the gradient of its input and, if its weight
    is trained, as much again: so a LoRA step is two thirds of a full one. Embedding look-ups are free.
    """
    import torch

    per_token = 0.0
    for module in model.modules():
        # 4-bit and 8-bit layers are subclasses; PEFT's LoRA layers hold theirs as children (base_layer, lora_A, lora_B)
        if isinstance(module, torch.nn.Linear):
            per_token += 2.0 * module.in_features * module.out_features * (2 + module.weight.requires_grad)
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return StepCost(per_token, 12.0 * config.num_hidden_layers * config.num_attention_heads * head_dim)


def peak_tflops(device_name: str) -> float | None:
    """The dense bf16 peak of a GPU by its CUDA name in TFLOP/s, or None if we do not know it."""
    return next((peak for pattern, peak in PEAK_TFLOPS if re.search(pattern, device_name)), None)


def mfu(flops: float, seconds: float, device_name: str | None) -> float | None:
    """Model FLOPs utilisation, 0 to 1: achieved over peak. None on a device whose peak we do not know."""
    peak = peak_tflops(device_name) if device_name else None
    if peak is None or seconds <= 0:
        return None
    return flops / seconds / (peak * 1e12)


def device_name() -> str | None:
    """The name of the GPU that training would use, or None on a CPU."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def peak_memory_bytes() -> tuple[int, str]:
    """The most memory used so far and what was measured: tensors on the GPU, or else this process's resident set."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated(), "GPU memory allocated"
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (peak if sys.platform == "darwin" else peak * 1024), "resident memory of the process"


def reset_peak_memory() -> None:
    """Start a new measurement of the GPU's peak (a process's own peak cannot be reset)."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf
