"""transformers' Trainer: all weights of a Llama or Mistral, documents end to end without padding.

python scripts/examples/trainer.py --data texts.jsonl    # a line: {"text": "..."}
"""

import argparse

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorWithFlattening, Trainer, TrainingArguments

import axo_flash

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="mistralai/Mistral-7B-v0.1")
parser.add_argument("--data", required=True)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--output", default="runs/trainer")
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model)
report = axo_flash.patch_model(model)  # <- the one line

rows = load_dataset("json", data_files=args.data, split="train")
rows = rows.map(
    lambda row: {"input_ids": tokenizer(row["text"] + tokenizer.eos_token, truncation=True, max_length=2048).input_ids},
    remove_columns=rows.column_names,
)
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=args.output,
        max_steps=args.steps,
        per_device_train_batch_size=8,
        learning_rate=1e-5,
        gradient_checkpointing=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=rows,
    processing_class=tokenizer,
    data_collator=DataCollatorWithFlattening(return_flash_attn_kwargs=True),  # eight documents in one row, kept apart
)
trainer.train()
trainer.save_model()
print(f"attention of {report.layers} layers, calls by backend: {report.calls()}")
