"""The public functions: what they refuse, autograd, torch.library and torch.compile."""

import pytest
import torch
from torch.autograd import gradcheck

from axo_flash import flash_attn_func, flash_attn_varlen_func, ops
from axo_flash.kernels import backends
from axo_flash.kernels.spec import AttentionSpec


def tensors(seqlen_q=5, seqlen_k=7, heads=4, kv_heads=2, head_dim=8, dtype=torch.float64, batch=(2,)):
    torch.manual_seed(0)
    shapes = [(*batch, seqlen_q, heads, head_dim), *[(*batch, seqlen_k, kv_heads, head_dim)] * 2]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


CU = torch.tensor([0, 3, 3, 6], dtype=torch.int32)


@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"window_size": (2, 1)}, {"causal": True, "softmax_scale": 0.7}]
)
def test_gradcheck_dense(options):
    """out and lse, by finite differences in fp64."""

    def attention(q, k, v):
        out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True, backend="reference", **options)
        return out, lse.masked_fill(lse == -torch.inf, 0)

    assert gradcheck(attention, tensors())


def test_gradcheck_varlen():
    """One row lies behind the last sequence: no gradient there."""
    inputs = tensors(7, 7, batch=())
    assert gradcheck(lambda q, k, v: flash_attn_varlen_func(q, k, v, CU, CU, causal=True), inputs)


@pytest.mark.parametrize("varlen", [False, True])
def test_operator_contract(varlen):
    """Schema, fake kernels and autograd registration, as PyTorch checks them."""
    q, k, v = tensors(7, 7, dtype=torch.float32, batch=() if varlen else (2,))
    cu = (CU, CU) if varlen else (None, None)
    options = (*cu, 0.3, True, -1, -1, False, "reference")
    torch.library.opcheck(torch.ops.axo_flash.attention_forward, (q, k, v, *options))


@pytest.mark.parametrize("varlen", [False, True])
def test_compiles_without_a_graph_break(varlen):
    q, k, v = tensors(7, 7, dtype=torch.float32, batch=() if varlen else (2,))

    def step(q, k, v):
        out = flash_attn_varlen_func(q, k, v, CU, CU, causal=True) if varlen else flash_attn_func(q, k, v, causal=True)
        return out.square().sum()

    want = torch.autograd.grad(step(q, k, v), (q, k, v))
    got = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(q, k, v), (q, k, v))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputed_under_gradient_checkpointing(use_reentrant):
    q, k, v = tensors()

    def twice(q, k, v):
        return flash_attn_func(flash_attn_func(q, k, v, causal=True), k, v).sum()

    want = torch.autograd.grad(twice(q, k, v), (q, k, v))
    torch.utils.checkpoint.checkpoint(twice, q, k, v, use_reentrant=use_reentrant).backward()
    for leaf, grad in zip((q, k, v), want, strict=True):
        assert torch.equal(leaf.grad, grad)


def test_second_derivative_is_refused():
    q, k, v = tensors()
    (grad,) = torch.autograd.grad(flash_attn_func(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


def test_other_last_stride_is_copied():
    q, k, v = (x.detach() for x in tensors())
    odd = q.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert odd.stride(-1) != 1
    assert torch.equal(flash_attn_func(odd, k, v), flash_attn_func(q, k, v))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q, k, v: (q[0], k, v), r"q must be \(batch, seqlen, heads, head_dim\), got \(5, 4, 8\)"),
        (lambda q, k, v: (q, k, v[:, :3]), r"k and v must have one shape"),
        (lambda q, k, v: (q[..., :4], k, v), "one head_dim, got 4 and 8"),
        (lambda q, k, v: (q[:, :, :3], k, v), "multiple of k's, got 3 and 2"),
        (lambda q, k, v: (q.half(), k, v), "one dtype, got torch.float16, torch.float64"),
        (lambda q, k, v: (q.to("meta"), k, v), "one device, got meta, cpu"),
        (lambda q, k, v: (q[:1], k, v), "q has batch 1 and k has 2"),
        (lambda q, k, v: [torch.zeros(1, 2, 1, 264)] * 3, "head_dim must be 1 to 256, got 264"),
    ],
)
def test_refuses_what_does_not_fit(change, words):
    with pytest.raises(ValueError, match=words):
        flash_attn_func(*change(*(x.detach() for x in tensors())))


def test_all_errors_come_at_once():
    q, k, v = (x.detach() for x in tensors())
    with pytest.raises(ValueError, match=r"(?s)head_dim.*heads.*dtype"):
        flash_attn_func(q[:, :, :3, :4].half(), k, v)


@pytest.mark.parametrize(
    ("cu", "words"),
    [
        (CU.long(), "must be int32"),
        (CU[None], r"\(batch \+ 1,\)"),
        (CU.to("meta"), "on q's device"),
        (torch.zeros(1, dtype=torch.int32), r"\(batch \+ 1,\)"),
        (CU[:-1], "one length, got 3 and 4"),
    ],
)
def test_refuses_wrong_cu_seqlens(cu, words):
    with pytest.raises(ValueError, match=words):
        flash_attn_varlen_func(*tensors(7, 7, batch=()), cu, CU)


@pytest.mark.parametrize("option", [{"dropout_p": 0.1}, {"softcap": 30.0}, {"alibi_slopes": torch.ones(4)}])
def test_refuses_what_no_kernel_has(option):
    name = next(iter(option))
    with pytest.raises(ValueError, match=f"{name} is not supported"):
        flash_attn_func(*tensors(), **option)


def test_backend_asked_for_by_name_must_serve():
    with pytest.raises(ValueError, match="unknown attention backend 'cuda'"):
        flash_attn_func(*tensors(), backend="cuda")
    with pytest.raises(ValueError, match=r"not triton: .*dtype float64.*head_dim 12 is no multiple of 8"):
        flash_attn_func(*tensors(head_dim=12), backend="triton")


def test_auto_says_once_why_it_took_another(caplog):
    ops._say_once.cache_clear()
    for _ in range(2):
        flash_attn_func(*tensors())
    (record,) = caplog.records
    assert "'reference'" in record.message and "not triton" in record.message and "float64" in record.message


@pytest.mark.parametrize(
    ("capability", "dtype", "reason"),
    [
        ((7, 0), "float16", "compute capability 7.0 is below 7.5 (Turing)"),
        ((7, 5), "bfloat16", "bfloat16 needs compute capability 8.0 (Ampere): use float16 here"),
        ((7, 5), "float16", None),
        ((8, 0), "bfloat16", None),
    ],
)
def test_gpu_too_old_is_a_reason(monkeypatch, capability, dtype, reason):
    triton = pytest.importorskip("axo_flash.kernels.triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    spec = AttentionSpec(4, 2, 64, dtype, softmax_scale=0.1)
    assert triton.supports(spec, torch.device("cuda")) == reason


def test_missing_triton_is_a_reason(monkeypatch):
    """Without triton, `auto` computes and says so; by name, the error carries the pip command."""
    monkeypatch.setattr(backends.BACKENDS[0].__class__, "module", property(lambda row: _home(row)), raising=False)
    backends.choose_backend.cache_clear()
    try:
        spec_inputs = tensors(dtype=torch.float32)
        with pytest.raises(ValueError, match=r"triton is not installed: pip install"):
            flash_attn_func(*spec_inputs, backend="triton")
        flash_attn_func(*spec_inputs)
    finally:
        backends.choose_backend.cache_clear()


def _home(row):
    if row.name == "triton":
        raise ModuleNotFoundError("No module named 'triton'", name="triton")
    return "axo_flash.kernels.reference"
