"""Model, tokenizer, adapter, template and a checkpoint to go on from on a real FUSE mount that fails: brought over once,
and nothing of it mapped."""

import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from streamed_run import same, weights
from tiny_run import TEMPLATE, write_model, write_yaml

from axo_flash import cli, mount_io
from axo_flash.config import load_config
from axo_flash.data import mounted
from axo_flash.data.dataset import DataError
from axo_flash.data.inputs import RECORD, InputError, local_directory
from axo_flash.model import load_model, load_tokenizer
from axo_flash.mount_io import MountError
from axo_flash.train import train
from axo_flash.trainer import RunTrainer

NOTE_OPENS = {"op": "open", "action": "note"}


@pytest.fixture(autouse=True)
def apart(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(mounted, "ATTRIBUTE_CACHE_SECONDS", 0.05)
    monkeypatch.setattr(mount_io, "FIRST_PAUSE", 0.02)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "tiny-llama")
    (folder / "mine.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def undisturbed(directory):
    """The weights of a run on the same files on local disk; its output is an adapter to go on from."""
    keys = {"save_strategy": None, "save_steps": 2, "output_dir": str(directory / "undisturbed")}
    keys |= {"chat_template_jinja": str(directory / "mine.jinja")}
    train(load_config(write_yaml(directory, **keys)), lambda text: None)
    return weights(directory / "undisturbed")


@pytest.fixture
def yaml(directory, mount, tmp_path):
    """yaml(**changes): the path of a run's YAML whose model and template lie on the mount."""
    shutil.copytree(directory / "tiny-llama", mount.backing / "tiny-llama")
    shutil.copy(directory / "mine.jinja", mount.backing)

    def yaml(**changes):
        keys = {"data_timeout": 20.0, "stall_timeout": 1.0, "base_model": str(mount.point / "tiny-llama")}
        keys |= {"chat_template_jinja": str(mount.point / "mine.jinja"), "output_dir": str(tmp_path / "out")}
        return write_yaml(directory, **(keys | changes))

    return yaml


@pytest.fixture
def config(yaml):
    return lambda **changes: load_config(yaml(**changes))


def copy_of(tmp_path):
    (copy,) = (path for path in (tmp_path / "cache" / "axo_flash" / "models").iterdir() if path.is_dir())
    return copy


def opened(mount):
    return [line.split()[1] for line in mount.faults() if " note" in line]


def test_the_weights_of_the_run_and_nothing_held(mount, config, undisturbed, tmp_path, monkeypatch):
    looks, real = [], RunTrainer.training_step

    def look(self, *rest, **more):
        looks.append(str(mount.point) in Path("/proc/self/maps").read_text())
        looks.extend(os.path.realpath(link).startswith(str(mount.point)) for link in Path("/proc/self/fd").iterdir())
        return real(self, *rest, **more)

    monkeypatch.setattr(RunTrainer, "training_step", look)
    train(config(), lambda text: None)
    assert looks and not any(looks)
    assert same(weights(tmp_path / "out"), undisturbed)
    written = [path.read_text() for path in (tmp_path / "out").glob("*.json")]
    assert not [text for text in written if str(tmp_path / "cache") in text]
    adapter = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(mount.point / "tiny-llama")


def test_a_daemon_that_dies_while_it_trains_changes_nothing(mount, config, undisturbed, tmp_path, monkeypatch):
    """Mapped weights would end the process with SIGBUS here."""
    real = RunTrainer.training_step

    def step(self, *rest, **more):
        mount.daemon.send_signal(signal.SIGKILL)
        return real(self, *rest, **more)

    monkeypatch.setattr(RunTrainer, "training_step", step)
    train(config(), lambda text: None)
    assert mount.daemon.wait() == -signal.SIGKILL
    assert same(weights(tmp_path / "out"), undisturbed)


def test_the_second_time_only_what_changed_is_read(mount, config, directory, tmp_path):
    settings, source = config(), mount.backing / "tiny-llama"
    first = load_model(settings, load_tokenizer(settings)).model.state_dict()
    (source / "tokenizer.model").write_text("of another version")
    copy = copy_of(tmp_path)
    mount.fail(NOTE_OPENS)
    load_model(settings, load_tokenizer(settings))
    assert (
        sorted(opened(mount)) == ["/mine.jinja", "/tiny-llama/tokenizer.model"] and (copy / "tokenizer.model").exists()
    )
    (source / "tokenizer.model").unlink()
    changed = {name: value + 1 for name, value in load_file(source / "model.safetensors").items()}
    save_file(changed, source / "model.safetensors", metadata={"format": "pt"})
    second = load_model(settings, load_tokenizer(settings)).model.state_dict()
    assert not torch.equal(first[next(iter(first))], second[next(iter(second))])
    assert not (copy / "tokenizer.model").exists() and "tokenizer.model" not in (copy / RECORD).read_text()
    assert copy_of(tmp_path) == copy


@pytest.mark.parametrize(
    "rule",
    [
        *({"op": op, "action": "errno", "errno": "EIO", "count": 2} for op in ("getattr", "readdir", "open", "read")),
        {"op": "read", "action": "errno", "errno": "ESTALE", "count": 1, "path": "*.safetensors"},
        {"op": "read", "action": "hang", "count": 1, "path": "*.safetensors"},
        {"op": "read", "action": "short", "count": 2, "path": "*.safetensors"},
        {"op": "open", "action": "errno", "errno": "EIO", "count": 1, "path": "*.jinja"},
    ],
    ids=lambda rule: f"{rule['op']}-{rule.get('errno', rule['action'])}",
)
def test_faults_that_pass(mount, config, directory, tmp_path, rule):
    settings = config()
    mount.fail(rule)
    tokenizer = load_tokenizer(settings)
    load_model(settings, tokenizer)
    assert len(mount.faults()) == rule["count"] and tokenizer.chat_template == TEMPLATE
    copy = copy_of(tmp_path)
    for path in (directory / "tiny-llama").iterdir():
        assert (copy / path.name).read_bytes() == path.read_bytes()


def test_a_daemon_that_dies_while_the_weights_come(mount, config, tmp_path):
    mount.fail({"op": "read", "action": "crash", "path": "*.safetensors", "count": 1})

    def remount():
        mount.daemon.wait()
        mount.stop()
        time.sleep(0.5)
        mount.start()

    thread = threading.Thread(target=remount)
    thread.start()
    settings = config()
    load_model(settings, load_tokenizer(settings))
    thread.join()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            {"op": "read", "errno": "EIO", "path": "*.safetensors"},
            r"copy_in of .*model.safetensors.*EIO.*gave up after",
        ),
        ({"op": "open", "errno": "EACCES", "path": "*config.json"}, r"EACCES.*not tried again: 1 try.*permissions"),
        ({"op": "read", "errno": "EIO", "path": "/mine.jinja"}, r"read_bytes of .*mine.jinja.*EIO.*gave up after"),
    ],
)
def test_faults_that_last_end_in_one_error(mount, config, rule, message):
    mount.fail(rule | {"action": "errno"})
    settings = config(data_timeout=1.5)
    with pytest.raises(MountError, match=message):
        load_model(settings, load_tokenizer(settings))


