"""The report's file, table and picture."""

import json
import struct
import sys

from axo_flash.report import (
    AttentionFacts,
    RunReport,
    Sample,
    attention_line,
    config_hash,
    duration,
    plot_losses,
    sample_text,
    table,
    train_loss_line,
    versions,
)

STEPS = [{"step": step, "loss": 3 - step / 10} for step in range(1, 9)]
HISTORY = [{"step": 0, "eval_loss": 3.0}, *STEPS, {"step": 8, "eval_loss": 2.0}]


def test_config_hash_changes_with_every_value():
    base = {"learning_rate": 1e-4, "datasets": [{"path": "a"}]}
    assert config_hash(base) == config_hash(dict(reversed(base.items())))
    assert config_hash(base) != config_hash(base | {"learning_rate": 2e-4})
    assert config_hash(base) != config_hash(base | {"datasets": [{"path": "b"}]})


def test_write_is_json_and_replaces(tmp_path):
    report = RunReport(status="running", config={"seed": 1}, seed=1, versions=versions(), device="a CPU")
    report.write(tmp_path / "out")
    report.status, report.attention = "finished", AttentionFacts("axo_fa", 2, "reference", "why", {"reference": 4})
    path = report.write(tmp_path / "out")
    saved = json.loads(path.read_text())
    assert saved["status"] == "finished"
    assert saved["attention"]["calls"] == {"reference": 4}
    assert [file.name for file in path.parent.iterdir()] == ["run_report.json"]


def test_versions_name_what_is_installed():
    import torch
    import transformers

    found = versions()
    assert found["torch"] == torch.__version__
    assert found["transformers"] == transformers.__version__
    assert {"axo_flash", "python", "triton", "peft"} <= set(found)


def test_attention_line_tells_a_fallback():
    right = AttentionFacts("axo_fa", 30, "triton", "the best there is", {"triton": 120})
    assert "30 layers" in attention_line(right)
    assert "120 calls, none fell back" in attention_line(right)
    wrong = AttentionFacts("axo_fa", 30, "triton", "the best there is", {"triton": 118, "reference": 2})
    assert "2 of them elsewhere" in attention_line(wrong)
    assert "Hugging Face's sdpa" in attention_line(AttentionFacts("sdpa", 30, reason="as asked"))


def test_train_loss_names_the_two_steps_it_comes_from():
    report = RunReport("finished", {}, 1, {}, "a CPU", first_loss=2.9, last_loss=2.2, history=HISTORY)
    assert train_loss_line(report) == "2.9000 -> 2.2000 (logged at steps 1 and 8)"
    assert train_loss_line(RunReport("finished", {}, 1, {}, "a CPU")) == "- -> -"


def test_table_aligns_and_wraps():
    text = table([("a", "short"), ("longer", "word " * 30 + "\nsecond line")], columns=60)
    lines = text.splitlines()
    assert lines[0] == "a       short"
    assert all(len(line) <= 60 for line in lines)
    assert all(line.startswith("        ") for line in lines[2:])
    assert lines[-1] == "        second line"


def test_sample_text_leaves_out_what_there_is_not():
    assert "after" not in sample_text(Sample("q", "e", "b"))
    assert sample_text(Sample("q", "e", "", "a")).splitlines()[2] == "before       (nothing)"


def test_duration():
    assert [duration(s) for s in (0.44, 12.3, 99.4, 185, 7385)] == ["0.4 s", "12 s", "99 s", "3:05", "2:03:05"]


def test_plot_is_a_picture(tmp_path):
    assert plot_losses(HISTORY, tmp_path / "loss.png", "tiny") is None
    head = (tmp_path / "loss.png").read_bytes()[:24]
    assert head.startswith(b"\x89PNG")
    assert struct.unpack(">II", head[16:]) == (1200, 675)


def test_plot_without_matplotlib_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert 'pip install "axo-flash[plot]"' in plot_losses(HISTORY, tmp_path / "loss.png", "tiny")
    assert not (tmp_path / "loss.png").exists()


def test_plot_without_losses(tmp_path):
    assert plot_losses([], tmp_path / "loss.png", "tiny") == "no loss was logged"
