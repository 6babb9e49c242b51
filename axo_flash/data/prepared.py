"""Tokenise once: the prepared set, a directory of Arrow files on local disk, keyed by what it was made from.

The key covers the bytes of every data file (sha256), the tokenizer, the template, the configuration keys that matter
and the version of this code: a changed file can never be served from a stale set, and moving or touching it costs
nothing but reading it. A set appears under its key by one rename, complete or not at all.

Every row leaves its mark in the set, dropped ones too (with the reason, without tokens): the report of a run that finds
its set in the cache is the same as of the run that made it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from axo_flash.data import mounted, records
from axo_flash.data.document import RowError
from axo_flash.data.files import DataError, DataFile, LocalCopy, fetch, find_mount, list_files, split_name
from axo_flash.data.formats import RowEncoder, fit, make_encoder
from axo_flash.data.mounted import Transfer, bring
from axo_flash.mount_io import MountIO

if TYPE_CHECKING:
    import datasets

    from axo_flash.config import Config, DatasetConfig

LOG = logging.getLogger(__name__)
FORMAT_VERSION = 1  # raise it when the same input would give other documents, or the files another shape
COLUMNS = {
    "input_ids": ["int32"], "labels": ["int32"], "length": "int32", "trained": "int32",
    "dataset": "int32", "file": "int32", "row": "int64", "rank": "int64", "number": "int64",
    "reason": "string", "detail": "string",
}  # fmt: skip


@dataclasses.dataclass
class Origin:
    """One data file, or one dataset of the Hub, as far as it was read: its name, bytes and the hash of its content."""

    dataset: int
    name: str
    size: int
    sha256: str
    mount: str | None
    file: DataFile | None = None
    copy: LocalCopy | None = None
    table: Any = None  # a datasets.Dataset from the Hub


@dataclasses.dataclass
class Prepared:
    """The documents of a run, dropped rows among them, in file order; `meta` is what meta.json holds."""

    documents: datasets.Dataset
    origins: list[Origin]
    meta: dict[str, Any]
    path: Path
    cache_hit: bool
    transfer: Transfer | None = None  # None where nothing came from a mount

    def place(self, file: int, number: int) -> str:
        unit = self.meta["files"][file]["unit"]
        return f"{self.origins[file].name}:{number}" if unit == "line" else f"{self.origins[file].name}:row {number}"


def prepare(config: Config, tokenizer: Any) -> Prepared:
    """Read the data files of `config`, and tokenise them unless a set made from the same content is there already.

    Raises DataError for data that cannot be read, and for types and templates that are not supported.
    """
    from huggingface_hub.utils import WeakFileLock

    encoders = [make_encoder(dataset, config, tokenizer) for dataset in config.datasets]
    root = cache_root(config.dataset_prepared_path)
    named = json.dumps([dataclasses.asdict(dataset) for dataset in config.datasets], sort_keys=True, default=str)
    work = root / f".work-{_digest(named)[:16]}"
    with WeakFileLock(root / f"{work.name}.lock"):  # processes that want the same data wait for the one that makes it
        shutil.rmtree(work, ignore_errors=True)  # left by a run that was killed
        work.mkdir()
        try:
            origins, transfer = _read(config, work)
            key = _key(config, encoders, tokenizer, origins)
            found = open_set(root / key, origins)
            if found is None:
                make_set(config, encoders, origins, work)
                shutil.rmtree(root / key, ignore_errors=True)  # a damaged set
                os.rename(work / "set", root / key)
                found = open_set(root / key, origins)
                if found is None:
                    raise DataError(f"the prepared set {root / key} cannot be read back: is the disk full or failing?")
                found.cache_hit = False
            found.transfer = transfer
            return found
        finally:
            shutil.rmtree(work, ignore_errors=True)


def cache_root(wanted: str | None) -> Path:
    """The directory of prepared sets, on local disk: they are memory-mapped, which files on FUSE must never be."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "axo_flash" / "prepared"
    root = Path(wanted).expanduser() if wanted else default
    if find_mount(root).is_fuse:
        local = next(
            (p for p in (default, Path(tempfile.gettempdir()) / "axo_flash") if not find_mount(p).is_fuse), None
        )
        if local is None:
            raise DataError(
                f"{root} lies on {find_mount(root)}: set dataset_prepared_path to a directory on a local disk."
            )
        LOG.warning(
            "prepared data goes to %s, not to %s: that lies on %s, and is memory-mapped", local, root, find_mount(root)
        )
        root = local
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"cannot make the directory of prepared data {root}: {error}. Set dataset_prepared_path."
        ) from error
    return root.absolute()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of everything in a tokenizer that decides which tokens a text becomes."""
    if getattr(tokenizer, "is_fast", False):
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state = {name: value for name, value in state.items() if name not in ("truncation", "padding")}  # set by calls
    else:
        state = tokenizer.get_vocab()
    named = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    rest = [type(tokenizer).__name__, named, "mistral" in str(tokenizer.name_or_path).lower()]
    return _digest(json.dumps([state, rest], sort_keys=True))


# --------------------------------------------------------------------------------------------------------------- read
def _read(config: Config, work: Path) -> tuple[list[Origin], Transfer | None]:
    """Every file of every dataset, copied to `work` and hashed.

    Files on mounts are listed once more when no cache can answer as it did: a name that a listing lacked would be rows
    that are missing, and nobody would know.
    """
    with MountIO(config.data_timeout, config.stall_timeout) as io:
        deadline = time.monotonic() + config.data_timeout + mounted.ATTRIBUTE_CACHE_SECONDS
        listed, listed_at = _list(config, io), time.monotonic()
        while True:
            origins, transfer = _copy(config, listed, work, io)
            if transfer is None or transfer.complete:
                return origins, transfer
            time.sleep(max(0.0, listed_at + mounted.ATTRIBUTE_CACHE_SECONDS - time.monotonic()))
            again, listed_at = _list(config, io), time.monotonic()
            names, now = ({file.path for files in both for file in files} for both in (listed, again))
            if now <= names:  # one that is not listed any more was there, and has been read whole
                return origins, transfer
            new = ", ".join(sorted(now - names)[:5])
            if time.monotonic() > deadline:
                raise DataError(
                    f"the files of the datasets keep changing: {new} came while the others were read. Wait until all "
                    "are written, or name them one by one in data_files."
                )
            LOG.warning("%s was not listed at first: all is read again", new)
            listed = again
            for folder in work.iterdir():
                shutil.rmtree(folder)


def _list(config: Config, io: MountIO) -> list[list[DataFile]]:
    """The files of every dataset: all names are checked before the first one is read."""
    return [list_files(dataset, config.data_mount, io) for dataset in config.datasets]


def _copy(
    config: Config, listed: list[list[DataFile]], work: Path, io: MountIO
) -> tuple[list[Origin], Transfer | None]:
    """Bring what is listed to `work`."""
    origins: list[Origin] = []
    on_mounts: list[tuple[Origin, Path]] = []
    for index, (dataset, files) in enumerate(zip(config.datasets, listed, strict=True)):
        for file in files:
            folder = work / f"{index}-{len(origins)}"
            folder.mkdir()
            if file.mount.is_remote:
                origins.append(Origin(index, file.path, 0, "", str(file.mount), file))
                on_mounts.append((origins[-1], folder))
                continue
            copy = fetch(file, folder)
            origins.append(Origin(index, file.path, copy.size, copy.sha256, str(file.mount), file, copy))
        if not files:
            table = _from_hub(dataset)
            origins.append(Origin(index, dataset.path, table.dataset_size or 0, table._fingerprint, None, table=table))
    if not on_mounts:
        return origins, None
    copies, transfer = bring([(origin.file, folder) for origin, folder in on_mounts], io)
    for (origin, _), copy in zip(on_mounts, copies, strict=True):
        origin.copy, origin.size, origin.sha256 = copy, copy.size, copy.sha256
    return origins, transfer


def _from_hub(dataset: DatasetConfig) -> datasets.Dataset:
    """A dataset of the Hugging Face Hub by its id. Raises DataError, with what `datasets` says."""
    import datasets

    try:
        return datasets.load_dataset(
            dataset.path, dataset.name, data_files=dataset.data_files, split=dataset.split or "train"
        )
    except Exception as error:  # offline, not found, gated, no such split: the library has a type of its own for each
        offline = " HF_HUB_OFFLINE is set." if os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "True") else ""
        raise DataError(
            f"there is no file or directory {dataset.path!r} (in {os.getcwd()}), and it could not be loaded from the "
            f"Hugging Face Hub: {type(error).__name__}: {str(error).strip()[:300]}.{offline} "
            "Correct datasets[].path, or get network."
        ) from error


def _key(config: Config, encoders: list[RowEncoder], tokenizer: Any, origins: list[Origin]) -> str:
    content = [[origin.dataset, origin.sha256, origin.file and origin.file.format] for origin in origins]
    return encoding_key(config, encoders, tokenizer, content=content)[:32]


def encoding_key(config: Config, encoders: list[RowEncoder], tokenizer: Any, **more: Any) -> str:
    """A hash of everything that decides which tokens and labels rows become, but for the files, and of `more`."""
    import tokenizers
    import transformers

    uses_seed = any(dataset.shards for dataset in config.datasets)
    parts = {
        "format": FORMAT_VERSION,
        "libraries": [tokenizers.__version__, transformers.__version__],
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "datasets": [
            {k: v for k, v in dataclasses.asdict(d).items() if k not in ("path", "data_files")} for d in config.datasets
        ],
        "templates": [getattr(encoder.encode, "template", None) for encoder in encoders],
        "rows": [config.sequence_len, config.excess_length_strategy, config.train_on_inputs],
        "rest": [config.eot_tokens, config.seed if uses_seed else None],
    }
    return _digest(json.dumps(parts | more, sort_keys=True, default=str))


# --------------------------------------------------------------------------------------------------------------- make
@dataclasses.dataclass
class Job:
    """What a tokenising process needs: sent to it once."""

    encoders: list[RowEncoder]
    sources: list[records.Staged]
    dataset_of: list[int]
    first_row: list[int]  # of each file, among the rows of its dataset
    ranks: list[np.ndarray | None]  # per dataset: position of a row in the order wanted, -1 if it is not; None: all
    sequence_len: int
    strategy: str

    def __call__(self, units: dict[str, list[int]]) -> dict[str, list[Any]]:
        """One span of one file -> the columns of its documents and dropped rows."""
        out: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        for file, index in zip(units["file"], units["span"], strict=True):
            source, dataset = self.sources[file], self.dataset_of[file]
            span, ranks = source.spans[index], self.ranks[dataset]
            for row, (number, content) in enumerate(records.read_span(source, span), self.first_row[file] + span.row):
                rank = row if ranks is None else int(ranks[row])
                if rank >= 0:
                    for record in self.records(dataset, content):
                        for name, value in {
                            **record,
                            "dataset": dataset,
                            "file": file,
                            "row": row,
                            "rank": rank,
                            "number": number,
                        }.items():
                            out[name].append(value)
        return out

    def records(self, dataset: int, content: Any) -> list[dict[str, Any]]:
        """A row's documents, or why there are none."""
        if isinstance(content, records.BadRow):
            return [_dropped("broken row", content.detail)]
        try:
            documents = self.encoders[dataset](content)
        except RowError as error:
            return [_dropped(error.reason, str(error))]
        result = []
        for document in documents:
            try:
                ids, labels = fit(document, self.sequence_len, self.strategy)
            except RowError as error:
                result.append(_dropped(error.reason, str(error)))
            else:
                trained = sum(label != -100 for label in labels[1:])
                result.append(
                    {
                        "input_ids": ids,
                        "labels": labels,
                        "length": len(ids),
                        "trained": trained,
                        "reason": "",
                        "detail": "",
                    }
                )
        return result


