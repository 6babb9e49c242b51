"""Every backend of the table against the definition: dense, GQA, causal, windows, varlen, empty sequences, odd sizes."""

import importlib

import pytest
import torch
from attention_cases import Case, check

from axo_flash.kernels.backends import BACKENDS, choose_backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TABLE = [row.name for row in BACKENDS]
F16 = torch.float16  # only: the interpreter truncates where it should round to bfloat16; tests/gpu has both


def serves(backend: str, case: Case) -> str:
    """The backend's name, if it computes this case on the device of these tests; otherwise the test is skipped, and says
    why. (tests/gpu runs every backend where it does.)"""
    try:
        return choose_backend(case.spec(), torch.device(DEVICE), backend).name
    except ValueError as error:
        if backend in ("triton", "reference"):
            raise
        pytest.skip(str(error))


CASES = [
    *(Case(head_dim=d, seqlen=(35, 50), causal=True) for d in (8, 24, 40, 64, 80, 96, 128, 192, 256)),
    *(
        Case(seqlen=(a, b), causal=c)
        for a, b in ((1, 1), (3, 3), (1, 97), (97, 1), (97, 113), (113, 97))
        for c in (False, True)
    ),
    *(Case(heads=h, batch=2, seqlen=(33, 33), causal=True) for h in ((4, 4), (4, 2), (6, 1))),
    *(Case(window=w, seqlen=(97, 80)) for w in ((10, -1), (-1, 7), (5, 9), (0, 0), (200, 200))),
    *(Case(window=(w, -1), causal=True, head_dim=32) for w in (0, 1, 16, 31, 96, 97)),
    Case(window=(3, 20), causal=True, seqlen=(60, 90)),
    Case(scale=0.7, head_dim=16),
    *(
        Case(lengths=lengths, tail=tail, causal=causal, window=window, head_dim=32)
        for lengths in (((33, 33), (7, 7), (50, 50)), ((0, 0), (33, 20), (1, 1), (0, 9), (12, 0), (20, 40)))
        for tail in ((0, 0), (5, 11))
        for causal, window in ((False, (-1, -1)), (True, (-1, -1)), (True, (8, -1)))
    ),
    Case(
        lengths=((3, 3),) * 140, causal=True, head_dim=16, heads=(1, 1)
    ),  # more sequences than one chunk of the search
    Case(lengths=((0, 0), (0, 0)), tail=(4, 4), head_dim=16),
    # columns of zeros behind a head_dim that no kernel loads
    *(Case(head_dim=d, seqlen=(33, 40), causal=True) for d in (59, 111)),
]
DOCUMENTS = ((0, 0), (33, 20), (1, 1), (0, 9), (12, 0), (20, 40))
EXTRAS = [
    *(
        Case(head_dim=16, batch=2, seqlen=s, causal=c, window=w, **extra)
        for extra, s, c, w in (
            ({"softcap": 2.0}, (40, 33), True, (9, -1)),
            ({"alibi": "heads"}, (33, 40), False, (-1, -1)),
            ({"alibi": "batch"}, (40, 33), True, (-1, -1)),
            ({"sinks": True}, (40, 33), True, (9, -1)),
            ({"dropout": 0.17}, (33, 40), False, (-1, -1)),
        )
    ),
    *(
        Case(head_dim=16, lengths=DOCUMENTS, tail=(5, 3), causal=True, **extra)
        for extra in ({"softcap": 2.0}, {"alibi": "batch"}, {"sinks": True}, {"dropout": 0.17})
    ),
    Case(head_dim=59, softcap=3.0, alibi="batch", sinks=True, dropout=0.4, lengths=DOCUMENTS, tail=(2, 7)),
    Case(heads=(2, 2), seqlen=(50, 70), softcap=3.0, alibi="heads", sinks=True, dropout=0.1, causal=True),
]


@pytest.mark.parametrize("backend", TABLE)
@pytest.mark.parametrize("case", CASES + EXTRAS, ids=str)
def test_against_definition(case, backend):
    check(case, serves(backend, case), DEVICE)


