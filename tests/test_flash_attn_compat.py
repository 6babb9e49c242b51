"""`import flash_attn` that gives axo_flash: what resolves, what is refused, and that a real flash-attn stays."""

import importlib
import importlib.metadata
import importlib.util
import subprocess
import sys

import pytest
import torch

import axo_flash
from axo_flash.flash_attn_compat import MODULES, VERSION, bert_padding, install, rotary, uninstall


@pytest.fixture
def installed():
    if importlib.util.find_spec("flash_attn") is not None:
        pytest.skip("flash-attn is installed here")
    print(install())
    yield
    uninstall()


FUNCTIONS = [name for name in axo_flash.__all__ if name.startswith("flash_attn_")]


def test_the_functions_are_ours(installed):
    import flash_attn
    from flash_attn import flash_attn_func
    from flash_attn.flash_attn_interface import _get_block_size_n, flash_attn_varlen_qkvpacked_func

    assert flash_attn_func is axo_flash.flash_attn_func
    assert flash_attn_varlen_qkvpacked_func is axo_flash.flash_attn_varlen_qkvpacked_func
    assert all(getattr(flash_attn, name) is getattr(axo_flash, name) for name in FUNCTIONS) and len(FUNCTIONS) == 6
    assert flash_attn.__version__ == importlib.metadata.version("flash_attn") == VERSION
    assert "flash-attn" in importlib.metadata.packages_distributions()["flash_attn"]
    assert torch.zeros(3, 200).split(_get_block_size_n("cpu", 64, True, False), dim=-1)[0].shape == (3, 200)


@pytest.mark.parametrize("name", MODULES)
def test_modules_resolve(installed, name):
    assert importlib.util.find_spec(name) is not None
    assert importlib.import_module(name).__name__ == name


def test_star_import(installed):
    names = {}
    exec("from flash_attn import *", names)
    assert set(FUNCTIONS) <= set(names)


def test_what_is_missing_says_so(installed):
    import flash_attn

    with pytest.raises(AttributeError, match="flash_attn is axo_flash here, which has no flash_attn_gpu"):
        flash_attn.flash_attn_gpu  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'flash_attn_gpu'"):
        exec("from flash_attn import flash_attn_gpu")
    with pytest.raises(NotImplementedError, match="does not decode in place from a KV cache yet"):
        flash_attn.flash_attn_with_kvcache(*torch.zeros(3, 1, 1, 1, 8))
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("flash_attn.cute")
    assert importlib.util.find_spec("flash_attn.ops") is None


def test_twice_is_once_and_undone_at_once(installed):
    before = list(sys.meta_path)
    assert install() == install(replace=True)
    assert sys.meta_path == before
    importlib.import_module("flash_attn.bert_padding")
    uninstall()
    assert importlib.util.find_spec("flash_attn") is None and "flash_attn.bert_padding" not in sys.modules
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("flash-attn")


@pytest.mark.parametrize("imported", [False, True])
def test_a_real_flash_attn_stays_unless_asked(tmp_path, monkeypatch, imported):
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("__version__ = '2.7.4'\n")
    (tmp_path / "flash_attn-2.7.4.dist-info").mkdir()
    (tmp_path / "flash_attn-2.7.4.dist-info" / "METADATA").write_text("Name: flash-attn\nVersion: 2.7.4\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("flash_attn", "flash_attn.bert_padding"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    real = importlib.import_module("flash_attn") if imported else None
    try:
        assert install().startswith("flash_attn 2.7.4 is installed and stays")
        assert importlib.import_module("flash_attn").__version__ == "2.7.4"
        assert "import flash_attn gives axo_flash" in install(replace=True)
        assert importlib.import_module("flash_attn").flash_attn_func is axo_flash.flash_attn_func
        assert importlib.metadata.version("flash-attn") == VERSION
    finally:
        uninstall()
    assert importlib.import_module("flash_attn").__version__ == "2.7.4"
    assert real is None or sys.modules["flash_attn"] is real
    del sys.modules["flash_attn"]


def test_a_library_that_asks_for_it_finds_it():
    """transformers looks at the metadata when it is imported: on a machine with a GPU it takes flash-attn for present."""
    code = """
import torch
from axo_flash.flash_attn_compat import install
print(install())
torch.cuda.is_available = lambda: True
from transformers.utils import is_flash_attn_2_available, is_flash_attn_greater_or_equal
print(is_flash_attn_2_available(), is_flash_attn_greater_or_equal("2.4.1"))
from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "import flash_attn gives axo_flash, with flash-attn 2.8.4's surface (flash_attn_interface, bert_padding, "
        "layers.rotary)",
        "True True",
    ]


def test_transformers_flash_attention_2_computes_by_ours():
    """A padded batch and generation by its integration of the package flash-attn, which imports it at first use."""
    code = """
import torch
from axo_flash import flash_attn_compat, ops
flash_attn_compat.install()
torch.cuda.is_available = lambda: True
from transformers import LlamaConfig, LlamaForCausalLM

shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
torch.manual_seed(0)
ours, eager, exact = (
    LlamaForCausalLM._from_config(LlamaConfig(vocab_size=100, **shape), attn_implementation=name, dtype=dtype)
    for name, dtype in (("flash_attention_2", torch.bfloat16), ("eager", torch.bfloat16), ("eager", torch.float32))
)
eager.load_state_dict(ours.state_dict())
exact.load_state_dict(ours.state_dict())
tokens, mask = torch.randint(0, 100, (2, 17)), torch.ones(2, 17, dtype=torch.long)
mask[0, :5] = 0
with torch.no_grad():
    got, plain, want = (model(tokens, attention_mask=mask).logits[mask.bool()] for model in (ours, eager, exact))
    assert (got - want).abs().max() <= 2 * (plain - want).abs().max()
    assert ops.calls.total() == 2, ops.calls
    got, want = (model.generate(tokens, attention_mask=mask, max_new_tokens=4, do_sample=False) for model in (ours, eager))
assert torch.equal(got, want) and ops.calls.total() == 2 * 5, ops.calls
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- bert_padding ---------------------------------------------------------------------------------------------------

MASK = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]])