def _dropped(reason: str, detail: str) -> dict[str, Any]:
    return {"input_ids": [], "labels": [], "length": 0, "trained": 0, "reason": reason, "detail": detail}


def make_set(config: Config, encoders: list[RowEncoder], origins: list[Origin], work: Path) -> None:
    """Tokenise into `work`/set: data*.arrow and meta.json."""
    import datasets

    sources = [
        records.stage_table(origin.name, origin.table, work / f"hub-{index}") if origin.file is None
        else records.stage(origin.file, origin.copy)
        for index, origin in enumerate(origins)
    ]  # fmt: skip
    dataset_of = [origin.dataset for origin in origins]
    first_row, totals = [], [0] * len(config.datasets)
    for dataset, source in zip(dataset_of, sources, strict=True):
        first_row.append(totals[dataset])
        totals[dataset] += source.rows
    ranks = [_ranks(dataset, total, config.seed, hub=not any(o.file for o in origins if o.dataset == index))
             for index, (dataset, total) in enumerate(zip(config.datasets, totals, strict=True))]  # fmt: skip
    job = Job(encoders, sources, dataset_of, first_row, ranks, config.sequence_len, config.excess_length_strategy)

    units = [(file, span) for file, source in enumerate(sources) for span in range(len(source.spans))]
    processes = min(config.dataset_num_proc or os.cpu_count() or 1, len(units))
    target = work / "set"
    target.mkdir()
    features = datasets.Features(
        {
            name: datasets.List(datasets.Value(kind[0])) if isinstance(kind, list) else datasets.Value(kind)
            for name, kind in COLUMNS.items()
        }
    )
    plan = datasets.Dataset.from_dict({"file": [file for file, _ in units], "span": [span for _, span in units]})
    documents = plan.map(
        job,
        batched=True,
        batch_size=1,
        num_proc=processes if processes > 1 else None,
        remove_columns=["span"],
        features=features,
        cache_file_name=str(target / "data.arrow"),
        load_from_cache_file=False,
        new_fingerprint=_digest(str(target))[:16],
        desc=f"Tokenising {sum(totals):,} rows in {len(units):,} parts",
    )
    files = [
        {"rows": _selected(source, start, ranks[dataset]) + len(source.bad), "unit": source.unit, "bad": source.bad}
        for dataset, source, start in zip(dataset_of, sources, first_row, strict=True)
    ]
    arrow = sorted(Path(file["filename"]).name for file in documents.cache_files)
    meta = {"format": FORMAT_VERSION, "records": len(documents), "files": files, "arrow": arrow}
    (target / "meta.json").write_text(json.dumps(meta, indent=1))
    for path in target.iterdir():  # a set that was published survives a power cut
        with open(path, "rb") as written:
            os.fsync(written.fileno())


