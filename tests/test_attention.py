"""The Hugging Face seam by itself: registration, masks, dtypes, refusals."""

import copy
import importlib

import pytest
import torch
from hf_models import PAD, VOCAB, assert_same_step, batch_of, patched_copy, run, tiny, with_cu_seqlens
from transformers import AutoModelForCausalLM

import axo_flash.attention
from axo_flash.attention import NAME, attention, attention_mask, register

IDS = torch.randint(3, VOCAB, (2, 11), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def seen(monkeypatch):
    """(function name, q's dtype, q's shape, options) of each call that reaches the public functions."""
    calls = []
    for name in ("flash_attn_func", "flash_attn_varlen_func"):
        original = getattr(axo_flash.attention, name)

        def spy(q, *args, _name=name, _original=original, **options):
            calls.append((_name, q.dtype, tuple(q.shape), options))
            return _original(q, *args, **options)

        monkeypatch.setattr(axo_flash.attention, name, spy)
    return calls


# --- the registered name --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("left", [0, 4])
def test_the_registered_name_works_without_patching(kind, left):
    eager = tiny(kind).eval()
    mask = torch.ones_like(IDS)
    mask[0, :left] = 0
    model = AutoModelForCausalLM.from_config(copy.deepcopy(eager.config), attn_implementation=register())
    model.load_state_dict(eager.state_dict())
    with torch.no_grad():
        got = model.eval()(IDS, attention_mask=mask).logits
        expected = eager(IDS, attention_mask=mask).logits
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)


def test_the_name_is_not_taken_for_the_flash_attn_package():
    from transformers.utils.generic import is_flash_attention_requested

    assert not is_flash_attention_requested(requested_attention_implementation=NAME)


# --- masks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seqlen", [5, 6, 7, 20])
def test_a_window_sees_as_many_keys_as_eager_attention(seqlen, seen):
    """sliding_window=W means W keys, the query's own included: flash-attn's (W - 1, 0). Neighbours are off by one."""
    from transformers.masking_utils import create_sliding_window_causal_mask

    eager = tiny("mistral")
    expected = create_sliding_window_causal_mask(
        config=eager.config,
        inputs_embeds=torch.zeros(1, seqlen, 48),
        attention_mask=None,
        past_key_values=None,
        position_ids=torch.arange(seqlen)[None],
    )
    expected = (expected[0, 0] == 0).float()  # [seqlen, seqlen]
    # with equal scores and one-hot values, the output is the row of the mask over the number of keys seen
    zeros = torch.zeros(1, 1, seqlen, seqlen)
    out, _ = attention(eager.model.layers[0].self_attn, zeros, zeros, torch.eye(seqlen)[None, None], sliding_window=6)
    assert seen[0][3]["window_size"] == (5, 0)
    torch.testing.assert_close(out[0, :, 0], expected / expected.sum(1, keepdim=True))


def test_a_mask_of_ones_takes_the_dense_path(seen):
    patched, _ = patched_copy(tiny("llama"))
    patched(IDS, attention_mask=torch.ones_like(IDS))
    patched(IDS)
    assert [call[0] for call in seen] == ["flash_attn_func"] * 4
    assert seen[0][2] == (2, 11, 6, 8)


def test_rows_of_packed_documents_become_one_varlen_call(seen):
    patched, _ = patched_copy(tiny("llama"))
    patched(**batch_of([[4, 7], [11]]).inputs, use_cache=False)
    assert [call[0] for call in seen] == ["flash_attn_varlen_func"] * 2
    assert seen[0][2] == (22, 6, 8)


def test_the_host_reads_the_batch_once_a_forward(monkeypatch):
    """Not once a layer: on a GPU each reading waits for the device."""
    reads = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: reads.append(1) or original(tensor))
    patched, _ = patched_copy(tiny("llama", num_hidden_layers=5))
    for batch in (batch_of([[4, 7], [11]]), batch_of([[4], [11]], [(7, 0), (0, 0)])):
        monkeypatch.setattr(axo_flash.layout, "_recent", type(axo_flash.layout._recent)(maxlen=4))
        reads.clear()
        with torch.no_grad():
            patched(**batch.inputs, use_cache=False)
        assert len(reads) - _reads_of_the_reference(patched, len(batch.documents)) == 1


def _reads_of_the_reference(model, documents: int) -> int:
    """The oracle walks through the sequences on the host; a kernel does not."""
    reads = []
    from axo_flash.kernels import reference

    original, torch.Tensor.tolist = torch.Tensor.tolist, lambda tensor: reads.append(1) or original(tensor)
    try:
        from axo_flash import flash_attn_varlen_func

        q = torch.zeros(documents, 1, 8)
        cu_seqlens = torch.arange(documents + 1, dtype=torch.int32)
        flash_attn_varlen_func(q, q, q, cu_seqlens, cu_seqlens, backend=reference.__name__.rpartition(".")[2])
    finally:
        torch.Tensor.tolist = original
    return len(reads) * model.config.num_hidden_layers