def test_only_the_weights_that_are_loaded_come(mount, config, tmp_path):
    source = mount.backing / "tiny-llama"
    for name in ("pytorch_model.bin", "consolidated.00.pth", "optimizer.pt", "checkpoint-4/model.safetensors"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(b"never read")
    state = load_file(source / "model.safetensors")
    half = len(state) // 2
    parts = {"a.safetensors": dict(list(state.items())[:half]), "b.safetensors": dict(list(state.items())[half:])}
    for name, tensors in parts.items():
        save_file(tensors, source / name, metadata={"format": "pt"})
    (source / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {key: name for name, tensors in parts.items() for key in tensors}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    settings = config()
    tokenizer = load_tokenizer(settings)
    assert not list(copy_of(tmp_path).glob("*.safetensors"))  # a tokenizer needs none
    loaded = load_model(settings, tokenizer)
    assert {path.name for path in copy_of(tmp_path).iterdir()}.isdisjoint({"pytorch_model.bin", "consolidated.00.pth"})
    assert {path.name for path in copy_of(tmp_path).glob("*.safetensors")} == set(parts)
    found = dict(loaded.model.get_base_model().named_parameters())
    norms = [name for name in state if name.endswith("norm.weight")]
    assert norms and all(torch.equal(found[name], state[name]) for name in norms)


def test_a_manifest_beside_the_model_is_held_to(mount, config):
    (mount.backing / "tiny-llama" / "SHA256SUMS").write_text(f"{'0' * 64}  model.safetensors\n")
    settings = config()
    with pytest.raises(DataError, match=r"model.safetensors on .* is not what its manifest says"):
        load_model(settings, load_tokenizer(settings))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda model: model.rename(model.parent / "other"),
            r"base_model: there is nothing at .*tiny-llama on .*faults",
        ),
        (lambda model: (model / "model.safetensors").unlink(), r"base_model: there are no weights in .*tiny-llama"),
        (
            lambda model: (
                (model / "model.safetensors").rename(model / "part")
                and (model / "model.safetensors.index.json").write_text('{"weight_map": {"x": "part-1.safetensors"}}')
            ),
            r"index.json names part-1.safetensors, not there",
        ),
        (lambda model: (model.parent / "mine.jinja").unlink(), r"chat_template_jinja: there is no file .*mine.jinja"),
    ],
)
def test_what_is_not_there(mount, config, change, message):
    change(mount.backing / "tiny-llama")
    settings = config()
    with pytest.raises(InputError, match=message):
        load_model(settings, load_tokenizer(settings))


