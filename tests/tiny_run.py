"""A whole tiny run on disk: a random Llama or Mistral, a tokenizer, rows, and the YAML that ties them together."""

import json
import random
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = ["red", "green", "blue", "one", "two", "three", "sun", "moon", "star", "cat", "dog", "runs", "sleeps", "sings"]


def write_tokenizer(directory: Path) -> None:
    """A byte-level tokenizer (one token a byte) with a ChatML template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=TEMPLATE,
    ).save_pretrained(directory)


def write_model(directory: Path, family: str = "llama", **changes) -> Path:
    """A random two-layer model of `family` (GQA 4/2, head_dim 16) with its tokenizer; returns the directory."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": len(SPECIAL) + 256,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 4,
        "tie_word_embeddings": True,
    }
    config = AutoConfig.for_model(family, **(settings | changes))
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    write_tokenizer(directory)
    return directory


def write_chats(path: Path, rows: int = 60) -> Path:
    """`rows` conversations of differing lengths, the same at every call."""
    rng = random.Random(0)
    lines = []
    for _ in range(rows):
        messages = []
        for turn in range(2 * rng.randint(1, 3)):
            text = " ".join(rng.choices(WORDS, k=rng.randint(2, 6)))
            messages.append({"role": ("user", "assistant")[turn % 2], "content": text + ("?" if turn % 2 == 0 else "")})
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_yaml(directory: Path, family: str = "llama", **changes) -> Path:
    """The YAML of a short run in `directory`, its model and data beside it. None removes a key."""
    model = directory / f"tiny-{family}"
    if not model.exists():
        write_model(model, family)
    data = directory / "chats.jsonl"
    if not data.exists():
        write_chats(data)
    keys = {
        "base_model": str(model),
        "datasets": [{"path": str(data), "type": "chat_template"}],
        "dataset_prepared_path": str(directory / "prepared"),
        "dataset_num_proc": 1,
        "val_set_size": 8,
        "sequence_len": 256,
        "sample_packing": True,
        "adapter": "lora",
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_target_linear": True,
        "learning_rate": 5e-3,
        "max_steps": 4,
        "bf16": False,
        "optimizer": "adamw_torch",
        "logging_steps": 1,
        "save_strategy": "no",
        "eval_strategy": "no",
        "output_dir": str(directory / "out"),
    } | changes
    path = directory / "run.yml"
    path.write_text(yaml.safe_dump({key: value for key, value in keys.items() if value is not None}), encoding="utf-8")
    return path
