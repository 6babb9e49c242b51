"""Which run a checkpoint may go on with: the keys that change the weights, the data, and what differs between two."""

from __future__ import annotations

from typing import Any

from axo_flash.checkpoints.manifest import Identity
from axo_flash.config import Config
from axo_flash.config.checks import show
from axo_flash.report import config_hash, versions

# Keys that change where things are, what is shown, or how long a run lasts at most: a run may go on with other values.
NEUTRAL = {
    *(
        "output_dir",
        "data_mount",
        "data_timeout",
        "stall_timeout",
        "demo",
        "dataset_prepared_path",
        "dataset_num_proc",
        "streaming_prefetch_shards",
        "trust_remote_code",
        "plugins",
    ),
    *("gradient_checkpointing", "gradient_checkpointing_kwargs", "logging_steps"),
    *("eval_strategy", "eval_steps", "evals_per_epoch", "test_datasets"),
    *("save_strategy", "save_steps", "saves_per_epoch", "save_total_limit"),
    *("resume_from_checkpoint", "auto_resume_from_checkpoints"),
    *("checkpoint_staging_path", "checkpoint_timeout", "preemption_timeout"),
    *("early_stopping_patience", "loss_watchdog_threshold", "loss_watchdog_patience"),
    *("use_wandb", "wandb_project", "wandb_entity", "wandb_name"),
    *("wandb_run_id", "wandb_mode", "wandb_watch", "wandb_log_model"),
}
WHERE_DATA_LIES = ("path", "data_files")  # of datasets[]: what is in the files counts, not what they are called


def identity_of(config: Config, data: str = "") -> Identity:
    """The identity of a run of `config` on the tokenised rows with the fingerprint `data`."""
    values = {name: value for name, value in config.to_dict().items() if name not in NEUTRAL}
    values["datasets"] = [
        {name: value for name, value in dataset.items() if name not in WHERE_DATA_LIES}
        for dataset in values["datasets"]
    ]
    return Identity(values, config_hash(values), data, versions())


def config_differences(checkpoint: Identity, run: Identity) -> list[str]:
    """Keys whose values differ, one "key: that of the checkpoint -> that of the run" each."""
    return list(_differences("", checkpoint.config, run.config))


def _differences(path: str, old: Any, new: Any):
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            yield from _differences(f"{path}.{name}" if path else name, old.get(name), new.get(name))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, pair in enumerate(zip(old, new, strict=True)):
            yield from _differences(f"{path}.{index}", *pair)
    elif old != new:
        yield f"{path}: {show(old)} in the checkpoint, {show(new)} in this run"
