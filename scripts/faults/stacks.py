"""The two stacks under test, each a plain run in a process of its own that notes what it does, line by line.

`axo_flash` is `axo-flash train` as it is, with shorter pauses. `stock` is what a script with `datasets` and
`transformers.Trainer` does. Both see the same rows, a Llama of two layers, and a mount.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot  # noqa: F401  imported once, here, not anew in every run
import torch
import transformers
from datasets import load_dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from axo_flash import cli, mount_io, train
from axo_flash.checkpoints import Session
from axo_flash.checkpoints import writer as writer_module
from axo_flash.checkpoints.shelf import Shelf, step_of
from axo_flash.data import mounted

STEPS, SAVE_STEPS = 8, 2
DATA_TIMEOUT, STALL_TIMEOUT, CHECKPOINT_TIMEOUT, PREEMPTION_TIMEOUT = 3.0, 1.0, 8.0, 4.0
ATTRIBUTE_CACHE_SECONDS = 0.3  # the fault file system keeps nothing longer
WEIGHTS = {"axo_flash": "adapter_model.safetensors", "stock": "model.safetensors"}
CRASHED = 70  # exit code of a run that ended with a traceback


def note(journal: Path, **what: Any) -> None:
    """One line in the journal of a run: in the file before the run goes on."""
    with open(journal, "a", encoding="utf-8") as file:
        file.write(json.dumps(what) + "\n")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def weights_digest(path: Path) -> str:
    """Of the tensors in a safetensors file: its header may differ in what it says beside them."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def watch_rows(journal: Path) -> None:
    """Note every micro-batch that is trained on, in either stack: the step and a hash of its tokens and labels."""
    plain = Trainer.training_step

    def training_step(self, model, inputs, *arguments, **options):
        content = b"".join(inputs[name].numpy().tobytes() for name in ("input_ids", "labels"))
        note(journal, event="batch", step=self.state.global_step, sha=hashlib.sha256(content).hexdigest()[:16])
        return plain(self, model, inputs, *arguments, **options)

    Trainer.training_step = training_step


def run_axo_flash(yaml: Path, journal: Path, keep_all: bool = False) -> int:
    """`axo-flash train`, with what it says of its checkpoints in the journal; its exit code.

    `keep_all`: training waits for every checkpoint to be published, so that none is overtaken by the next.
    """
    watch_rows(journal)
    mount_io.FIRST_PAUSE, mount_io.LONGEST_PAUSE, writer_module.FIRST_PAUSE = 0.02, 0.3, 0.1
    mounted.ATTRIBUTE_CACHE_SECONDS = ATTRIBUTE_CACHE_SECONDS
    published, found, saved = Shelf._published, Session.find, Session.saved

    def _published(self, staged, name):
        note(journal, event="saved", step=step_of(staged))
        return published(self, staged, name)

    def find(self):
        result = found(self)
        if result is not None:
            digest = weights_digest(result.local / WEIGHTS["axo_flash"])
            note(journal, event="resumed", step=result.manifest.step, sha=digest)
        return result

    def wait_too(self, directory):
        saved(self, directory)
        assert self.writer.wait(time.monotonic() + CHECKPOINT_TIMEOUT), "not published in time"

    Shelf._published, Session.find = _published, find
    if keep_all:
        Session.saved = wait_too
    # a heartbeat of 20 s would never beat in so short a run
    train.Session = functools.partial(Session, lease_options={"heartbeat": 0.5, "silence": 2.5})
    return cli.main(["train", str(yaml)])


class Saved(TrainerCallback):
    """Trainer says so once a checkpoint is written, as far as it knows."""

    def __init__(self, journal: Path):
        self.journal = journal

    def on_save(self, args, state, control, **kwargs):
        note(self.journal, event="saved", step=state.global_step)


def run_stock(options: dict[str, Any], journal: Path) -> int:
    """What the examples of transformers do: load_dataset, map, Trainer, get_last_checkpoint; output_dir on the mount."""
    watch_rows(journal)
    tokenizer = AutoTokenizer.from_pretrained(options["model"])
    rows = load_dataset("json", data_files=options["data"], split="train", cache_dir=options["cache"])

    def encode(row):
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][:128]
        return {"input_ids": ids, "labels": ids}

    rows = rows.map(encode, remove_columns=rows.column_names)
    transformers.set_seed(42)
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(options["model"]),
        args=TrainingArguments(
            output_dir=options["output"], max_steps=STEPS, save_steps=SAVE_STEPS, report_to="none", disable_tqdm=True,
            save_total_limit=options["limit"], per_device_train_batch_size=1, use_cpu=True, logging_steps=1,
            learning_rate=5e-3, seed=42,
        ),
        train_dataset=rows,
        callbacks=[Saved(journal)],
    )  # fmt: skip
    last = get_last_checkpoint(options["output"]) if os.path.isdir(options["output"]) else None
    if last is not None:
        note(journal, event="resumed", step=int(last.rpartition("-")[2]))
    trainer.train(resume_from_checkpoint=last)
    trainer.save_model()
    return 0


def in_a_child(work: Callable[[], int], log: Path, cache: Path) -> int:
    """Fork, and do `work` in the child, its output in `log`; the child's pid.

    The parent has only imported: no model was made in it, no thread runs in it, no mount was touched. So the child is
    what a new process is after its imports, and no second of ten goes into those.
    """
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for stream in (1, 2):
            os.dup2(out, stream)
        os.environ["XDG_CACHE_HOME"] = str(cache)
        torch.set_num_threads(1)
        code = work()
    except BaseException:  # the exit code says that it came to this, the log what it was
        traceback.print_exc()
        code = CRASHED
    for thread in threading.enumerate():  # as the interpreter does at its end
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
