"""The public functions: what they refuse, autograd, torch.library and torch.compile."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from axo_flash import flash_attn_func, flash_attn_varlen_func, ops
from axo_flash.kernels import backends
from axo_flash.kernels.spec import AttentionSpec


def tensors(seqlen_q=5, seqlen_k=7, heads=4, kv_heads=2, head_dim=8, dtype=torch.float64, batch=(2,)):
    torch.manual_seed(0)
    shapes = [(*batch, seqlen_q, heads, head_dim), *[(*batch, seqlen_k, kv_heads, head_dim)] * 2]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


EXTRAS = [
    {"softcap": 1.5},
    {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625])},
    {"dropout_p": 0.3},
    {"sinks": torch.tensor([0.3, -1.0, 0.0, 2.0], dtype=torch.float64, requires_grad=True)},
]
ALL = {name: value for extra in EXTRAS for name, value in extra.items()}
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


@pytest.mark.parametrize("extra", [*EXTRAS, ALL], ids=lambda e: "-".join(e))
def test_gradcheck_of_what_goes_beyond(extra):
    """out and lse, with every option of its own and all together, to q, k, v and the sinks."""
    q, k, v = tensors(4, 5)
    sinks = extra.get("sinks")

    def attention(q, k, v, *sinks):
        torch.manual_seed(3)
        options = extra | ({"sinks": sinks[0]} if sinks else {})
        out, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True, backend="reference", **options)
        return out, lse

    assert gradcheck(attention, [q, k, v] if sinks is None else [q, k, v, sinks], fast_mode=True)


def test_gradcheck_varlen_with_everything():
    q, k, v = tensors(7, 7, batch=())
    slopes = torch.rand(3, 4)

    def attention(q, k, v, sinks):
        torch.manual_seed(3)
        return flash_attn_varlen_func(q, k, v, CU, CU, **ALL | {"alibi_slopes": slopes, "sinks": sinks})

    assert gradcheck(attention, [q, k, v, ALL["sinks"]], fast_mode=True)


@pytest.mark.parametrize("head_dim", [8, 12])
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("varlen", [False, True])
def test_operator_contract(varlen, extras, head_dim):
    """Schema, fake kernels and autograd registration, as PyTorch checks them."""
    q, k, v = tensors(7, 7, dtype=torch.float32, batch=() if varlen else (2,), head_dim=head_dim)
    cu = (CU, CU) if varlen else (None, None)
    given = (torch.ones(4), torch.zeros(4, requires_grad=True), torch.tensor([5])) if extras else (None,) * 3
    options = (*cu, *given, 0.3, True, -1, -1, 2.0 * extras, 0.5 * extras, False, "reference")
    torch.library.opcheck(torch.ops.axo_flash.attention_forward, (q, k, v, *options))
    if extras:
        plain = (x.detach() if isinstance(x, torch.Tensor) else x for x in (q, k, 128, 128, *options))
        torch.library.opcheck(torch.ops.axo_flash.attention_dropped, tuple(plain))


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("varlen", [False, True])
def test_compiles_without_a_graph_break(varlen, extras):
    q, k, v = tensors(7, 7, dtype=torch.float32, batch=() if varlen else (2,))
    sinks = torch.zeros(4, requires_grad=True)
    options = {"causal": True} | (ALL | {"sinks": sinks, "return_attn_probs": True} if extras else {})

    def step(q, k, v):
        attention, lengths = (flash_attn_varlen_func, (CU, CU, 3, 3)) if varlen else (flash_attn_func, ())
        out = attention(q, k, v, *lengths, **options)
        if extras:
            out, lse, dropped = out
            assert dropped.shape == (3 if varlen else 2, 4, 128, 128)
            return out.square().sum() + lse.masked_fill(lse == -torch.inf, 0).sum()
        return out.square().sum()

    inputs = (q, k, v, sinks) if extras else (q, k, v)
    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        results.append(torch.autograd.grad(run(q, k, v), inputs))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_a_backward_can_be_compiled_by_itself():
    """Compiled autograd traces through the autograd function, and is to find an operator there."""
    from torch._dynamo import compiled_autograd

    inputs = [torch.randn(1, 8, 2, 16, requires_grad=True) for _ in range(3)]

    def gradients():
        return torch.autograd.grad(flash_attn_func(*inputs, causal=True).sum(), inputs)

    want = gradients()
    with compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
        got = gradients()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputed_under_gradient_checkpointing(use_reentrant):
    q, k, v = tensors()

    def twice(q, k, v):
        return flash_attn_func(flash_attn_func(q, k, v, causal=True), k, v).sum()

    want = torch.autograd.grad(twice(q, k, v), (q, k, v))
    torch.utils.checkpoint.checkpoint(twice, q, k, v, use_reentrant=use_reentrant).backward()
    for leaf, grad in zip((q, k, v), want, strict=True):
        assert torch.equal(leaf.grad, grad)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_drops_the_same_again(use_reentrant):
    q, k, v = tensors()

    def attention(q, k, v):
        return flash_attn_func(q, k, v, 0.4).sum()

    torch.manual_seed(4)
    want = torch.autograd.grad(attention(q, k, v), (q, k, v))
    torch.manual_seed(4)
    torch.utils.checkpoint.checkpoint(attention, q, k, v, use_reentrant=use_reentrant).backward()
    for leaf, grad in zip((q, k, v), want, strict=True):
        assert torch.equal(leaf.grad, grad)


def test_the_seed_is_torchs():
    """One seed repeats the mask, the next call has another, and without dropout nothing is drawn."""
    inputs = tensors()
    torch.manual_seed(4)
    first, second = (flash_attn_func(*inputs, 0.4) for _ in range(2))
    torch.manual_seed(4)
    assert torch.equal(flash_attn_func(*inputs, 0.4), first)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    flash_attn_func(*inputs)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("varlen", [False, True])
def test_the_dropped_entries_are_told_as_flash_attn_tells_them(varlen):
    q, k, v = tensors(6, 6, dtype=torch.float32, batch=() if varlen else (2,))
    if varlen:
        out, lse, signed = flash_attn_varlen_func(q, k, v, CU, CU, 3, 3, 0.4, causal=True, return_attn_probs=True)
        out, lse, q, k, v = out[:3][None], lse[None, :, :3], q[:3][None], k[:3][None], v[:3][None]
    else:
        out, lse, signed = flash_attn_func(q, k, v, 0.4, causal=True, return_attn_probs=True)
    batch, seqlen = q.shape[:2]
    assert signed.shape == (3 if varlen else 2, 4, 128, 128) and not signed.requires_grad
    assert not signed[:, :, seqlen:].any() and not signed[:, :, :, seqlen:].any() and not signed.triu(1).any()
    signed = signed[:batch, :, :seqlen, :seqlen]
    assert (signed < 0).any() and (signed > 0).any()
    k, v = (x.repeat_interleave(2, 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 8**-0.5
    scores = scores.masked_fill(torch.ones(seqlen, seqlen).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(signed.abs(), (scores - scores.amax(-1, keepdim=True)).exp())
    kept = scores.softmax(-1) * (signed > 0) / 0.6
    torch.testing.assert_close(out, torch.einsum("bhqk,bkhd->bqhd", kept, v))
    torch.testing.assert_close(lse, scores.logsumexp(-1))


class Listener(TorchDispatchMode):
    """Takes down which of our operators are called."""

    def __init__(self):
        super().__init__()
        self.heard = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "axo_flash":
            self.heard.append(function.__name__)
        return function(*args, **(kwargs or {}))


class Marked(torch.Tensor):
    """A tensor of another kind."""


OPERATORS = ["attention_forward.default", "attention_backward.default"]


def test_who_listens_hears_the_operators():
    """Eager calls leave the dispatcher out only where nobody would notice: what selective checkpointing and profilers see."""
    q, k, v = tensors()
    with Listener() as mode:
        flash_attn_func(q, k, v).sum().backward()
    assert mode.heard == OPERATORS
    with torch.profiler.profile() as profile:
        flash_attn_func(q, k, v).sum().backward()
    assert {f"axo_flash::{name.removesuffix('.default')}" for name in OPERATORS} <= {
        e.key for e in profile.key_averages()
    }


def test_a_plain_call_needs_no_dispatcher(monkeypatch):
    inputs = tensors()
    expected = torch.autograd.grad(flash_attn_func(*inputs).sum(), inputs)
    monkeypatch.setattr(ops, "_FORWARD", None)
    monkeypatch.setattr(ops, "_BACKWARD", None)
    for gradient, other in zip(torch.autograd.grad(flash_attn_func(*inputs).sum(), inputs), expected, strict=True):
        assert torch.equal(gradient, other)


def test_tensors_of_other_kinds_go_through_the_dispatcher():
    q, k, v = (x.detach() for x in tensors())
    assert isinstance(flash_attn_func(q.as_subclass(Marked), k, v), Marked)
    out = flash_attn_func(*(x.to("meta") for x in (q, k, v)))
    assert out.is_meta and out.shape == q.shape


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


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"dropout_p": 1.0}, "dropout_p must be at least 0 and below 1, got 1.0"),
        ({"dropout_p": -0.1}, "dropout_p must be at least 0 and below 1, got -0.1"),
        ({"softcap": -1.0}, "softcap must be 0 .off. or positive"),
        ({"alibi_slopes": torch.ones(3)}, r"alibi_slopes must be float32 \(4,\) or \(2, 4\), got torch.float32 \(3,\)"),
        ({"alibi_slopes": torch.ones(4).half()}, "alibi_slopes must be float32"),
        ({"alibi_slopes": torch.ones(4, device="meta")}, "alibi_slopes must be on q's device cpu, got meta"),
        ({"alibi_slopes": torch.ones(4, requires_grad=True)}, "alibi_slopes get no gradient.*detach them"),
        ({"sinks": torch.ones(2, 4)}, r"sinks must be floating point \(4,\), got torch.float32 \(2, 4\)"),
        ({"sinks": torch.ones(4, dtype=torch.int32)}, "sinks must be floating point"),
    ],
)
def test_refuses_options_that_cannot_be(option, words):
    with pytest.raises(ValueError, match=words):
        flash_attn_func(*tensors(), **option)


def test_varlen_refuses_what_it_cannot_tell():
    inputs = tensors(7, 7, batch=())
    with pytest.raises(ValueError, match="return_attn_probs with dropout needs max_seqlen_q and max_seqlen_k"):
        flash_attn_varlen_func(*inputs, CU, CU, dropout_p=0.1, return_attn_probs=True)


def test_backend_asked_for_by_name_must_serve():
    with pytest.raises(ValueError, match="unknown attention backend 'cuda'"):
        flash_attn_func(*tensors(), backend="cuda")
    with pytest.raises(ValueError, match=r"not triton: .*dtype float64"):
        flash_attn_func(*tensors(), backend="triton")


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
    ops._choice.cache_clear()
    try:
        spec_inputs = tensors(dtype=torch.float32)
        with pytest.raises(ValueError, match=r"triton is not installed: pip install"):
            flash_attn_func(*spec_inputs, backend="triton")
        flash_attn_func(*spec_inputs)
    finally:
        ops._choice.cache_clear()


def _home(row):
    if row.name == "triton":
        raise ModuleNotFoundError("No module named 'triton'", name="triton")
    return "axo_flash.kernels.reference"
