"""A place to run Axolotl in: tiny models and rows on disk, YAMLs for them, and Axolotl's output read."""

import ast
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tiny_run
import yaml
from run_configs import MARK

PLUGIN = "axo_flash.integrations.axolotl.AxoFlashPlugin"
HERE = Path(__file__).parent
ENVIRONMENT = {
    "AXOLOTL_DO_NOT_TRACK": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "ACCELERATE_USE_CPU": "true",
    "CUDA_VISIBLE_DEVICES": "",
    "TRITON_INTERPRET": "0",
    "WANDB_MODE": "disabled",
    "PYTHONPATH": os.pathsep.join([str(HERE.parent.parent), str(HERE)]),
}
KEYS = {
    "dataset_num_proc": 1,
    "sequence_len": 192,
    "sample_packing": True,
    "pad_to_sequence_len": True,
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "max_steps": 3,
    "val_set_size": 0,
    "optimizer": "adamw_torch",
    "lr_scheduler": "constant",
    "learning_rate": 5e-3,
    "warmup_steps": 0,
    "bf16": False,
    "tf32": False,
    "seed": 7,
    "logging_steps": 1,
    "save_strategy": "no",
    "lora_mlp_kernel": False,  # these four are Triton kernels, which Axolotl turns on without a GPU too
    "lora_qkv_kernel": False,
    "lora_o_kernel": False,
    "lora_embedding_kernel": False,
}


@dataclass
class Output:
    """What a run of Axolotl printed, and how it ended."""

    text: str
    ended: str = "well"

    def logged(self, *names: str) -> list[tuple[str, ...]]:
        """The values that Axolotl printed under all of these names, in order, with the digits that it printed."""
        rows = [ast.literal_eval(row) for row in re.findall(r"\{'(?:loss|eval_loss)'.*?\}", self.text)]
        return [tuple(row[name] for name in names) for row in rows if set(names) <= set(row)]

    def says(self) -> list[str]:
        """The lines of the plugin in Axolotl's log."""
        return re.findall(r"\[axolotl\.axo_flash\] axo_flash: (.*?)\s*(?:\x1b|$)", self.text, re.MULTILINE)


class Bench:
    """A directory with tiny models and rows, where Axolotl runs."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.chats = tiny_run.write_chats(directory / "chats.jsonl", 120)

    def model(self, family: str, **changes) -> Path:
        """A tiny model of the family; the same one at every call."""
        path = self.directory / f"tiny-{family}"
        return path if path.exists() else tiny_run.write_model(path, family, **changes)

    def write(self, name: str, family: str = "llama", **changes) -> Path:
        """A YAML for Axolotl. None removes a key; plugins: true is ours alone."""
        changes = {"plugins": [PLUGIN]} | changes
        keys = KEYS | {
            "base_model": str(self.model(family, **({"sliding_window": 32} if family == "mistral" else {}))),
            "datasets": [{"path": str(self.chats), "ds_type": "json", "type": "chat_template"}],
            "dataset_prepared_path": str(self.directory / "prepared" / name),
            "output_dir": str(self.directory / "out" / name),
        }
        path = self.directory / f"{name}.yml"
        path.write_text(yaml.safe_dump({k: v for k, v in (keys | changes).items() if v is not None}, sort_keys=False))
        return path

    def run_all(self, *paths: Path, **environment: str) -> dict[str, Output]:
        """The output of every YAML, run one after another in one process, by the YAML's name."""
        text = self._call([sys.executable, str(HERE / "run_configs.py"), *map(str, paths)], **environment).stdout
        runs = re.findall(rf"{MARK} begins (.*?)\n(.*?)\n{MARK} ends (.*?)\n", text, re.DOTALL)
        assert len(runs) == len(paths), text[-5000:]
        return {Path(path).stem: Output(printed, ended) for path, printed, ended in runs}

    def train(self, path: Path) -> tuple[int, Output]:
        """The exit code and output of `axolotl train`."""
        axolotl = Path(sys.executable).with_name("axolotl")
        done = self._call([str(axolotl), "train", str(path), "--launcher", "python"])
        return done.returncode, Output(done.stdout)

    def _call(self, command: list[str], **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            command,
            env=os.environ | ENVIRONMENT | environment,
            cwd=self.directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=450,
        )