@pytest.mark.parametrize(
    "mask, message",
    [
        (torch.ones(2, 1, 11, 11, dtype=torch.bool), r"must be \(batch, seqlen\), got \(2, 1, 11, 11\)"),
        (torch.zeros(2, 1, 11, 11), r"must be \(batch, seqlen\), got \(2, 1, 11, 11\)"),
        (torch.ones(2, 5), "5 columns for 11 tokens"),
    ],
)
def test_masks_that_cannot_be_computed_are_refused(mask, message):
    patched, _ = patched_copy(tiny("llama"))
    with pytest.raises(ValueError, match=message):
        patched(IDS, attention_mask=mask)


def test_a_model_set_to_another_attention_is_told_so():
    patched, _ = patched_copy(tiny("llama"))
    patched.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="set to 'eager': set it to 'axo_fa'"):
        patched(IDS)


def test_padding_and_cu_seqlens_together_are_refused():
    patched, _ = patched_copy(tiny("llama"))
    packed = with_cu_seqlens(batch_of([[4, 7]]))
    mask = torch.ones(1, 11)
    patched(**packed.inputs, attention_mask=mask)
    mask[0, -1] = 0
    with pytest.raises(ValueError, match="two statements about one batch"):
        patched(**packed.inputs, attention_mask=mask)


def test_masks_of_other_kinds_are_refused():
    sizes = {"batch_size": 1, "q_length": 4, "kv_length": 4}
    with pytest.raises(ValueError, match="computes causal masks"):
        attention_mask(**sizes, use_vmap=True)  # a model's own mask function
    with pytest.raises(ValueError, match="computes causal masks"):
        attention_mask(**sizes, allow_is_bidirectional_skip=True)
    with pytest.raises(ValueError, match="no chunked attention"):
        attention_mask(**sizes, local_size=2, config=tiny("llama").config)


# --- dtypes ---------------------------------------------------------------------------------------------------------


