"""What a run leaves behind for people: run_report.json, a short table on the terminal, and a picture of the loss."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPORT_FILE = "run_report.json"
INSTALL_PLOT = 'pip install "axo-flash[plot]"'
PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "datasets", "bitsandbytes")


@dataclass
class AttentionFacts:
    """Which attention ran.

    `implementation` is axo_fa for our kernels, else Hugging Face's name; `calls` counts forward calls by backend, as
    they really happened.
    """

    implementation: str
    layers: int
    backend: str | None = None
    reason: str = ""
    calls: dict[str, int] = field(default_factory=dict)

    @property
    def fell_back(self) -> int:
        """How many calls ran on another backend than the one that was announced."""
        return sum(count for backend, count in self.calls.items() if backend != self.backend)


@dataclass
class Sample:
    """One question to the model before and after training, and the answer in the data."""

    prompt: str
    expected: str
    before: str | None = None
    after: str | None = None


@dataclass
class Speed:
    """How fast training was. Tokens are real ones, padding excluded; evaluation and saving are not in the time.

    `tokens_per_second` leaves out the first step (compilation, warm-up) wherever there was a second one.
    """

    tokens: int = 0
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    first_step_seconds: float = 0.0
    flops: float = 0.0
    mfu: float | None = None
    packing_efficiency: float | None = None
    peak_memory_bytes: int = 0
    peak_memory_kind: str = ""


@dataclass
class RunReport:
    """Everything about one run, as plain values; `write` saves it as run_report.json."""

    status: str  # running, finished, interrupted, unpublished
    config: dict[str, Any]
    seed: int
    versions: dict[str, str | None]
    device: str
    config_hash: str = ""
    model: dict[str, Any] = field(default_factory=dict)
    attention: AttentionFacts | None = None
    data: dict[str, Any] = field(default_factory=dict)
    speed: Speed = field(default_factory=Speed)
    steps: int = 0
    epochs: float = 0.0
    first_loss: float | None = None
    last_loss: float | None = None
    eval_loss_before: float | None = None
    eval_loss_after: float | None = None
    sample: Sample | None = None
    resumed_from: str | None = None
    stopped_because: str | None = None
    checkpoint: str | None = None
    checkpoints: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)

    def write(self, directory: str | Path) -> Path:
        """Save as run_report.json in `directory` (complete or not at all) and return its path."""
        path = Path(directory) / REPORT_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = path.with_name(f".{path.name}.{os.getpid()}")
        staging.write_text(json.dumps(dataclasses.asdict(self), indent=2, default=str) + "\n", encoding="utf-8")
        os.replace(staging, path)
        return path


def config_hash(config: dict[str, Any]) -> str:
    """Sixteen hexadecimal digits that change whenever a value of the configuration does."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:16]