def test_too_little_local_disk_is_said_before_anything_is_read(mount, config, monkeypatch):
    settings = config()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    mount.fail(NOTE_OPENS)
    with pytest.raises(
        DataError, match=r"tiny-llama.* needs .* free: set XDG_CACHE_HOME to a local disk with more room"
    ):
        load_tokenizer(settings)
    assert not opened(mount)


def test_a_mount_that_is_not_there_is_not_the_local_disk(mount, config, directory):
    mount.stop()
    shutil.copytree(directory / "tiny-llama", mount.point / "tiny-llama")
    settings = config(data_mount=str(mount.point))
    with pytest.raises(InputError, match=r"base_model: .* nothing is mounted there: it would be read from"):
        load_tokenizer(settings)


def test_an_id_on_the_hub_is_one_though_the_working_directory_lies_on_a_mount(mount, config, monkeypatch):
    settings = config()
    monkeypatch.chdir(mount.point)
    assert local_directory("base_model", "owner/name", settings, weights=True) == "owner/name"
    monkeypatch.chdir("/")


def test_a_cache_of_the_hub_on_a_mount_is_refused(mount, config, directory, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(mount.point / "hub"))
    with pytest.raises(
        InputError, match=r"base_model: owner/name would be downloaded to .*hub on .*faults.* Set HF_HOME"
    ):
        local_directory("base_model", "owner/name", config(), weights=True)
    local = str(directory / "tiny-llama")
    assert local_directory("base_model", local, config(), weights=True) == local


def test_an_adapter_to_go_on_from(mount, config, directory, undisturbed, tmp_path):
    shutil.copytree(directory / "undisturbed", mount.backing / "adapter")
    keys = {"lora_model_dir": str(mount.point / "adapter"), "lora_r": None, "lora_alpha": None}
    mount.fail(NOTE_OPENS)
    train(config(**keys, lora_target_linear=None), lambda text: None)
    assert not [name for name in opened(mount) if "checkpoint-" in name]
    local = keys | {"lora_model_dir": str(directory / "undisturbed"), "output_dir": str(tmp_path / "local")}
    train(config(**local, lora_target_linear=None), lambda text: None)
    assert same(weights(tmp_path / "out"), weights(tmp_path / "local"))


def test_a_checkpoint_to_go_on_from_on_another_mount_than_the_output(mount, config, directory, undisturbed, tmp_path):
    shutil.copytree(directory / "undisturbed" / "checkpoint-2", mount.backing / "kept" / "checkpoint-2")
    local = {"base_model": str(directory / "tiny-llama"), "chat_template_jinja": str(directory / "mine.jinja")}
    mount.fail({"op": "read", "action": "errno", "errno": "EIO", "path": "*adapter_model*", "count": 2})
    report = train(
        config(resume_from_checkpoint=str(mount.point / "kept" / "checkpoint-2"), **local), lambda text: None
    )
    assert len(mount.faults()) == 2 and report.resumed_from == str(mount.point / "kept" / "checkpoint-2")
    assert same(weights(tmp_path / "out"), undisturbed)


def test_check_reads_no_weights(mount, yaml, capsys):
    mount.fail(NOTE_OPENS)
    assert cli.main(["check", str(yaml())]) == 0
    assert "--- document 1:" in capsys.readouterr().out
    assert opened(mount) and not [name for name in opened(mount) if name.endswith("safetensors")]
