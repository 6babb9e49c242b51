"""A tiny run whose data are streamed: its shards, its keys, and what is compared."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny_run import write_chats

from axo_flash.data.streaming import STATE_FILE, shard_order

SHARDS = 5
KEYS = {
    "streaming": True,
    "val_set_size": None,
    "eval_strategy": None,
    "max_steps": 24,
    "save_strategy": None,
    "save_steps": 2,
    "save_total_limit": 20,
    "lora_dropout": 0.1,
    "gradient_accumulation_steps": 2,
}


def write_shards(folder: Path) -> Path:
    """The tiny run's 60 rows in five files."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = write_chats(folder / "all").read_text().splitlines(keepends=True)
    (folder / "all").unlink()
    for number in range(SHARDS):
        (folder / f"part-{number}.jsonl").write_text("".join(lines[number::SHARDS]))
    return folder


def weights(output: Path) -> dict[str, torch.Tensor]:
    """What the run has trained."""
    return load_file(output / "adapter_model.safetensors")


def same(one: dict, two: dict) -> bool:
    """Whether two runs ended with the same weights, to the bit."""
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def names_from(checkpoint: Path, seed: int = 42) -> list[str]:
    """The shards that are left in two epochs from a checkpoint on, the one that it is in first."""
    position = json.loads((checkpoint / STATE_FILE).read_text())["position"]
    order = [index for epoch in range(4) for index in shard_order(seed, epoch, SHARDS)]
    return [f"part-{index}.jsonl" for index in order[position["epoch"] * SHARDS + position["place"] :]]