def test_unpad_and_pad_are_inverse():
    x = torch.randn(3, 4, 2, 5, requires_grad=True)
    rows, indices, cu_seqlens, longest, used = bert_padding.unpad_input(x, MASK)
    assert torch.equal(rows, x[MASK.bool()]) and indices.tolist() == [0, 1, 2, 5, 6]
    assert cu_seqlens.tolist() == [0, 3, 5, 5] and cu_seqlens.dtype == torch.int32
    assert longest == 3 and isinstance(longest, int) and used.tolist() == [3, 2, 0]
    back = bert_padding.pad_input(rows, indices, 3, 4)
    assert torch.equal(back, x * MASK[..., None, None])
    (grad,) = torch.autograd.grad(back.sum(), x)
    assert torch.equal(grad, MASK[..., None, None].expand_as(x).float())


def test_unused_tokens_are_laid_out_and_not_counted():
    unused = torch.tensor([[0, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    _, indices, cu_seqlens, longest, used = bert_padding.unpad_input(torch.zeros(3, 4, 1), MASK.bool(), unused)
    assert indices.tolist() == [0, 1, 2, 3, 4, 5, 6] and cu_seqlens.tolist() == [0, 4, 7, 7]
    assert longest == 4 and used.tolist() == [3, 2, 0]


def test_concatenated_sequences():
    lengths = torch.tensor([[2, 1, 0, 0], [4, 0, 0, 0]])
    rows, indices, cu_seqlens, longest = bert_padding.unpad_input_for_concatenated_sequences(
        torch.arange(8.0).view(2, 4, 1), lengths
    )
    assert rows.flatten().tolist() == indices.tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert cu_seqlens.tolist() == [0, 2, 3, 7] and longest == 4


def test_rows_by_index():
    x, indices = torch.randn(5, 2, dtype=torch.float64, requires_grad=True), torch.tensor([4, 0])
    assert torch.autograd.gradcheck(lambda x: bert_padding.index_first_axis(x, indices), x)
    assert torch.autograd.gradcheck(lambda x: bert_padding.index_put_first_axis(x[:2], indices, 6), x)
    rows, residual = bert_padding.index_first_axis_residual(x, indices)
    (grad,) = torch.autograd.grad(rows.sum() + 2 * residual.sum(), x)
    assert grad[:, 0].tolist() == [3, 2, 2, 2, 3]


# --- rotary ---------------------------------------------------------------------------------------------------------


def rotated(x, positions, angles, interleaved):
    """By complex multiplication, in fp64."""
    half = angles.shape[1]
    pairs = x[..., : 2 * half].double()
    pairs = pairs.unflatten(-1, (half, 2)) if interleaved else pairs.unflatten(-1, (2, half)).mT
    turned = (
        torch.view_as_complex(pairs.contiguous())
        * torch.polar(torch.ones_like(angles), angles)[positions][..., None, :]
    )
    turned = torch.view_as_real(turned)
    return torch.cat([turned.flatten(-2) if interleaved else turned.mT.flatten(-2), x[..., 2 * half :].double()], -1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("half", [3, 4])
def test_rotary(interleaved, half):
    torch.manual_seed(0)
    angles = torch.rand(20, half, dtype=torch.float64) * 6
    cos, sin = angles.cos().float(), angles.sin().float()
    x = torch.randn(2, 7, 3, 8, requires_grad=True)
    for offsets in (0, 5, torch.tensor([2, 9])):
        out = rotary.apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=offsets)
        positions = torch.arange(7) + torch.as_tensor(offsets)[..., None]
        torch.testing.assert_close(out, rotated(x, positions, angles, interleaved).float())
    # a rotation: its transpose takes it back
    (back,) = torch.autograd.grad(out, x, out)
    torch.testing.assert_close(back, x)
    rows, cu_seqlens = x.detach().flatten(0, 1).clone(), torch.tensor([0, 5, 5, 12], dtype=torch.int32)
    out = rotary.apply_rotary_emb(rows, cos, sin, interleaved, True, torch.tensor([1, 0, 3]), cu_seqlens, 7)
    assert out is rows
    positions = torch.cat([torch.arange(1, 6), torch.arange(3, 10)])
    torch.testing.assert_close(out[:12], rotated(x.detach().flatten(0, 1)[:12], positions, angles, interleaved).float())


def test_rotary_leaves_what_lies_behind_the_sequences():
    x, table = torch.randn(6, 1, 4), torch.rand(6, 2)
    out = rotary.apply_rotary_emb(x, table, table, cu_seqlens=torch.tensor([0, 4], dtype=torch.int32))
    assert torch.equal(out[4:], x[4:]) and not torch.equal(out[:4], x[:4])


def test_rotary_refuses_what_does_not_fit():
    x, table = torch.zeros(1, 6, 1, 4), torch.zeros(6, 2)
    with pytest.raises(ValueError, match=r"6 positions, for tokens at 1 ... 6"):
        rotary.apply_rotary_emb(x, table, table, seqlen_offsets=1)
    with pytest.raises(ValueError, match=r"must be \(positions, up to 2\), got \(6, 3\)"):
        rotary.apply_rotary_emb(x, torch.zeros(6, 3), torch.zeros(6, 3))
    with pytest.raises(ValueError, match=r"got \(6, 2\) and \(6, 1\)"):
        rotary.apply_rotary_emb(x, table, table[:, :1])
