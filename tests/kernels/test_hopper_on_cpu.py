"""The Hopper kernels' own source, run without a GPU by gluon_interpreter.py: right numbers, in whatever order things happen,
and nobody waits for ever. What their assembly and their layouts do, tests/gpu shows."""

import random
import re

import gluon_interpreter
import pytest
import torch
from attention_cases import Case, Inputs, check

from axo_flash import flash_attn_func, flash_attn_varlen_func
from axo_flash.kernels import hopper
from axo_flash.kernels.hopper import launch
from axo_flash.ops import _choice

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is off where there is a GPU")
GLUON = {getattr(launch, name): name for name in ("forward_kernel", "backward_kernel", "dq_kernel")}
DOCUMENTS = ((300, 300), (1, 1), (0, 0), (129, 129), (64, 64), (70, 200), (9, 0), (0, 5))
F16, BF16 = torch.float16, torch.bfloat16
CASES = [
    Case(64, F16, (2, 2), 1, (200, 200)),
    Case(128, BF16, (2, 1), 1, (400, 400), True),
    Case(128, F16, (2, 1), 1, (130, 300), True, (100, -1)),
    Case(64, F16, (4, 2), 2, (300, 130), False, (33, 5)),
    Case(64, BF16, (2, 2), lengths=DOCUMENTS, tail=(70, 33), causal=True),
    Case(128, F16, (4, 1), lengths=DOCUMENTS, tail=(5, 9), causal=True),
]
ONE, TWO = "one kernel", "two kernels"  # backward: launch.in_two
# Statements, and what happens without each.
NEEDED = [
    (ONE, "bar_arrive(DO_FREE + slot, 384)", "nobody can go on"),
    (ONE, "bar_arrive(K_FREE + next_slot, EVERYONE)", "nobody can go on"),
    (ONE, "mbarrier.arrive(k_empty, count=1)", "nobody can go on"),
    (ONE, "bar_sync(V_FREE, 384)", "arrivals left|more arrivals than"),
    (ONE, "mbarrier.wait(ds_empty.index(side), (done >> 1 & 1) ^ 1)", "error|more arrivals than"),
    (ONE, "mbarrier.wait(v_full, kv_phase)", "error|more arrivals than"),
    (ONE, "mbarrier.wait(v_full.index(next_slot), next_phase)", "error|more arrivals than"),
    (TWO, "bar_arrive(K_FREE, 384)", "nobody can go on"),
    (TWO, "bar_arrive(V_FREE + slot, 384)", "nobody can go on"),
    (TWO, "mbarrier.arrive(empty, count=1)", "nobody can go on"),
    (TWO, "mbarrier.wait(empty, side ^ 1)", "error|more arrivals than"),
    (TWO, "bar_sync(K_FREE + slot, 384)", "nobody can go on|error|arrivals left|more arrivals than"),
    (TWO, "tma.store_wait(0)  # of the tile before, from where the next one's dO goes", "error"),
]


