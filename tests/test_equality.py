"""A patched model against the same model with eager attention: logits, loss and every gradient."""

import copy

import pytest
import torch
from hf_models import (
    KINDS,
    Batch,
    assert_same_step,
    batch_of,
    patched_copy,
    run,
    run_alone,
    smollm2_directory,
    tiny,
    with_cu_seqlens,
    with_mask_of_ones,
)

import axo_flash.attention

PACKED = batch_of([[9, 1, 7]])
PACKED_TWO_ROWS = batch_of([[9, 1, 7], [4, 13]])
PADDED = {
    "left-padded": batch_of([[8], [13]], [(5, 0), (0, 0)]),
    "right-padded": batch_of([[8], [13]], [(0, 5), (0, 0)]),
    "padded on both sides": batch_of([[8], [11]], [(3, 2), (0, 2)]),
}
AS_EAGER = {"plain": batch_of([[17], [17]]), "one-token documents": batch_of([[1, 1, 5]]), **PADDED}
AS_EAGER |= {"packed": PACKED, "packed, two rows": PACKED_TWO_ROWS}
AS_DOCUMENTS = {  # what eager attention does not keep apart, or cannot be told
    **AS_EAGER,
    "packed, cu_seqlens": with_cu_seqlens(PACKED),
    "packed, two rows, cu_seqlens": with_cu_seqlens(PACKED_TWO_ROWS),
    "packed, mask of ones": with_mask_of_ones(PACKED_TWO_ROWS),
    "packed and padded": batch_of([[9, 1, 7], [4, 8]], [(0, 0), (0, 5)]),
    "packed and left-padded": batch_of([[9, 1, 7], [4, 8]], [(0, 0), (5, 0)]),
}


@pytest.fixture(scope="module", params=KINDS)
def models(request):
    """(a model with eager attention, its patched copy)."""
    model = tiny(request.param)
    return model, patched_copy(model)[0]


@pytest.mark.parametrize("case", AS_EAGER)
def test_as_eager_attention(models, case):
    eager, patched = models
    batch = AS_EAGER[case]
    assert_same_step(run(patched, batch.to_model()), run(eager, batch.to_model()), batch.real)


@pytest.mark.parametrize("case", AS_DOCUMENTS)
def test_as_each_document_alone(models, case):
    eager, patched = models
    batch = AS_DOCUMENTS[case]
    assert_same_step(run(patched, batch.to_model()), run_alone(eager, batch), batch.real)


def test_packing_is_found_although_a_cache_is_made(models):
    eager, patched = models
    inputs = {**PACKED_TWO_ROWS.to_model(), "use_cache": True}
    assert_same_step(run(patched, inputs), run_alone(eager, PACKED_TWO_ROWS), PACKED_TWO_ROWS.real)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("case", ["plain", "left-padded", "packed, two rows", "packed, cu_seqlens"])
def test_gradient_checkpointing(models, case, use_reentrant):
    eager, patched = models[0], copy.deepcopy(models[1]).train()
    patched.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    patched.enable_input_require_grads()
    before = sum(axo_flash.ops.calls.values())
    batch = AS_DOCUMENTS[case]
    assert_same_step(run(patched, batch.to_model()), run_alone(eager, batch), batch.real)
    assert sum(axo_flash.ops.calls.values()) - before == 2 * 2  # layers, once more in the backward


@pytest.mark.parametrize("given", [with_cu_seqlens, with_mask_of_ones, lambda batch: batch])
def test_nothing_leaks_between_documents(models, given):
    """Other tokens in one document do not change another's logits by one bit, nor do they reach its gradient."""
    patched = models[1]
    batch = given(PACKED_TWO_ROWS)
    changed = batch.inputs["input_ids"].clone()
    changed[0, :9] = (changed[0, :9] + 1) % 50 + 3
    with torch.no_grad():
        before = patched(**batch.inputs, use_cache=False).logits
        after = patched(**{**batch.inputs, "input_ids": changed}, use_cache=False).logits
    assert not torch.equal(before[0, :9], after[0, :9])
    assert torch.equal(before[0, 9:], after[0, 9:]) and torch.equal(before[1], after[1])

    embedded = patched.get_input_embeddings()(batch.inputs["input_ids"]).detach().requires_grad_()
    inputs = {name: value for name, value in batch.inputs.items() if name != "input_ids"}
    patched(inputs_embeds=embedded, use_cache=False, **inputs).logits[0, 9:].square().sum().backward()
    assert embedded.grad[0, 9:].abs().amax() > 0
    assert not embedded.grad[0, :9].any() and not embedded.grad[1].any()


