"""generate() of a patched model gives eager attention's tokens, with every cache and padding."""

import pytest
import torch
from hf_models import KINDS, PAD, VOCAB, patched_copy, smollm2_directory, tiny
from transformers import DynamicCache, StaticCache

import axo_flash

PROMPT = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(5))
PADDINGS = {"no padding": (0, 0), "left padding": (3, 0), "right padding": (0, 3)}
NEW_TOKENS = 6  # with the prompt, past the window of the Mistral model


@pytest.fixture(scope="module", params=KINDS)
def models(request):
    model = tiny(request.param).eval()
    return model, patched_copy(model)[0]


def generate(model, padding, **options):
    left, right = PADDINGS[padding]
    ids, mask = PROMPT.clone(), torch.ones_like(PROMPT)
    mask[0, :left] = 0
    mask[0, ids.shape[1] - right :] = 0
    ids[mask == 0] = PAD
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, **options}
    out = model.generate(ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **options)
    return out.sequences, torch.stack(out.logits, 1)


@pytest.mark.parametrize("padding", ["no padding", "left padding"])
@pytest.mark.parametrize(
    "options",
    [{}, {"cache_implementation": "static"}, {"use_cache": False}, {"num_beams": 3}],
    ids=["dynamic", "static", "no cache", "beams"],
)
def test_tokens_of_eager_attention(models, padding, options):
    """The dynamic and static caches of a Mistral model with a window are the sliding ones."""
    eager, patched = models
    tokens, logits = generate(patched, padding, **options)
    expected_tokens, expected_logits = generate(eager, padding, **options)
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "mistral_full"])
@pytest.mark.parametrize("static", [False, True])
def test_going_on_after_right_padding(kind, static):
    """The second turn of a chat whose first was padded on the right: padding stands between tokens of a row."""
    eager = tiny(kind).eval()
    patched, _ = patched_copy(eager)
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[0, 6:9] = mask[1, 8] = 0
    turns = [(PROMPT, slice(0, 9)), (PROMPT[:, :3], slice(9, 12)), (PROMPT[:, 3:4], slice(12, 13))]
    logits = []
    for model in (eager, patched):
        cache = StaticCache(config=model.config, max_cache_len=20) if static else DynamicCache(config=model.config)
        for ids, columns in turns:
            with torch.no_grad():
                inputs = {"attention_mask": mask[:, : columns.stop], "position_ids": (mask.cumsum(1) - 1)[:, columns]}
                out = model(ids, past_key_values=cache, **inputs).logits
            logits.append(out[mask[:, columns].bool()])
    for got, expected in zip(logits[3:], logits[:3], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_padding_inside_a_window_is_refused():
    """The window counts padded positions, which the kernels never see."""
    patched, _ = patched_copy(tiny("mistral", sliding_window=6).eval())
    with pytest.raises(ValueError, match=r"padding between tokens of a row.*window of 6.*pad on the left"):
        generate(patched, "right padding", use_cache=False)


@pytest.mark.parametrize(
    "make_cache",
    [
        lambda config: DynamicCache(config=config),
        lambda config: DynamicCache(),  # without the config, no layer of it slides
        lambda config: StaticCache(config=config, max_cache_len=32),
    ],
    ids=["dynamic", "dynamic without sliding", "static"],
)
@pytest.mark.parametrize("chunks", [[4, 5, 1, 3], [1, 1, 11]], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_prefill_in_chunks(models, make_cache, chunks, padded):
    """Several queries against a cache that already holds keys, with and without a mask, past the window."""
    ids = torch.cat([PROMPT, PROMPT.flip(1)], 1)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :2] = 0
    logits = []
    for model in models:
        cache, start, steps = make_cache(model.config), 0, []
        for length in chunks:
            end = start + length
            positions = (mask.cumsum(1) - 1).clamp_min(0)[:, start:end]
            inputs = {"attention_mask": mask[:, :end], "position_ids": positions} if padded else {}
            with torch.no_grad():
                steps.append(model(ids[:, start:end], past_key_values=cache, **inputs).logits)
            start = end
        logits.append(torch.cat(steps, 1)[mask[:, :start].bool()])
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("columns", [9, 12, 20])
def test_right_padding_everywhere_in_a_static_cache(columns):
    """No row ends with a token, and the cache has an empty tail, which the mask may cover: the queries are found."""
    eager = tiny("llama").eval()
    patched, _ = patched_copy(eager)
    mask = torch.ones_like(PROMPT)
    mask[0, 5:] = mask[1, 7:] = 0
    logits = []
    for model in (eager, patched):
        with torch.no_grad():
            cache = StaticCache(config=model.config, max_cache_len=20)
            wide = torch.nn.functional.pad(mask, (0, columns - 9))
            logits.append(model(PROMPT, attention_mask=wide, past_key_values=cache).logits[mask.bool()])
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_static_cache_decoding_compiles_without_a_graph_break(kind):
    eager = tiny(kind, num_hidden_layers=1).eval()
    patched, _ = patched_copy(eager)
    torch._dynamo.reset()
    compiled = torch.compile(patched, fullgraph=True, backend="aot_eager")
    mask = torch.ones_like(PROMPT)
    mask[0, :3] = 0
    logits = []
    for prefill, decode in ((eager, eager), (patched, compiled)):
        cache = StaticCache(config=eager.config, max_cache_len=20)
        with torch.no_grad():
            prefill(PROMPT, attention_mask=mask, past_key_values=cache)
            longer = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
            positions = longer.sum(1, keepdim=True) - 1
            out = decode(PROMPT[:, :1], attention_mask=longer, position_ids=positions, past_key_values=cache)
        logits.append(out.logits)
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)


def test_going_on_from_packed_rows_is_refused(models):
    patched = models[1]
    cache = DynamicCache()
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    with torch.no_grad():
        patched(PROMPT[:1], position_ids=positions, past_key_values=cache)
        with pytest.raises(ValueError, match="cache was filled with packed rows"):
            patched(PROMPT[:1, :1], past_key_values=cache)
        with pytest.raises(ValueError, match="9 queries see 11 keys, and position_ids restart"):
            cache = DynamicCache()
            patched(PROMPT[:1, :2], past_key_values=cache)
            patched(PROMPT[:1], position_ids=positions, past_key_values=cache)


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_smollm2_answers_as_with_eager_attention(cache):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = smollm2_directory()
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    questions = ["What is the capital of France?", "Name three colours of the rainbow, please, and nothing else."]
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        for question in questions
    ]
    inputs = tokenizer(chats, return_tensors="pt", padding=True)
    options = {"max_new_tokens": 10, "do_sample": False}
    options |= {} if cache == "dynamic" else {"cache_implementation": cache}
    expected = model.generate(**inputs, **options)
    axo_flash.patch_model(model)
    got = model.generate(**inputs, **options)
    assert torch.equal(got, expected)
    assert "Paris" in tokenizer.decode(got[0, inputs["input_ids"].shape[1] :])
