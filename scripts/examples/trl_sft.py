"""TRL's SFTTrainer: LoRA, documents packed into rows of max_length.

    pip install trl
    python scripts/examples/trl_sft.py --data texts.jsonl    # a line: {"text": "..."}, or {"messages": [...]}

TRL hands packed rows over as position_ids that restart, without a mask, and ours keeps the documents apart by them. TRL
1.9 warns that it does not know our attention for one that does (1.16 no longer); no document sees another all the same.
Leave packing_strategy at "bfd": "wrapped" forgets where documents begin, whatever computes the attention.
"""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

import axo_flash

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="mistralai/Mistral-7B-v0.1")
parser.add_argument("--data", required=True)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--output", default="runs/trl")
args = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(args.model)
report = axo_flash.patch_model(model)  # <- the one line

trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir=args.output,
        max_steps=args.steps,
        max_length=2048,
        packing=True,
        per_device_train_batch_size=2,
        learning_rate=2e-4,
        bf16=torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=load_dataset("json", data_files=args.data, split="train"),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
trainer.save_model()
print(f"attention of {report.layers} layers, calls by backend: {report.calls()}")
