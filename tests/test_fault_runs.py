"""The long run's own parts (scripts/faults): its matrix covers what it says, and its judge can find what it looks for."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts" / "faults"))
pytest.importorskip("matplotlib")

import cells
from axo_flash.checkpoints.identity import Identity
from axo_flash.checkpoints.manifest import seal
from judge import Judge, Reference, read_journal, unclear_error
from stacks import weights_digest

DEEDS = ("crash, remount", "killed, remount", "unmounted, remount", "freeze, thaw", "helper killed", "damaged newest")


def test_every_kind_of_fault_is_tried_in_every_phase_that_can_have_it():
    cases = cells.matrix(range(6), kill_cases=6)
    assert len({case.key for case in cases}) == len(cases)
    assert {case.pattern for case in cases} == set(cells.PATTERNS) and {case.cached for case in cases} == {True, False}
    faults = [case for case in cases if case.phase != "killed"]
    assert {case.phase for case in faults} == set(cells.PHASES) and {case.kind for case in faults} == set(cells.KINDS)
    for case in faults:
        told = cells.rules(case)
        assert told == cells.rules(case)  # the seed decides
        assert told or case.kind in DEEDS


@pytest.fixture
def saved(tmp_path):
    """(a judge, an output with a whole checkpoint of step 2, its weights file)"""
    checkpoint = tmp_path / "out" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    weights = checkpoint / "adapter_model.safetensors"
    save_file({"a": torch.arange(4.0)}, weights)
    seal(checkpoint, 2, 1, 1, Identity({}, "", ""))
    reference = Reference({0: "x", 1: "y"}, {2: weights_digest(weights)}, weights_digest(weights))
    return Judge("axo_flash", reference), tmp_path / "out", weights


def test_the_judge_is_content_with_what_is_right(saved):
    judge, output, _ = saved
    journal = [{"event": "batch", "step": 0, "sha": "x"}, {"event": "saved", "step": 2}]
    assert judge.violations(output, journal) == []


def test_the_judge_finds_what_is_wrong(saved):
    judge, output, weights = saved
    assert judge.violations(output, [{"event": "batch", "step": 1, "sha": "x"}]) == ["wrong rows"]
    assert judge.violations(output, [{"event": "resumed", "step": 2, "sha": "other"}]) == ["resumed from a broken one"]
    assert judge.violations(output, [{"event": "saved", "step": 4}]) == ["checkpoint lost"]
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + b"\x7f")
    assert judge.violations(output, [{"event": "saved", "step": 2}]) == ["checkpoint lost"]
    (weights.parent / "manifest.json").unlink()
    seal(weights.parent, 2, 1, 1, Identity({}, "", ""))  # whole by its manifest, with other weights
    assert judge.violations(output, []) == ["false checkpoint"]


def test_an_error_is_one_line_with_a_path():
    assert not unclear_error("step 2\nerror: read of /mnt/a failed\n")
    assert unclear_error("Traceback (most recent call last):\nerror: read of /mnt/a failed")
    assert unclear_error("") and unclear_error("error: bad") and unclear_error("error: /a\nerror: /b")


def test_a_journal_that_a_kill_cut_short(tmp_path):
    (tmp_path / "journal").write_text(json.dumps({"event": "saved", "step": 2}) + '\n{"event": "sa')
    assert read_journal(tmp_path / "journal") == [{"event": "saved", "step": 2}]