class KbitLinear(torch.nn.Linear):
    """Computes in the dtype of its weight and gives back the dtype of its input, as bitsandbytes' layers do."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def test_fp32_inputs_of_k_bit_training_are_cast_to_the_models_dtype(seen):
    """prepare_model_for_kbit_training leaves norms, and with them q, k and v, in fp32."""
    eager = tiny("llama").to(torch.bfloat16)
    for module in eager.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = KbitLinear
        elif "RMSNorm" in type(module).__name__:
            module.float()
    eager.model.embed_tokens.float()
    patched, _ = patched_copy(eager, backend="reference")
    outputs = []
    hook = patched.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    with torch.no_grad():
        got, expected = patched(IDS).logits, eager(IDS).logits
    hook.remove()
    assert {call[1] for call in seen} == {torch.bfloat16}
    assert outputs[0].dtype == torch.float32  # what eager attention hands on as well
    assert (got - expected).float().norm() < 0.02 * expected.float().norm()


def test_quantized_weights_have_the_dtype_of_the_config():
    module = tiny("llama").model.layers[0].self_attn
    assert axo_flash.attention.weight_dtype(module) == torch.float32
    module.q_proj.weight = torch.nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    module.config.dtype = torch.bfloat16
    assert axo_flash.attention.weight_dtype(module) == torch.bfloat16


def test_autocast_decides_for_fp32_inputs(seen):
    module = tiny("llama").model.layers[0].self_attn
    q, kv = torch.zeros(1, 6, 4, 8), torch.zeros(1, 2, 4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = attention(module, q, kv, kv)
    attention(module, q, kv, kv)
    attention(module, q.bfloat16(), kv.bfloat16(), kv.bfloat16())
    assert [call[1] for call in seen] == [torch.bfloat16, torch.float32, torch.bfloat16]
    assert out.dtype == torch.float32


def test_q_k_and_v_are_views(monkeypatch):
    """Nothing is copied on the way in, and k and v are not repeated for their groups of heads."""
    pointers = []
    original = axo_flash.attention.flash_attn_func
    monkeypatch.setattr(
        axo_flash.attention,
        "flash_attn_func",
        lambda q, k, v, **o: pointers.extend(x.data_ptr() for x in (q, k, v)) or original(q, k, v, **o),
    )
    module = tiny("llama").model.layers[0].self_attn
    q, k, v = torch.randn(2, 6, 4, 8), torch.randn(2, 2, 4, 8), torch.randn(2, 2, 4, 8)
    out, weights = attention(module, q, k, v)
    assert pointers == [q.data_ptr(), k.data_ptr(), v.data_ptr()]
    assert out.shape == (2, 4, 6, 8) and weights is None


# --- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option, message",
    [
        ({"dropout": 1.0}, "dropout_p must be at least 0 and below 1, got 1.0"),
        ({"s_aux": torch.zeros(4)}, r"sinks must be floating point \(6,\), got torch.float32 \(4,\)"),
        ({"output_attentions": True}, "weights are never formed"),
        ({"cache": object()}, "paged caches"),
        ({"position_ids": torch.zeros(3, 1, 4)}, r"position_ids must be \(batch, seqlen\), got \(3, 1, 4\)"),
        ({"is_causal": False, "sliding_window": 4}, "sliding_window=4 needs causal"),
    ],
)
def test_unsupported_options_are_refused(option, message):
    module = tiny("llama").model.layers[0].self_attn
    q, kv = torch.zeros(1, 6, 4, 8), torch.zeros(1, 2, 4, 8)
    with pytest.raises(ValueError, match=message):
        attention(module, q, kv, kv, **option)


def eager_with(name: str, mask, **options):
    """transformers' own eager attention of a family, and ours, on the same inputs: outputs and all gradients."""
    eager = importlib.import_module(f"transformers.models.{name}.modeling_{name}").eager_attention_forward
    module = tiny("llama").model.layers[0].self_attn.eval()
    module.num_key_value_groups, module.sinks = 3, torch.nn.Parameter(torch.randn(6))
    generator = torch.Generator().manual_seed(2)
    shapes = (2, 6, 9, 8), (2, 2, 9, 8), (2, 2, 9, 8)
    inputs = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    causal = torch.ones(9, 9).tril().bool() if mask is None else torch.ones(9, 9).tril().bool() & mask[:, None, None]
    leaves = inputs
    if name == "gpt_oss":
        options, leaves = {"s_aux": module.sinks}, [*inputs, module.sinks]
    scores = torch.zeros(causal.shape).masked_fill(~causal, torch.finfo(torch.float32).min).expand(2, 1, 9, 9)
    real = torch.ones(2, 9, dtype=torch.bool) if mask is None else mask
    results = []
    for function, given in ((eager, scores), (attention, mask)):
        out, _ = function(module, *inputs, given, scaling=0.3, **options)
        results.append([out[real], *torch.autograd.grad(out[real].square().sum(), leaves)])
    return results


LEFT_PADDED = torch.tensor([[False] * 3 + [True] * 6, [True] * 9])


