"""One LoRA step of a Llama-2-7B-shaped model, stock attention against ours, into results/training_<gpu>.csv.

    python scripts/bench/training.py [--commit $(git rev-parse --short HEAD)] [--out scripts/bench/results]

Random weights, LoRA r=16 on all seven projections, gradient checkpointing, 4 x 4096 tokens a step, bf16 autocast with
fp32 adapters as Trainer runs it, torch AdamW. Every stack starts from the same weights, adapters and tokens, so that the
losses must agree; tokens/s is of the median step.
"""

import argparse
import csv
import datetime
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import transformers
import triton
from peft import LoraConfig, get_peft_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

from axo_flash import metrics, patch_model
from axo_flash.bench import short_name

BATCH, SEQLEN, WARMUP, STEPS = 4, 4096, 2, 5
STACKS = ("hf+eager", "hf+sdpa-fa2", "hf+sdpa-cudnn", "axo_flash", "hf+sdpa-fa2", "hf+sdpa-cudnn", "axo_flash")
SDPA = {"hf+sdpa-fa2": SDPBackend.FLASH_ATTENTION, "hf+sdpa-cudnn": SDPBackend.CUDNN_ATTENTION}


def make_model(stack):
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=32000,
                hidden_size=4096,
                intermediate_size=11008,
                num_hidden_layers=32,
                num_attention_heads=32,
                max_position_embeddings=SEQLEN,
                use_cache=False,
            )
        )
    torch.set_default_dtype(torch.float32)
    model.set_attn_implementation("eager" if stack == "hf+eager" else "sdpa")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM"))
    if stack == "axo_flash":
        patch_model(model, "triton", dtype=torch.bfloat16)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def run(stack, profile=False):
    """(tokens/s of the median step, peak GiB, MFU, loss of the last step)"""
    model = make_model(stack)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    generator = torch.Generator("cuda").manual_seed(1)
    losses, times = [], []
    torch.cuda.reset_peak_memory_stats()

    def step():
        ids = torch.randint(0, 32000, (BATCH, SEQLEN), device="cuda", generator=generator)
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        losses.append(loss.item())

    for _ in range(WARMUP + STEPS):
        step()
    if profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            step()
        print(profiler.key_averages().table(sort_by="cuda_time_total", row_limit=16, max_name_column_width=60))
        del times[-1], losses[-1]
    seconds = sorted(times[WARMUP:])[STEPS // 2]
    flops = metrics.step_cost(model).flops(BATCH * SEQLEN, BATCH * metrics.visible_pairs(SEQLEN))
    mfu = metrics.mfu(flops, seconds, torch.cuda.get_device_name())
    return BATCH * SEQLEN / seconds, torch.cuda.max_memory_allocated() / 2**30, mfu, losses[-1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", default="")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--stacks", nargs="+", default=STACKS, help="in this order; a GPU warms up, so repeat them")
    parser.add_argument("--profile", action="store_true", help="print where the time of a step goes")
    args = parser.parse_args()
    rows = []
    for stack in args.stacks:
        with sdpa_kernel(SDPA[stack]) if stack in SDPA else nullcontext():
            tokens_per_s, peak_gib, mfu, loss = run(stack, args.profile)
        torch.cuda.empty_cache()
        print(f"{stack:10} {tokens_per_s:8.0f} tokens/s  {peak_gib:5.1f} GiB  loss {loss:.4f}", flush=True)
        rows.append(
            {
                "case": "llama2-7b-lora-4x4096",
                "stack": stack,
                "tokens_per_s": round(tokens_per_s),
                "peak_gib": round(peak_gib, 1),
                "mfu": mfu and round(mfu, 3),
                "loss": round(loss, 4),
                "gpu": torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "triton": triton.__version__,
                "transformers": transformers.__version__,
                "commit": args.commit,
                "date": datetime.date.today().isoformat(),
            }
        )
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / f"training_{short_name(torch.cuda.get_device_name())}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
