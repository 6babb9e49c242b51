"""flash-attn's own test matrix on a GPU: its head dims and lengths, MHA, GQA and MQA, and each of its options, with errors
against the exact result within twice (out) or three times (gradients) those of low-precision PyTorch."""

import itertools

import pytest
import torch
from attention_cases import Case, Inputs, check, run_backend

from axo_flash import flash_attn_func, flash_attn_qkvpacked_func
from axo_flash.kernels import hopper
from axo_flash.kernels.backends import choose_backend
from axo_flash.kernels.dropout import kept

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm GPU")
F16, BF16 = torch.float16, torch.bfloat16
HEAD_DIMS = (32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256)
LENGTHS = ((1, 1), (3, 97), (97, 97), (113, 203), (128, 128), (239, 1), (799, 3), (1023, 1024), (2048, 2048))
HEADS = {"mha": (6, 6), "gqa": (6, 2), "mqa": (6, 1)}
MASKS = ({}, {"causal": True}, {"window": (200, 30)}, {"causal": True, "window": (70, -1)})
EXTRAS = (
    {"softcap": 5.0},
    {"alibi": "batch"},
    {"dropout": 0.17},
    {"sinks": True},
    {"alibi": "heads", "dropout": 0.17},
    {"softcap": 5.0, "sinks": True, "dropout": 0.4},
)
DOCUMENTS = ((97, 97), (0, 0), (512, 300), (1, 1), (0, 9), (12, 0), (239, 799))


def compiled_together(head_dim, other, *names):
    """Parameters of tests that share their kernels: with `--dist loadgroup` one process runs them all and compiles each once,
    which is what takes the time here."""
    return pytest.param(head_dim, other, marks=pytest.mark.xdist_group(f"{head_dim}-{'-'.join(names)}"))


@pytest.mark.parametrize("seqlen", LENGTHS, ids=str)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("head_dim", "mask"), [compiled_together(d, m, *m) for d in HEAD_DIMS for m in MASKS], ids=str)
def test_output(head_dim, mask, heads, seqlen):
    """The mask as it is, and with one set of options, another from test to test; the precisions take turns, so that every
    kernel is compiled in one of them."""
    odd = (LENGTHS.index(seqlen) + list(HEADS).index(heads)) % 2
    batch = 1 if max(seqlen) > 1024 else 2
    turn = HEAD_DIMS.index(head_dim) + MASKS.index(mask)
    for extra, dtype in (({}, turn % 2), (EXTRAS[(turn + 3 * odd) % len(EXTRAS)], (turn + odd) % 2)):
        # where there is one key the gradients of q and k are 0, in PyTorch too, but for what rounding of a dropped-out out
        # leaves
        if seqlen[1] > 1 or "dropout" not in extra:
            case = Case(head_dim, (F16, BF16)[dtype], HEADS[heads], batch, seqlen, **mask, **extra)
            check(case, choose_backend(case.spec(), torch.device("cuda")).name, "cuda")


@pytest.mark.parametrize(
    ("head_dim", "extra"), [compiled_together(d, e, "varlen", *e) for d in HEAD_DIMS for e in ({}, *EXTRAS)], ids=str
)
def test_varlen_output(head_dim, extra):
    """Each mask as it is, and one with each set of options."""
    turn = HEAD_DIMS.index(head_dim) + (EXTRAS.index(extra) if extra else 0)
    for tail, mask in itertools.product(((0, 0), (33, 7)), (MASKS[turn % 4],) if extra else MASKS):
        options = extra | ({"alibi": "batch"} if "alibi" in extra else {})
        dtype = (F16, BF16)[(turn + MASKS.index(mask)) % 2]
        case = Case(head_dim, dtype, (4, 2), lengths=DOCUMENTS, tail=tail, **mask, **options)
        check(case, "triton", "cuda")


@pytest.mark.parametrize("extra", EXTRAS, ids=lambda extra: "-".join(extra))
def test_bit_equal_from_run_to_run(extra):
    case = Case(128, BF16, (8, 2), 2, (1023, 1023), True, **extra)
    inputs = Inputs(case, "cuda")
    first = run_backend(case, inputs, "triton")
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, run_backend(case, inputs, "triton"), strict=True))


def test_the_kernels_mask_is_the_definition():
    """With equal scores and one-hot values the output is the mask, whatever the tile that an entry lies in."""
    seqlen, heads = 256, 3
    zeros = torch.zeros(2, 1000, heads, 256, dtype=F16, device="cuda")
    v = torch.zeros(2, seqlen, heads, 256, dtype=F16, device="cuda")
    v[:] = torch.eye(256, device="cuda")[None, :, None]
    torch.manual_seed(7)
    out = flash_attn_func(zeros, zeros[:, :seqlen], v, 0.3, backend="triton")
    torch.manual_seed(7)
    seed = torch.randint(0, 1 << 62, (1,), device="cuda")
    sequence, head = (
        torch.arange(2, device="cuda")[:, None, None, None],
        torch.arange(heads, device="cuda")[:, None, None],
    )
    rows, cols = torch.arange(1000, device="cuda")[:, None], torch.arange(seqlen, device="cuda")
    assert torch.equal(out.transpose(1, 2) > 0, kept(seed, 0.3, sequence, head, rows, cols))


def test_hopper_takes_head_dims_that_round_up_to_its_own():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU (H100, H200, GH200)")
    for head_dim in (57, 59, 63, 121, 127):
        case = Case(head_dim, BF16, (4, 2), 2, (239, 239), True)
        assert choose_backend(case.spec(), torch.device("cuda")).name == "hopper"
        check(case, "hopper", "cuda")
    assert "dropout" in hopper.supports(Case(dropout=0.1).spec(), torch.device("cuda"))


@pytest.mark.parametrize("dropout_p", [0.0, 0.17])
def test_compiles_without_a_graph_break(dropout_p):
    def step(qkv, slopes, sinks):
        out = flash_attn_qkvpacked_func(qkv, dropout_p, causal=True, softcap=5.0, alibi_slopes=slopes, sinks=sinks)
        return out.square().sum()

    qkv = torch.randn(2, 130, 3, 4, 64, dtype=BF16, device="cuda", requires_grad=True)
    slopes, sinks = torch.rand(4, device="cuda"), torch.randn(4, device="cuda", requires_grad=True)
    results = []
    with torch._inductor.config.patch(fallback_random=True):  # eager's own numbers
        for run in (step, torch.compile(step, fullgraph=True)):
            torch.manual_seed(0)
            results.append(torch.autograd.grad(run(qkv, slopes, sinks), (qkv, sinks)))
    for a, b in zip(*results, strict=True):
        assert (a - b).float().norm() < 0.02 * b.float().norm()


def test_dropout_in_a_cuda_graph_is_another_at_every_replay():
    q, k, v = (torch.randn(1, 256, 2, 64, dtype=BF16, device="cuda") for _ in range(3))
    flash_attn_func(q, k, v, 0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flash_attn_func(q, k, v, 0.5)
    replays = []
    for _ in range(2):
        graph.replay()
        replays.append(out.clone())
    assert not torch.equal(*replays)