@pytest.mark.parametrize("empty", [(0, 5, 5), (2, 0, 5), (2, 5, 0)], ids=["batch", "seqlen_q", "seqlen_k"])
@pytest.mark.parametrize("backend", TABLE)
def test_nothing_to_do(empty, backend):
    batch, seqlen_q, seqlen_k = empty
    case = Case(batch=batch, seqlen=(seqlen_q, seqlen_k))
    check(case, serves(backend, case), DEVICE)


@pytest.mark.parametrize("backend", TABLE)
def test_lse_gradient(backend):
    """d(out . dout + lse . dlse) against autograd through the formula."""
    from axo_flash import flash_attn_func

    serves(backend, Case())
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 40, 2, 64, device=DEVICE, dtype=F16, requires_grad=True) for _ in range(3))
    dout, dlse = torch.randn(1, 40, 2, 64, device=DEVICE), torch.randn(1, 2, 40, device=DEVICE)
    out, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True, backend=backend)
    got = torch.autograd.grad((out.float() * dout.half()).sum() + (lse * dlse).sum(), (q, k, v))
    q64, k64, v64 = (x.detach().double().requires_grad_() for x in (q, k, v))
    s = torch.einsum("bqhd,bkhd->bhqk", q64, k64) * 64**-0.5
    s = s.masked_fill(torch.ones(40, 40, dtype=torch.bool, device=DEVICE).triu(1), -torch.inf)
    out64 = torch.einsum("bhqk,bkhd->bqhd", s.softmax(-1), v64)
    want = torch.autograd.grad((out64 * dout.half()).sum() + (s.logsumexp(-1) * dlse).sum(), (q64, k64, v64))
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() < 2e-3 * b.abs().max()


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_lse_has_the_sinks_and_they_its_gradient(backend):
    from axo_flash import flash_attn_func

    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 20, 2, 16, device=DEVICE, dtype=F16) for _ in range(3))
    sinks = torch.tensor([0.5, -1.0], device=DEVICE, requires_grad=True)
    _, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True, sinks=sinks, backend=backend)
    _, without, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True, backend=backend)
    want = torch.logaddexp(without, sinks[:, None])
    torch.testing.assert_close(lse, want, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(lse)
    got, want = (torch.autograd.grad((x * weights).sum(), sinks)[0] for x in (lse, want))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_bfloat16():
    """Within what truncating to bfloat16 (8 bits), as the interpreter does, can cost; tests/gpu holds it to the tolerance."""
    from attention_cases import Inputs, run_backend

    case = Case(dtype=torch.bfloat16, seqlen=(70, 70), causal=True)
    inputs = Inputs(case, DEVICE)
    for got, want in zip(*(run_backend(case, inputs, name) for name in ("triton", "reference")), strict=True):
        assert (got.float() - want.float()).norm() < 2**-6 * want.float().norm()


def test_bit_equal_from_run_to_run():
    from attention_cases import Inputs, run_backend

    case = Case(heads=(4, 2), seqlen=(97, 97), causal=True)
    inputs = Inputs(case, DEVICE)
    first = run_backend(case, inputs, "triton")
    assert all(torch.equal(a, b) for a, b in zip(first, run_backend(case, inputs, "triton"), strict=True))


def _served(name: str, spec) -> bool:
    row = next(row for row in BACKENDS if row.name == name)
    return importlib.import_module(row.module).supports(spec, torch.device(DEVICE)) is None


def test_backends_pair():
    """Any forward pairs with any backward: out and lse of one serve the other's backward."""
    from attention_cases import Inputs

    case = Case(causal=True)
    inputs, spec = Inputs(case, DEVICE), case.spec()
    modules = [choose_backend(spec, torch.device(DEVICE), name).module for name in TABLE if _served(name, spec)]
    forwards = [m.forward(inputs.q, inputs.k, inputs.v, spec=spec) for m in modules]
    grads = [m.backward(inputs.dout, inputs.q, inputs.k, inputs.v, *f, spec=spec) for m in modules for f in forwards]
    for other in grads[1:]:
        for a, b in zip(other, grads[0], strict=True):
            torch.testing.assert_close(a, b, atol=5e-3, rtol=5e-3)
