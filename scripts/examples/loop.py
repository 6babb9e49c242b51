"""A loop of plain PyTorch over padded batches; the model is patched for its length alone.

python scripts/examples/loop.py --data texts.jsonl    # a line: {"text": "..."}
"""

import argparse
import json
from itertools import cycle, islice
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import axo_flash

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="mistralai/Mistral-7B-v0.1")
parser.add_argument("--data", required=True)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--output", default="runs/loop")
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(args.model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(args.model).to(device).train()
model.gradient_checkpointing_enable()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

texts = [json.loads(line)["text"] + tokenizer.eos_token for line in Path(args.data).read_text().splitlines()]
batches = DataLoader(texts, batch_size=4, shuffle=True)

with axo_flash.patched(model) as report:  # <- the one line
    for step, texts in enumerate(islice(cycle(batches), args.steps), start=1):
        batch = tokenizer(texts, padding=True, truncation=True, max_length=2048, return_tensors="pt").to(device)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.4f}")

model.save_pretrained(args.output)
tokenizer.save_pretrained(args.output)
print(f"attention of {report.layers} layers, calls by backend: {report.calls()}")