@pytest.mark.parametrize(
    "kind, case", [("llama", "packed, two rows"), ("mistral", "packed, two rows"), ("mistral", "left-padded")]
)
def test_loss_curve_of_thirty_steps(kind, case):
    batch = AS_EAGER[case]
    eager = tiny(kind)
    curves = []
    for model in (eager, patched_copy(eager)[0]):
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for _ in range(30):
            loss = model(**batch.to_model()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        curves.append(torch.tensor(losses))
    assert curves[0][-1] < curves[0][0] / 3
    torch.testing.assert_close(curves[1], curves[0], rtol=0, atol=1e-5)


def test_bfloat16_is_as_near_to_fp32_as_eager_attention(models):
    """Error against fp32 at most 2x that of eager attention in bf16."""
    eager = copy.deepcopy(models[0]).to(torch.bfloat16)
    patched, _ = patched_copy(eager, backend="reference")
    with torch.no_grad():
        exact = models[0](**PACKED.inputs, use_cache=False).logits
        errors = [(m(**PACKED.inputs, use_cache=False).logits - exact).square().mean().sqrt() for m in (patched, eager)]
    assert errors[0] < 2 * errors[1]


def test_rows_of_a_batch_do_not_depend_on_their_neighbours(models):
    patched = models[1]
    batch = AS_DOCUMENTS["packed and padded"]
    with torch.no_grad():
        both = patched(**batch.inputs, use_cache=False).logits
        for row in range(2):
            alone = patched(**{k: v[row : row + 1] for k, v in batch.inputs.items()}, use_cache=False).logits
            torch.testing.assert_close(both[row][batch.real[row]], alone[0][batch.real[row]], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mistral", "mistral_window"])
def test_smollm2(family):
    """The same on real weights: SmolLM2 loaded as Llama and, which they fit as well, as Mistral."""
    from transformers import AutoTokenizer, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    directory = smollm2_directory()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    eager = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    if family != "llama":
        values = eager.config.to_dict()
        names = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "rope_parameters",
            "tie_word_embeddings",
            "rms_norm_eps",
        )
        config = MistralConfig(
            **{name: values[name] for name in names},
            max_position_embeddings=512,
            sliding_window=16 if family == "mistral_window" else None,
        )
        mistral = MistralForCausalLM._from_config(config, attn_implementation="eager", dtype=torch.float32)
        missing, unexpected = mistral.load_state_dict(eager.state_dict(), strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}
        mistral.tie_weights()
        eager = mistral
    eager.train()
    documents = [
        tokenizer(text).input_ids
        for text in (
            "The capital of France is Paris, and its river is the Seine, which the city has followed ever since.",
            "One two three four five six seven eight nine ten.",
            "A cat sat on a mat.",
        )
    ]
    packed = batch_of([[len(document) for document in documents]])
    packed.inputs["input_ids"] = torch.tensor([[token for document in documents for token in document]])
    packed.labels[packed.labels != -100] = packed.inputs["input_ids"][packed.labels != -100]
    length = max(len(document) for document in documents)
    padded = batch_of([[len(d)] for d in documents], [(length - len(d), 0) for d in documents])
    for row, document in enumerate(documents):
        padded.inputs["input_ids"][row, length - len(document) :] = torch.tensor(document)
        padded.labels[row, length - len(document) + 1 :] = torch.tensor(document[1:])
    assert packed.documents[0][2] > 16  # longer than the window
    expected = [_step(eager, packed), _step(eager, padded)]
    report = axo_flash.patch_model(eager)
    assert (report.family, report.layers) == (family.partition("_")[0], 30)
    for batch, step in zip((packed, padded), expected, strict=True):
        assert_same_step(_step(eager, batch), step, batch.real, tolerance=2e-4)
    report.undo()
    assert all(map(torch.equal, _step(eager, packed)[2].values(), expected[0][2].values()))


def _step(model, batch: Batch):
    """`run` with the gradients of attention's own weights, first and last layer: those that a wrong mask changes."""
    logits, loss, gradients = run(model, batch.to_model())
    wanted = (".layers.0.self_attn.", ".layers.29.self_attn.")
    return logits, loss, {name: g for name, g in gradients.items() if any(part in name for part in wanted)}