def versions() -> dict[str, str | None]:
    """The versions that a result depends on; None for a package that is not installed."""
    from axo_flash import __version__

    found: dict[str, str | None] = {"axo_flash": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def device_description() -> str:
    """The GPU's name and CUDA version, or the CPU's name and the number of threads in use."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda or torch.version.hip}"
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def cpu_name() -> str:
    """The CPU as Linux names it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


# ---------------------------------------------------------------------------------------------------------- the table


def table(rows: list[tuple[str, str]], columns: int = 118) -> str:
    """Two aligned columns, wrapped to so many characters; every line of a value is indented to its column."""
    width = max(len(name) for name, _ in rows) + 2
    lines = []
    for name, value in rows:
        for line in value.splitlines() or [""]:
            parts = textwrap.wrap(line, columns - width, break_long_words=False, break_on_hyphens=False)
            for part in parts or [""]:
                lines.append(f"{name:<{width}}{part}".rstrip())
                name = ""
    return "\n".join(lines)


def summary(report: RunReport) -> str:
    """The short table that ends a run."""
    speed, model = report.speed, report.model
    rows = [
        ("model", f"{Path(model['base_model']).name}: {model['parameters'] / 1e6:,.1f} M parameters, {model['dtype']}"),
        ("trained", trained_line(model)),
        ("attention", attention_line(report.attention)),
        ("data", data_line(report)),
        ("steps", steps_line(report)),
        ("loss", train_loss_line(report)),
    ]
    if report.eval_loss_before is not None or report.eval_loss_after is not None:
        rows.append(("eval loss", change(report.eval_loss_before, report.eval_loss_after)))
    if report.checkpoint is not None:
        rows.append(("checkpoint", checkpoints_line(report)))
    rows += [
        ("speed", speed_line(speed)),
        ("memory", f"{gib(speed.peak_memory_bytes)} peak ({speed.peak_memory_kind})"),
        ("device", report.device),
        ("versions", ", ".join(f"{name} {version}" for name, version in report.versions.items() if version)),
        ("seed", f"{report.seed}; configuration {report.config_hash}"),
        ("time", ", ".join(f"{phase} {duration(seconds)}" for phase, seconds in report.seconds.items())),
    ]
    return table(rows)


def sample_text(sample: Sample) -> str:
    """The sample question with the answers before and after training."""
    texts = {"asked": sample.prompt, "in the data": sample.expected, "before": sample.before, "after": sample.after}
    return table([(name, shortened(text)) for name, text in texts.items() if text is not None])


def shortened(text: str, characters: int = 400) -> str:
    """A text in one line, cut between words."""
    return textwrap.shorten(text, characters, placeholder=" ...") or "(nothing)"


def trained_line(model: dict[str, Any]) -> str:
    """What is trained, as a share of the model."""
    share = model["trainable_parameters"] / model["parameters"]
    kind = model["adapter"] or "all weights"
    return f"{kind}, {model['trainable_parameters'] / 1e6:,.2f} M parameters ({share:.2%})"


def attention_line(attention: AttentionFacts) -> str:
    """Which attention ran in how many layers, on which backend, and why."""
    if attention.backend is None:
        return f"{attention.layers} layers on Hugging Face's {attention.implementation} ({attention.reason})"
    total = sum(attention.calls.values())
    fell_back = attention.fell_back
    verdict = "none fell back" if not fell_back else f"{fell_back:,} of them elsewhere: {attention.calls}"
    return (
        f"{attention.layers} layers on axo_flash's {attention.backend} backend: {total:,} calls, {verdict}\n"
        f"({attention.reason})"
    )


def data_line(report: RunReport) -> str:
    """Rows, tokens, how full the packed rows are, and where the data came from."""
    data = report.data
    line = f"{data['rows_used']:,} of {data['rows_read']:,} rows, {data['tokens']:,} tokens"
    line += f" ({data['trained_tokens']:,} trained)"
    if report.speed.packing_efficiency is not None:
        line += f", packed rows {report.speed.packing_efficiency:.1%} full"
    dropped = ", ".join(f"{rows['count']:,} {reason}" for reason, rows in data["rows_dropped"].items())
    if dropped:
        line += f"\ndropped: {dropped}"
    files = data["files"]
    source = files[0] if len(files) == 1 else f"{len(files)} files"
    line += f"\nfrom {source} on {', '.join(data['mount'])}"
    if data.get("shards"):
        line += f", streamed: {data['shards_read']:,} shards read here"
        line += f", training waited {duration(data['waited_seconds'])} for them"
    return line + (f"\n{transfer_line(data['transfer'])}" if data.get("transfer") else "")


def transfer_line(transfer: dict[str, Any]) -> str:
    """What it took to bring the data files from their mounts to local disk."""
    line = f"brought from the mount once: {transfer['bytes']:,} bytes in {duration(transfer['seconds'])}"
    line += f", {transfer['retries']:,} faults met and tried again" if transfer["retries"] else ", no fault met"
    line += f" ({transfer['stalls']:,} of them hung)" if transfer["stalls"] else ""
    return line + f", {transfer['verified']:,} of {transfer['files']:,} files checked by manifest"


def steps_line(report: RunReport) -> str:
    """How far the run got, and how it ended if not by itself."""
    line = f"{report.steps:,} ({report.epochs:.2f} epochs)"
    if report.resumed_from:
        line += f", resumed from {report.resumed_from}"
    if report.stopped_because:
        line += f"; {report.stopped_because}"
    return line


def checkpoints_line(report: RunReport) -> str:
    """The newest checkpoint, and whatever went wrong with others."""
    facts = report.checkpoints
    line = report.checkpoint or "none"
    if facts["never_published"]:
        steps = ", ".join(f"{step:,}" for step in facts["never_published"])
        line += f"\nnot published, because a newer one was there when the mount answered: steps {steps}"
    if facts["not_rotated"]:
        line += f"\nolder ones could not be removed: {facts['not_rotated']}"
    return line


def train_loss_line(report: RunReport) -> str:
    """The first and the last training loss in the log, with their steps: one batch each, so noise can hide the trend."""
    line = change(report.first_loss, report.last_loss)
    steps = [row["step"] for row in report.history if "loss" in row]
    return line + (f" (logged at steps {steps[0]:,} and {steps[-1]:,})" if len(steps) > 1 else "")


def speed_line(speed: Speed) -> str:
    """Tokens per second and, on a GPU whose peak we know, the share of that peak."""
    line = f"{speed.tokens_per_second:,.0f} tokens/s over {speed.tokens:,} tokens"
    return line + (f", MFU {speed.mfu:.1%}" if speed.mfu is not None else "")


def change(before: float | None, after: float | None) -> str:
    """Two losses with an arrow; a dash where one was not measured."""
    texts = ["-" if value is None else f"{value:.4f}" for value in (before, after)]
    return " -> ".join(texts)


def gib(count: int) -> str:
    """A number of bytes in GiB."""
    return f"{count / 2**30:.2f} GiB"


def duration(seconds: float) -> str:
    """Seconds as 0.4 s, 12 s, 3:05 or 2:03:05."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


# ----------------------------------------------------------------------------------------------------------- the plot


def plot_losses(history: list[dict[str, Any]], path: str | Path, title: str) -> str | None:
    """Draw training and validation loss over steps as a PNG.

    Returns None when the picture is there, else why not (nothing to draw, or matplotlib missing with its pip command).
    """
    train = [(row["step"], row["loss"]) for row in history if "loss" in row]
    evaluation = [(row["step"], row["eval_loss"]) for row in history if "eval_loss" in row]
    if not train:
        return "no loss was logged"
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        return f"matplotlib is not installed: {INSTALL_PLOT}"
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    marker = "." if len(train) < 80 else None
    axes.plot(*zip(*train, strict=True), color="#4878a8", linewidth=1.2, marker=marker, label="training")
    if evaluation:
        axes.plot(*zip(*evaluation, strict=True), color="#c8553d", linewidth=1.8, marker="o", label="validation")
        above, beside = {"xytext": (0, 9)}, {"xytext": (9, 0), "va": "center"}  # beside the last, where no curve runs
        ends = evaluation[:1] + evaluation[1:][-1:]
        for (step, loss), place in zip(ends, (above, beside), strict=False):
            axes.annotate(f"{loss:.3f}", (step, loss), textcoords="offset points", color="#c8553d", **place)
    axes.set(xlabel="optimizer step", ylabel="loss (nats a token)", title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)
    return None