@pytest.mark.parametrize("mask", [None, LEFT_PADDED], ids=["plain", "left-padded"])
@pytest.mark.parametrize(("family", "options"), [("gemma2", {"softcap": 1.5}), ("gpt_oss", {})])
def test_softcap_and_sinks_are_the_families_own(family, options, mask):
    for want, got in zip(*eager_with(family, mask, **options), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mask", [None, LEFT_PADDED], ids=["plain", "left-padded"])
def test_dropout_is_that_of_the_weights(mask):
    """Averaged over many masks the output is the one without; a weight is dropped, or divided by 1 - p."""
    module = tiny("llama").model.layers[0].self_attn
    torch.manual_seed(0)
    q, k = torch.randn(2, 6, 9, 8), torch.randn(2, 2, 9, 8)
    v = torch.eye(9, 9).expand(2, 2, 9, 9)[..., :9]
    q, k = (torch.nn.functional.pad(x, (0, 1)) for x in (q, k))
    weights, _ = attention(module, q, k, v, mask)
    total = torch.zeros_like(weights)
    for _ in range(400):
        dropped, _ = attention(module, q, k, v, mask, dropout=0.25)
        ratio = (dropped / weights)[weights > 0]
        assert ((ratio - 1 / 0.75).abs() < 1e-4).logical_or(ratio == 0).all()
        total += dropped
    assert (total / 400 - weights).abs().max() < 5 * (0.25 / 0.75 / 400) ** 0.5


def test_is_causal_and_scaling_are_heard(seen):
    module = tiny("llama").model.layers[0].self_attn
    q, kv = torch.randn(1, 6, 4, 8), torch.randn(1, 2, 4, 8)
    attention(module, q, kv, kv, scaling=0.5, is_causal=False, softcap=None, tokenizer=None, num_items_in_batch=3)
    module.is_causal = False
    attention(module, q, kv, kv)
    attention(module, q, kv, kv, is_causal=True)
    assert [call[3]["causal"] for call in seen] == [False, False, True]
    assert seen[0][3]["softmax_scale"] == 0.5


@pytest.mark.parametrize("how", ["plain", "mask of ones", "left-padded", "packed, cu_seqlens"])
def test_compiles_without_a_graph_break(how):
    torch._dynamo.reset()
    patched, _ = patched_copy(tiny("mistral", num_hidden_layers=1))
    if how == "packed, cu_seqlens":
        inputs, real = with_cu_seqlens(batch_of([[4, 7]])).inputs, torch.ones(1, 11, dtype=torch.bool)
    else:
        mask = torch.ones_like(IDS)
        mask[0, : 4 if how == "left-padded" else 0] = 0
        ids = IDS.masked_fill(mask == 0, PAD)
        inputs = {"input_ids": ids} if how == "plain" else {"input_ids": ids, "attention_mask": mask}
        real = mask.bool()
    compiled = torch.compile(patched, fullgraph=True, backend="aot_eager")
    for model in (patched, compiled):
        model.zero_grad()
        logits = model(**inputs, use_cache=False).logits
        logits[real].square().mean().backward()
        result = [logits[real].detach(), *(p.grad.clone() for p in patched.parameters())]
        if model is patched:
            expected = result
    for got, want in zip(result, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_compiles_with_dynamic_shapes_and_gradient_checkpointing():
    torch._dynamo.reset()
    patched, _ = patched_copy(tiny("mistral").train())
    patched.gradient_checkpointing_enable({"use_reentrant": False})
    compiled = torch.compile(patched, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in ([[4, 7], [11]], [[5, 6, 2], [4, 9]]):
        batch = with_cu_seqlens(batch_of(rows))
        expected, got = (run(model, batch.to_model()) for model in (patched, compiled))
        gradients = {name.removeprefix("_orig_mod."): gradient for name, gradient in got[2].items()}
        assert_same_step((*got[:2], gradients), expected, batch.real)


def test_a_compiled_forward_finds_packed_rows(monkeypatch):
    """Once for all layers; one graph serves packed, padded and plain batches of its shape."""
    found = []
    original = axo_flash.layout._Tokens.document_lengths
    spy = lambda *args: found.append(1) or original(*args)  # noqa: E731
    monkeypatch.setattr(axo_flash.layout._Tokens, "document_lengths", spy)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    patched, _ = patched_copy(tiny("mistral"))
    compiled = torch.compile(patched, fullgraph=True, backend="aot_eager")
    one_graph = [batch_of([[9, 1, 7], [4, 13]]), batch_of([[17], [17]]), batch_of([[6, 11], [8, 9]])]
    one_graph[1].inputs["position_ids"] = torch.arange(17).repeat(2, 1)
    for batch in (*one_graph, batch_of([[9, 1, 7], [4, 8]], [(0, 0), (5, 0)])):  # packed and padded: another graph
        expected = run(patched, batch.to_model())
        found.clear()
        logits, loss, gradients = run(compiled, batch.to_model())
        assert len(found) == 1
        gradients = {name.removeprefix("_orig_mod."): gradient for name, gradient in gradients.items()}
        assert_same_step((logits, loss, gradients), expected, batch.real)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_without_fullgraph_too_the_graph_does_not_break_and_packed_rows_need_cu_seqlens():
    """The operator would break it there, and attending across documents in silence is worse than an error."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    patched, _ = patched_copy(tiny("llama", num_hidden_layers=1))
    compiled = torch.compile(patched, backend="aot_eager")
    packed = batch_of([[4, 7]])
    plain = {**packed.inputs, "position_ids": torch.arange(11)[None]}
    for inputs in (plain, with_cu_seqlens(packed).inputs):
        got, expected = (model(**inputs, use_cache=False).logits for model in (compiled, patched))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match=r"position_ids restart.*fullgraph=True, or also pass cu_seq_lens_q"):
        compiled(**packed.inputs, use_cache=False)
    assert not torch._dynamo.utils.counters["graph_break"]


def test_a_compiled_forward_refuses_to_go_on_from_packed_rows():
    """Nothing says which cached keys belong to which document, and attending to all of them would leak."""
    torch._dynamo.reset()
    module = tiny("llama").model.layers[0].self_attn
    step = lambda q, k, positions: attention(module, q, k, k, position_ids=positions)[0]  # noqa: E731
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    q, k = torch.randn(1, 6, 4, 8), torch.randn(1, 2, 6, 8)
    compiled(q, k, torch.arange(2, 6)[None])
    with pytest.raises(RuntimeError, match="position_ids restart among queries that also see cached keys"):
        compiled(q, k, torch.tensor([[4, 5, 0, 1]]))