@pytest.fixture
def machine(monkeypatch):
    """The backend on a GPU that is not there, of as many multiprocessors as the function that this returns says, with what a
    cache of nothing would make it do, in an order of events that a seed gives."""
    state = {}

    def launch_here(kernel, programs, dtype, arguments, constants):
        if kernel in GLUON:
            order, edits = state["order"].random(), state["edits"]
            gluon_interpreter.run(GLUON[kernel], programs, arguments, constants, order, edits)
        else:
            kernel[programs if isinstance(programs, tuple) else (programs,)](*arguments, **constants)

    def setup(seed, multiprocessors=3, edits=(), kernels=ONE):
        state.update(order=random.Random(seed), edits=edits)
        monkeypatch.setattr(launch, "FEW_KEYS", dict.fromkeys(hopper.HEAD_DIMS, -1 if kernels == ONE else 1 << 40))
        monkeypatch.setattr(launch, "multiprocessors", lambda _: multiprocessors)
        monkeypatch.setattr(launch, "_counters", {})

    monkeypatch.setattr(launch, "launch", launch_here)
    for name in ("L2_BYTES", "L2_BYTES_UNEQUAL", "LAST_BYTES", "LAST_BYTES_VARLEN", "FEWEST_HEADS"):
        monkeypatch.setattr(launch, name, 1)
    monkeypatch.setattr(hopper, "supports", lambda spec, device: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # the index of the CPU
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    _choice.cache_clear()
    yield setup
    _choice.cache_clear()


def counters_left():
    return [int(c[0]) for counters, _ in launch._counters.values() for c in counters if int(c[0])]


@pytest.mark.parametrize("kernels", [ONE, TWO])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_compute_what_they_should(machine, case, kernels):
    machine(seed=1, kernels=kernels)
    check(case, "hopper", "cpu")
    assert counters_left() == []


@pytest.mark.parametrize("kernels", [ONE, TWO])
@pytest.mark.parametrize("case", [CASES[2], CASES[4]], ids=str)
def test_gradient_of_lse(machine, case, kernels):
    """As the reference's, to the rounding of fp16 and bf16."""
    machine(seed=2, kernels=kernels)
    inputs = Inputs(case, "cpu")
    options = dict(causal=True, return_attn_probs=True)
    gradients = {}
    for backend in ("hopper", "reference"):
        leaves = inputs.leaves()
        if case.lengths:
            longest = (max(pair[i] for pair in case.lengths) for i in (0, 1))
            out, lse, _ = flash_attn_varlen_func(*leaves, *inputs.cu, *longest, backend=backend, **options)
        else:
            out, lse, _ = flash_attn_func(*leaves, backend=backend, **options)
        seen = lse > -torch.inf
        dlse = torch.randn(lse.shape, generator=torch.Generator().manual_seed(3))
        loss = (out * inputs.dout.nan_to_num()).sum() + (lse[seen] * dlse[seen]).sum()
        gradients[backend] = torch.autograd.grad(loss, leaves)
    for got, want in zip(gradients["hopper"], gradients["reference"], strict=True):
        assert (got - want).float().norm() < torch.finfo(got.dtype).eps * want.float().norm()


def random_case(r: random.Random) -> Case:
    def length():
        return r.choice((0, 1, 64, 128, 129, r.randint(1, 300)))

    kv_heads = r.choice((1, 2))
    window = r.choice([(-1, -1)] * 3 + [(r.randint(0, 200), -1), (r.randint(0, 90), r.randint(0, 90))])
    options = dict(head_dim=r.choice((64, 128)), heads=(kv_heads * r.choice((1, 2, 3)), kv_heads), window=window)
    options["causal"] = r.random() < 0.7
    same = r.random() < 0.6
    if r.random() < 0.5:
        lengths = [(n, n if same else length()) for n in (length() for _ in range(r.randint(1, 4)))]
        return Case(**options, lengths=(*lengths, (5, 5)), tail=r.choice(((0, 0), (70, 33))))
    seqlen = max(1, length())
    return Case(**options, batch=r.randint(1, 3), seqlen=(seqlen, seqlen if same else max(1, length())))


@pytest.mark.parametrize("seed", range(24))
def test_any_case_in_any_order_of_events(machine, seed, monkeypatch):
    r = random.Random(seed)
    machine(seed, multiprocessors=r.choice((1, 2, 5)), kernels=ONE)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: seed % 2 == 0)  # two kernels
    check(random_case(r), "hopper", "cpu", seed)
    assert counters_left() == []


@pytest.mark.parametrize(("kernels", "statement", "what"), NEEDED)
def test_a_missing_statement_is_found(machine, kernels, statement, what):
    """Each in one order of events or another: so the tests above are known to be able to fail."""
    assert any(statement in (gluon_interpreter.SOURCE / f"{name}.py").read_text() for name in GLUON.values())
    case = Case(64, F16, (1, 1), 1, (513, 700) if kernels == ONE else (900, 200))
    for seed in range(10):
        machine(seed, 3 if kernels == ONE else 1, ((statement, "None"),), kernels)
        try:
            check(case, "hopper", "cpu")
        except (RuntimeError, AssertionError) as error:
            assert re.search(what, str(error))
            return
    pytest.fail("nothing was noticed")
