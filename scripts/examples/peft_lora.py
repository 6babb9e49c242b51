"""PEFT: a LoRA adapter in a loop of one's own, with attention chosen by name, then a few tokens from the adapted model.

    python scripts/examples/peft_lora.py --data texts.jsonl    # a line: {"text": "..."}

The name serves other families too: Qwen, Gemma, Phi, Mixtral, ...
"""

import argparse
import json
from itertools import cycle, islice
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorWithFlattening

import axo_flash.hf  # <- the one line: registers "axo_fa"

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="mistralai/Mistral-7B-v0.1")
parser.add_argument("--data", required=True)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--output", default="runs/peft")
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model, attn_implementation="axo_fa").to(device)
lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(model, lora).train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)

texts = [json.loads(line)["text"] + tokenizer.eos_token for line in Path(args.data).read_text().splitlines()]
rows = [{"input_ids": tokenizer(text, truncation=True, max_length=2048).input_ids} for text in texts]
flatten = DataCollatorWithFlattening(return_flash_attn_kwargs=True)  # four documents in one row, kept apart
batches = DataLoader(rows, batch_size=4, shuffle=True, collate_fn=flatten)

for step, batch in enumerate(islice(cycle(batches), args.steps), start=1):
    batch = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.4f}")

model.save_pretrained(args.output)
prompt = tokenizer(" ".join(texts[0].split()[:3]), return_tensors="pt").to(device)
tokens = model.eval().generate(input_ids=prompt.input_ids, attention_mask=prompt.attention_mask, max_new_tokens=20)
print(tokenizer.decode(tokens[0]))
print(f"attention calls by backend: {dict(axo_flash.hf.calls)}")
