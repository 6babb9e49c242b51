"""The functions for packed tensors: what flash_attn_func gives for their parts, and one gradient."""

import inspect

import pytest
import torch

import axo_flash
from axo_flash import ops

CU = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
OPTIONS = {
    "softmax_scale": 0.4,
    "causal": True,
    "window_size": (3, 1),
    "softcap": 2.0,
    "alibi_slopes": torch.rand(4),
    "dropout_p": 0.2,
    "return_attn_probs": True,
}


@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize("packed", ["qkvpacked", "kvpacked"])
def test_equals_the_function_of_the_parts(packed, varlen):
    torch.manual_seed(0)
    rows = (7,) if varlen else (2, 7)
    q = torch.randn(*rows, 4, 8, requires_grad=True)
    kv = torch.randn(*rows, 2, 4 if packed == "qkvpacked" else 2, 8, requires_grad=True)
    sinks = torch.randn(4)
    function = getattr(axo_flash, f"flash_attn_{'varlen_' * varlen}{packed}_func")
    plain = axo_flash.flash_attn_varlen_func if varlen else axo_flash.flash_attn_func
    lengths = (CU, CU, 4, 4) if varlen else ()
    torch.manual_seed(1)
    out, lse, dropped = plain(q, *kv.unbind(-3), *lengths, **OPTIONS, sinks=sinks)
    want = torch.autograd.grad(out.square().sum(), (q, kv))
    torch.manual_seed(1)
    if packed == "qkvpacked":
        qkv = torch.cat([q.unsqueeze(-3), kv], -3).detach().requires_grad_()
        result = function(qkv, *((CU, 4) if varlen else ()), **OPTIONS, sinks=sinks)
        (dqkv,) = torch.autograd.grad(result[0].square().sum(), qkv)
        got = dqkv.select(-3, 0), dqkv.narrow(-3, 1, 2)
    else:
        result = function(q, kv, *lengths, **OPTIONS, sinks=sinks)
        got = torch.autograd.grad(result[0].square().sum(), (q, kv))
    for a, b in zip((*result, *got), (out, lse, dropped, *want), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("name", "shapes", "words"),
    [
        ("qkvpacked", [(2, 7, 2, 4, 8)], r"qkv must be \(batch, seqlen, 3, heads, head_dim\), got \(2, 7, 2, 4, 8\)"),
        (
            "kvpacked",
            [(2, 7, 4, 8), (7, 2, 4, 8)],
            r"kv must be \(batch, seqlen, 2, heads, head_dim\), got \(7, 2, 4, 8\)",
        ),
        ("varlen_qkvpacked", [(2, 7, 3, 4, 8)], r"qkv must be \(total, 3, heads, head_dim\), got \(2, 7, 3, 4, 8\)"),
    ],
)
def test_refuses_other_shapes(name, shapes, words):
    with pytest.raises(ValueError, match=words):
        lengths = (CU, 4) if "varlen" in name else ()
        getattr(axo_flash, f"flash_attn_{name}_func")(*map(torch.zeros, shapes), *lengths)


TAIL = [
    ("dropout_p", 0.0),
    ("softmax_scale", None),
    ("causal", False),
    ("window_size", (-1, -1)),
    ("softcap", 0.0),
    ("alibi_slopes", None),
    ("deterministic", False),
    ("return_attn_probs", False),
]


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("flash_attn_func", "q k v", []),
        ("flash_attn_kvpacked_func", "q kv", []),
        ("flash_attn_qkvpacked_func", "qkv", []),
        (
            "flash_attn_varlen_func",
            "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k",
            [("block_table", None)],
        ),
        ("flash_attn_varlen_kvpacked_func", "q kv cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k", []),
        ("flash_attn_varlen_qkvpacked_func", "qkv cu_seqlens max_seqlen", []),
    ],
)
def test_signatures_are_flash_attns(name, first, last):
    """Names, order and defaults of 2.8.4; what is ours comes by keyword."""
    parameters = inspect.signature(getattr(axo_flash, name)).parameters.values()
    theirs = [p for p in parameters if p.kind is not p.KEYWORD_ONLY]
    names = first.split()
    assert [p.name for p in theirs[: len(names)]] == names
    assert [(p.name, p.default) for p in theirs[len(names) :]] == TAIL + last
    assert [p.name for p in parameters if p.kind is p.KEYWORD_ONLY] == ["sinks", "backend"]


def test_views_go_in_without_copies(monkeypatch):
    pointers = []
    original = ops._backend_for

    def spy(q, k, *arguments):
        pointers.extend((q.data_ptr(), k.data_ptr()))
        return original(q, k, *arguments)

    monkeypatch.setattr(ops, "_backend_for", spy)
    qkv = torch.randn(2, 7, 3, 4, 8)
    axo_flash.flash_attn_qkvpacked_func(qkv)
    assert pointers == [qkv[:, :, 0].data_ptr(), qkv[:, :, 1].data_ptr()]
