"""`axo-flash check`: what a run would train on, without loading the model: counts, and trained tokens marked."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable
from typing import Any

from axo_flash.config import Config
from axo_flash.data.dataset import DataReport, PreparedData
from axo_flash.data.streaming import StreamRows, open_data
from axo_flash.demo import prepare as prepare_demo
from axo_flash.model import load_tokenizer
from axo_flash.report import duration, table, transfer_line
from axo_flash.sampling import documents

Say = Callable[[str], None]
ROWS_SHOWN = 3
FILES_SHOWN = 20
TOKENS_SHOWN = 300  # of one document
GREEN, DIM, RESET = "\033[32m", "\033[2m", "\033[0m"


def check(config: Config, say: Say = print, colour: bool | None = None) -> PreparedData:
    """Prepare the data of `config` and show it: counts, packing, and the first documents with their trained tokens.

    Args:
        config: the run.
        say: gets the text.
        colour: mark trained tokens in green, others dim; else with [brackets]. None: colour if stdout is a terminal.

    Raises ModelError, DataError or DemoError as `train` would.
    """
    with prepare_demo(config, say):
        tokenizer = load_tokenizer(config)
        data = open_data(config, tokenizer)
    colour = sys.stdout.isatty() if colour is None else colour
    with data:
        rows = data.train.examples()
        first = itertools.chain.from_iterable(documents(rows[index]) for index in range(len(rows)))
        for number, (input_ids, labels) in enumerate(itertools.islice(first, ROWS_SHOWN), 1):
            trained = sum(label != -100 for label in labels)
            say(f"--- document {number}: {len(input_ids)} tokens, {trained} trained on ---")
            say(marked(input_ids, labels, tokenizer, colour) + "\n")
        say(f"trained tokens are {GREEN + 'green' + RESET if colour else 'in [brackets]'}\n")
        say(data_table(config, data))
    return data


def marked(input_ids: list[int], labels: list[int], tokenizer: Any, colour: bool) -> str:
    """The text of a document, special tokens included, with every trained stretch in green or in brackets."""
    before, after = (GREEN, RESET) if colour else ("[", "]")
    plain = (DIM, RESET) if colour else ("", "")
    cut = len(input_ids) > TOKENS_SHOWN
    input_ids, labels = input_ids[:TOKENS_SHOWN], labels[:TOKENS_SHOWN]
    text, start = "", 0
    for end in range(1, len(input_ids) + 1):
        trained = labels[start] != -100
        if end < len(input_ids) and (labels[end] != -100) == trained:
            continue
        opening, closing = (before, after) if trained else plain
        text += opening + tokenizer.decode(input_ids[start:end]) + closing
        start = end
    return text + (" ..." if cut else "")


def data_table(config: Config, data: PreparedData) -> str:
    """Where the data came from and how many rows, tokens and steps there are."""
    report = data.report
    # the trainer's own count, imported here because it brings Hugging Face's Trainer with it
    from axo_flash.trainer import count_steps

    steps = count_steps(config, len(data.train))
    more = len(report.files) - FILES_SHOWN
    shards = f"{report.shards}, read one by one while training; rows and tokens below are of the first to come"
    rows = [
        ("files", "\n".join(report.files[:FILES_SHOWN]) + (f"\nand {more:,} more" if more > 0 else "")),
        *([("shards", shards)] if isinstance(data.train, StreamRows) else []),
        ("mount", "\n".join(report.mount)),
        *([("transfer", transfer_line(dataclasses.asdict(report.transfer)))] if report.transfer else []),
        ("rows", f"{report.rows_used:,} of {report.rows_read:,} used{dropped_lines(report)}"),
        ("train", f"{report.documents:,} documents, {report.tokens:,} tokens, {report.trained_tokens:,} trained on"),
        ("validation", f"{report.eval_documents:,} documents, {report.eval_tokens:,} tokens"),
        ("rows of the run", f"{len(data.train):,}{packing_words(config, report)}"),
        ("steps", f"{steps:,} of {config.micro_batch_size} x {config.gradient_accumulation_steps} rows"),
        ("prepared", f"in {duration(report.seconds)}{', from the cache' if report.cache_hit else ''}"),
        *([] if isinstance(data.train, StreamRows) else [("cache", report.cache_path)]),
    ]
    return table(rows)


def dropped_lines(report: DataReport) -> str:
    """Every reason for which rows were dropped, with the first places."""
    lines = ""
    for reason, rows in report.rows_dropped.items():
        lines += f"\n{rows.count:,} dropped: {reason}"
        lines += "".join(f"\n  {place}" for place in rows.places)
    return lines


def packing_words(config: Config, report: DataReport) -> str:
    """How full the packed rows are, or that rows are padded."""
    if report.packing_efficiency is None:
        return f", one document each, up to {config.sequence_len} tokens"
    return f" packed rows of {config.sequence_len} tokens, {report.packing_efficiency:.1%} full"
