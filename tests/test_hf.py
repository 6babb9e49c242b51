"""`attn_implementation="axo_fa"` for those who choose attention by name: families that it serves, and those it refuses."""

import copy

import pytest
import torch
from hf_models import PAD, VOCAB, assert_same_step, batch_of, run, run_alone, tiny, with_cu_seqlens
from transformers import AutoConfig, AutoModelForCausalLM, DataCollatorWithFlattening
from transformers.masking_utils import create_causal_mask

import axo_flash.hf
from axo_flash.hf import NAME

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"n_embd": 48, "n_head": 6, "n_layer": 2, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "mixtral": {"sliding_window": 6, "num_local_experts": 2},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},  # a layer of each kind
    "qwen3": {},
    "gemma": {},
    "gemma2": {"sliding_window": 6, "attn_logit_softcapping": 2.0},
    "gemma3_text": {"sliding_window": 6},
    "phi3": {},
    "smollm3": {},
    "gpt2": GPT2,
    "gpt_oss": {"sliding_window": 6, "num_local_experts": 2, "num_experts_per_tok": 1},
}


def pair(family: str, **changes):
    """(a random model of `family` with eager attention, the same one made with our name)."""
    config = AutoConfig.for_model(family, **{**SIZES, **changes})
    torch.manual_seed(0)
    eager = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    named = AutoModelForCausalLM.from_config(config, attn_implementation=NAME).eval()
    named.load_state_dict(eager.state_dict())
    return eager, named


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_computes_as_with_eager_attention(family):
    eager, named = pair(family, **FAMILIES[family])
    padded = batch_of([[8], [13]], [(5, 0), (0, 0)])
    packed = batch_of([[9, 1, 7], [4, 13]])
    before = sum(axo_flash.hf.calls.values())
    assert_same_step(run(named, padded.to_model()), run(eager, padded.to_model()), padded.real, 1e-4)
    expected = run_alone(eager, packed)
    for batch in (packed, with_cu_seqlens(packed)):
        assert_same_step(run(named, batch.to_model()), expected, packed.real, 1e-4)
    assert sum(axo_flash.hf.calls.values()) - before == 3 * 2
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": PAD}
    tokens = [model.generate(**padded.inputs, **options) for model in (eager, named)]
    assert torch.equal(*tokens)


@pytest.mark.parametrize("flash_attn_kwargs", [False, True])
def test_the_flattening_collator_of_transformers(flash_attn_kwargs):
    eager, named = pair("mistral", sliding_window=6)
    documents = [{"input_ids": torch.randint(3, VOCAB, (n,)).tolist()} for n in (9, 1, 7)]
    flat = dict(DataCollatorWithFlattening(return_flash_attn_kwargs=flash_attn_kwargs)(documents))
    assert flat["input_ids"].shape == (1, 17) and ("cu_seq_lens_q" in flat) is flash_attn_kwargs
    with torch.no_grad():
        got = named(**flat).logits[0]
        alone = [eager(torch.tensor([document["input_ids"]])).logits[0] for document in documents]
    torch.testing.assert_close(got, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_every_way_to_choose_an_attention(tmp_path):
    eager = tiny("mistral")
    eager.save_pretrained(tmp_path)
    ids = torch.arange(3, 14)[None]
    expected = run(eager, {"input_ids": ids, "labels": ids})
    models = [
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=NAME),
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path), attn_implementation=NAME),
        AutoModelForCausalLM.from_pretrained(tmp_path),
    ]
    models[1].load_state_dict(eager.state_dict())
    models[2].set_attn_implementation(NAME)
    for model in models:
        before = axo_flash.hf.calls["reference"]
        got = run(model, {"input_ids": ids, "labels": ids})
        assert axo_flash.hf.calls["reference"] - before == 2
        assert_same_step(got, expected, torch.ones_like(ids, dtype=torch.bool))


# --- what it cannot compute is refused, not computed otherwise --------------------------------------------------------


@pytest.mark.parametrize(
    "family, changes, message",
    [
        ("llama4_text", {"attention_chunk_size": 4, "num_local_experts": 2}, r"chunked.*attention_chunk_size=4"),
        ("bart", {"d_model": 48, "encoder_layers": 1, "decoder_layers": 1}, "causal masks"),
        # these take any name and go on with attention of their own, without a causal mask
        ("bloom", {"n_head": 6, "n_layer": 2}, "BloomModel computes attention of its own.*use 'eager'"),
        ("xglm", {"d_model": 48, "attention_heads": 6, "num_layers": 1, "ffn_dim": 64}, "XGLMModel computes attention"),
    ],
)
def test_a_family_that_cannot_be_served_is_refused(family, changes, message):
    _, named = pair(family, **changes)
    with pytest.raises(ValueError, match=f"axo_fa.*{message}"):
        named.train()(torch.arange(3, 14)[None])


@pytest.mark.parametrize("family", ["persimmon", "gpt_bigcode"])
def test_packed_rows_of_a_model_that_does_not_tell_its_attention_are_refused(family):
    eager, named = pair(family, **(GPT2 if family == "gpt_bigcode" else {}))
    packed = batch_of([[9, 1, 7], [4, 13]])
    with pytest.raises(ValueError, match=r"is not handed the position_ids.*pass cu_seq_lens_q"):
        named(**packed.to_model())
    packed_and_told = with_cu_seqlens(packed)
    assert_same_step(run(named, packed_and_told.to_model()), run_alone(eager, packed), packed.real, 1e-4)


def test_blocks_that_see_both_ways_are_refused():
    """As images do in Gemma 3: no argument of the mask function says so, but the function that it is handed."""
    _, named = pair("llama")
    sizes = {"config": named.config, "inputs_embeds": torch.zeros(1, 6, 48), "attention_mask": None}
    sizes |= {"past_key_values": None, "position_ids": torch.arange(6)[None]}
    text, image = torch.full((1, 6), -1), torch.tensor([[-1, 0, 0, 0, -1, -1]])
    assert create_causal_mask(**sizes, block_sequence_ids=text).all()
    with pytest.raises(ValueError, match="use 'sdpa' for other masks"):
        create_causal_mask(**sizes, block_sequence_ids=image)