def _ranks(dataset: DatasetConfig, rows: int, seed: int, hub: bool) -> np.ndarray | None:
    """Order in which rows are wanted after `split: train[a:b]` and then `shards` (shuffled first, as in Axolotl)."""
    from datasets import ReadInstruction

    wanted = np.arange(rows)
    if dataset.split and "[" in dataset.split and not hub:  # the Hub's were sliced by load_dataset
        try:
            name = split_name(dataset.split)
            part = ReadInstruction.from_spec(dataset.split).to_absolute({name: rows})[0]
        except (ValueError, AssertionError) as error:
            raise DataError(
                f"split {dataset.split!r} of {dataset.path} does not work with its {rows} rows: {error}"
            ) from error
        wanted = wanted[part.from_ : part.to]
    if dataset.shards:
        index = dataset.shards_idx or 0
        if index >= dataset.shards:
            raise DataError(f"shards_idx {index} of {dataset.path} must be below shards, {dataset.shards}.")
        wanted = wanted[np.random.default_rng(seed).permutation(len(wanted))]
        wanted = np.array_split(wanted, dataset.shards)[index]
    if len(wanted) == rows and not dataset.shards:
        return None
    if not len(wanted):
        raise DataError(f"split and shards of {dataset.path} select none of its {rows} rows.")
    ranks = np.full(rows, -1, dtype=np.int64)
    ranks[wanted] = np.arange(len(wanted))
    return ranks


def _selected(source: records.Staged, first_row: int, ranks: np.ndarray | None) -> int:
    return source.rows if ranks is None else int((ranks[first_row : first_row + source.rows] >= 0).sum())


# --------------------------------------------------------------------------------------------------------------- open
def open_set(path: Path, origins: list[Origin]) -> Prepared | None:
    """The set at `path`, or None if there is none that is whole."""
    import datasets
    import pyarrow as pa

    if not path.is_dir():
        return None
    try:
        meta = json.loads((path / "meta.json").read_text())
        parts = [datasets.Dataset.from_file(str(path / name)) for name in meta["arrow"]]
        documents = datasets.concatenate_datasets(parts)
        if len(documents) != meta["records"]:
            raise ValueError(f"{len(documents)} records of {meta['records']}")
    except (OSError, ValueError, KeyError, pa.ArrowInvalid) as error:
        LOG.warning("the prepared set %s is damaged (%s): it is made again", path, error)
        return None
    return Prepared(documents, origins, meta, path, cache_hit=True)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
