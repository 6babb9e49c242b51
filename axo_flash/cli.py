"""The command line: axo-flash train | check | doctor | bench. A new command is a row of COMMANDS.

Transformers and what needs it is imported inside the commands, so that --help and a mistake in the YAML answer at once.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from axo_flash.config import Config, ConfigError, load_config
from axo_flash.data.files import DataError
from axo_flash.errors import UserError

OK, BAD_INPUT, UNPUBLISHED, INTERRUPTED = 0, 2, 3, 130
OUT_OF_MEMORY = "\ntry a smaller micro_batch_size or sequence_len, gradient_checkpointing: true, adapter: qlora"


@dataclass(frozen=True)
class Command:
    """One subcommand: what it does in a line, an example of its use, its arguments and its function."""

    name: str
    summary: str
    details: str
    example: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0: done. 1: it ran and found something wrong. 2: the input is wrong (one message on stderr). 3: training ended,
    but what it made could not be brought to output_dir. 130: Ctrl-C. 143: SIGTERM.
    """
    arguments = make_parser().parse_args(argv)
    try:
        return arguments.command.run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ConfigError, DataError, UserError, torch.OutOfMemoryError) as error:
        if arguments.debug:
            raise
        advice = OUT_OF_MEMORY if isinstance(error, torch.OutOfMemoryError) else ""
        print(f"error: {error}{advice}", file=sys.stderr)
        return BAD_INPUT


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    from axo_flash import __version__

    parser = argparse.ArgumentParser(
        prog="axo-flash",
        description="Fine-tune Llama and Mistral models with Triton flash attention, from an Axolotl YAML.",
        epilog="examples:\n" + "\n".join(f"  {command.example}" for command in COMMANDS),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"axo-flash {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        subparser = subparsers.add_parser(
            command.name,
            help=command.summary,
            description=f"{command.summary[0].upper()}{command.summary[1:]}.\n\n{textwrap.dedent(command.details).strip()}",
            epilog=f"example:\n  {command.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(subparser)
        subparser.add_argument("--debug", action="store_true", help="show the traceback of an error in the input")
        subparser.set_defaults(command=command)
    return parser


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """The YAML and the overrides that win over it."""
    parser.add_argument("config", metavar="CONFIG.yml", help="the YAML of the run, with Axolotl's keys")
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        help="override a key of the YAML; dots lead inwards: datasets.0.path=data.jsonl",
    )


def add_no_arguments(parser: argparse.ArgumentParser) -> None:
    """Nothing to set."""


def read_config(arguments: argparse.Namespace) -> Config:
    """The configuration that the arguments name."""
    return load_config(arguments.config, arguments.overrides)


def quiet_libraries() -> None:
    """Silence what is known to be noise here, and nothing else."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    logging.disable_progress_bar()  # "Loading weights"
    enable_progress_bars()  # switched off by the line before; a download is worth watching
    # transformers 5.23 renames it; 5.17 knows the old name alone, and PEFT uses it too
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)


def run_train(arguments: argparse.Namespace) -> int:
    """axo-flash train."""
    config = read_config(arguments)
    from axo_flash.checkpoints import NotPublished
    from axo_flash.train import Interrupted, train

    quiet_libraries()
    try:
        train(config, partial(print, flush=True))  # in a log file too, its lines and those of stderr are in their order
    except NotPublished as problem:
        print(f"error: {problem}", file=sys.stderr)
        return UNPUBLISHED
    except Interrupted as interrupted:
        words = ["axo-flash", "train", arguments.config, *arguments.overrides]
        going_on = f"{' '.join(words)} resume_from_checkpoint={interrupted.report.checkpoint}"
        if interrupted.report.checkpoint is None:  # it waited for its first rows
            going_on = " ".join(words)
        print(f"stopped at step {interrupted.report.steps}; to go on from there:\n  {going_on}", file=sys.stderr)
        return 128 + interrupted.signal_number
    return OK


def run_check(arguments: argparse.Namespace) -> int:
    """axo-flash check."""
    config = read_config(arguments)
    from axo_flash.check import check

    quiet_libraries()
    check(config)
    return OK


def run_doctor(arguments: argparse.Namespace) -> int:
    """axo-flash doctor."""
    from axo_flash.doctor import doctor

    return doctor()


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """What to time and where to leave it."""
    cases = ("dense", "models", "packed")
    parser.add_argument("--cases", nargs="+", choices=cases, default=["dense", "packed"], help="default: dense packed")
    parser.add_argument("--head-dim", type=int, nargs="+", default=[128, 64], help="of dense cases; default: 128 64")
    parser.add_argument(
        "--seqlen", type=int, nargs="+", default=[4096, 16384], help="of dense cases; default: 4096 16384"
    )
    parser.add_argument("--backends", nargs="+", metavar="NAME", help="default: all that are to be had")
    parser.add_argument("--csv", metavar="FILE", help="also write every figure there")
    parser.add_argument("--plot", metavar="FILE.png", help="also draw it (needs matplotlib)")


def run_bench(arguments: argparse.Namespace) -> int:
    """axo-flash bench."""
    from pathlib import Path

    from axo_flash import bench

    cases = []
    if "dense" in arguments.cases:
        cases += bench.dense_cases(arguments.seqlen, arguments.head_dim)
    if "models" in arguments.cases:
        cases += bench.model_cases()
    if "packed" in arguments.cases:
        cases += bench.packed_cases()
    results = bench.bench(cases, backends=arguments.backends, say=lambda s: print(s, file=sys.stderr))
    print(bench.table(results))
    if arguments.csv:
        bench.write_csv(results, Path(arguments.csv))
    if arguments.plot:
        bench.plot(results, Path(arguments.plot))
    return OK


COMMANDS = (
    Command(
        "train",
        "fine-tune a model as a YAML says",
        """
        Reads the data (from a mounted path or any other), patches the model's attention, trains, and leaves in
        output_dir the adapter or the weights, checkpoints, run_report.json and loss.png. Ctrl-C stops after the step
        that runs, with a checkpoint, and prints the command that goes on from it.
        """,
        "axo-flash train configs/demo.yml learning_rate=1e-4 max_steps=60",
        add_config_arguments,
        run_train,
    ),
    Command(
        "check",
        "check a YAML and its data without loading the model",
        """
        Reports every mistake in the YAML at once, reads and tokenises the data, and shows the first documents with the
        tokens that are trained on marked, the counts of rows and tokens, and how full the packed rows are.
        """,
        "axo-flash check configs/demo.yml",
        add_config_arguments,
        run_check,
    ),
    Command(
        "doctor",
        "show what will run on this machine, and why not something better",
        """
        Versions, device, the attention backend in each precision with every reason against a better one, whether FUSE
        mounts can be made, and a small run of the kernel against the reference. Exits with 1 if training cannot run.
        """,
        "axo-flash doctor",
        add_no_arguments,
        run_doctor,
    ),
    Command(
        "bench",
        "time the attention kernels against others on this GPU",
        """
        bf16, forward and backward, dense and packed, against SDPA's FlashAttention-2 and cuDNN, compiled FlexAttention, and
        FlashAttention-3 where it is installed, each held against the fp32 reference first. Prints TFLOP/s forward /
        backward and how many times faster the kernel is. Takes some minutes, most of it FlexAttention's compilation.
        """,
        "axo-flash bench --seqlen 4096 --plot bench.png",
        add_bench_arguments,
        run_bench,
    ),
)
