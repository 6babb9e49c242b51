"""The plain Triton kernels around the Hopper ones: which tile comes when, and what the backward one works in.

On a CPU they run in Triton's interpreter, as Gluon cannot.
"""

import math

import pytest
import torch

from axo_flash.kernels.hopper import launch
from axo_flash.kernels.hopper.schedule import schedule_kernel
from axo_flash.kernels.hopper.workspace import finish_kernel, prepare_kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = [[300, 1, 0, 128, 129, 64], [0, 0], [7], [5] * 200]


def as_fragments(acc):
    """(heads, rows, head_dim) as backward_kernel adds it up: 64 x 64 numbers at a time, in the order of the registers that
    hold the accumulator of a warpgroup's matrix product (PTX ISA, wgmma, the layout of D)."""
    heads, rows, head_dim = acc.shape
    r, c = torch.arange(64)[:, None], torch.arange(head_dim)[None, :]
    warp, lane = r // 16, r % 8 * 4 + c % 8 // 2
    register = r % 16 // 8 * 2 + c % 2
    place = c // 64 * 4096 + c % 64 // 8 * 512 + warp * 128 + lane * 4 + register
    out = torch.empty(heads, rows // 64, 64 * head_dim, device=acc.device)
    out[..., place.flatten()] = acc.reshape(heads, rows // 64, 64 * head_dim)
    return out


def cumulative(lengths):
    return torch.tensor([0, *lengths], dtype=torch.int32, device=DEVICE).cumsum(0, dtype=torch.int32)


@pytest.mark.parametrize("last_first", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda x: f"{len(x)}-documents")
@pytest.mark.parametrize("tail", [0, 70])
def test_schedule_holds_every_tile_once_document_by_document(lengths, last_first, tail):
    block = 64
    others = [n // 2 for n in lengths]
    total, total_other = sum(lengths) + tail, sum(others) + 3
    schedule = torch.full((total // block + len(lengths) + 2, 8), -1, dtype=torch.int32, device=DEVICE)
    schedule_kernel[(len(lengths) + 1,)](
        cumulative(lengths), cumulative(others), schedule, len(lengths), total, total_other,
        BLOCK=block, LAST_FIRST=last_first,
    )  # fmt: skip
    count, *_ = schedule[0].tolist()
    rows = [tuple(row[:6]) for row in schedule[1 : count + 1].tolist()]
    starts, starts_other = cumulative(lengths).tolist(), cumulative(others).tolist()
    want = {
        (i, b, starts[i], n, starts_other[i], m)
        for i, (n, m) in enumerate(zip([*lengths, tail], [*others, 0], strict=True))
        for b in range(math.ceil(n / block))
    }
    assert len(rows) == len(want) and set(rows) == want
    order = [(-math.ceil(n / block), i, -b if last_first else b) for i, b, _, n, _, _ in rows]
    assert order == sorted(order)  # the longest document first; of it, where causal tiles are long


@pytest.mark.parametrize("align", [64, 128])
@pytest.mark.parametrize("varlen", [False, True])
def test_workspace_before_and_after(varlen, align):
    """Every row at its place: -lse / scale and -delta, zeros to add to; and back, rounded, the rows of nobody as zeros."""
    torch.manual_seed(0)
    lengths, tail, heads, head_dim, scale = [70, 0, 64, 130], 5, 2, 64, 0.25
    if varlen:
        total, batch = sum(lengths) + tail, len(lengths)
        cu, shape, stats = cumulative(lengths), (total, heads, head_dim), (heads, total)
        starts = [*cumulative(lengths).tolist()]
        places = [
            ((start // align + i) * align, start, n) for i, (start, n) in enumerate(zip(starts, lengths, strict=False))
        ]
        rows, seqlen = (total // align + batch + 1) * align, total
    else:
        batch, seqlen, cu = 3, 70, None
        shape, stats = (batch, seqlen, heads, head_dim), (batch, heads, seqlen)
        places = [(i * math.ceil(seqlen / align) * align, i, seqlen) for i in range(batch)]
        rows = batch * math.ceil(seqlen / align) * align
    out, dout = (torch.randn(shape, device=DEVICE, dtype=torch.float16) for _ in range(2))
    lse, dlse = (torch.randn(stats, device=DEVICE) for _ in range(2))
    lse[..., 3] = -torch.inf  # a row that sees nothing
    lse_log2, dp_start = torch.full((2, heads, rows), torch.nan, device=DEVICE)
    acc = torch.full((heads, rows, head_dim), torch.nan, device=DEVICE)
    strides = [s // 8 for s in (out.stride()[:3] if not varlen else (0, *out.stride()[:2]))]
    constants = dict(HEAD_DIM=head_dim, BLOCK=64, ALIGN=align, VARLEN=varlen)
    grid = (rows // 64, heads)
    prepare_kernel[grid](
        out, dout, lse, dlse, lse_log2, dp_start, acc, cu, *strides, *strides, heads, batch, seqlen, rows,
        **constants, HAS_DLSE=True,
    )  # fmt: skip
    assert (acc == 0).all()
    real = torch.zeros(rows, dtype=torch.bool, device=DEVICE)
    for place, where, n in places:
        own = (slice(None), slice(where, where + n)) if varlen else (where,)
        o, do = (x[where : where + n] if varlen else x[where] for x in (out, dout))
        delta = (o.float() * do.float()).sum(-1).T - dlse[own]
        torch.testing.assert_close(dp_start[:, place : place + n], -delta)
        torch.testing.assert_close(
            lse_log2[:, place : place + n], torch.where(lse[own].isinf(), torch.inf, lse[own] / math.log(2))
        )
        real[place : place + n] = True
    assert (lse_log2[:, ~real] == torch.inf).all() and (dp_start[:, ~real] == 0).all()

    acc[:, real] = torch.randn(heads, int(real.sum()), head_dim, device=DEVICE)
    dq = torch.full(shape, torch.nan, device=DEVICE, dtype=torch.float16)
    finish_kernel[grid](as_fragments(acc), dq, cu, *strides, batch, seqlen, rows, scale, **constants)
    for place, where, n in places:
        got = dq[where : where + n] if varlen else dq[where]
        torch.testing.assert_close(got, (acc[:, place : place + n] * scale).half().transpose(0, 1))
    if varlen:
        assert (dq[-tail:] == 0).all()


@pytest.mark.parametrize(
    ("seqlen", "heads", "unequal", "forward_group", "expected"),
    [
        (4096, 64, False, 1, 4),  # 2 MB of K and V a head: 8 MB of them
        (4096, 64, True, 1, 16),
        (8192, 64, True, 4, 32),  # four query heads read the same 4 MB
        (1 << 20, 32, True, 4, 4),  # more than the cache holds: one kv head
        (4096, 3, True, 1, 3),
        (4096, 64, False, 0, 2),  # 4 MB of Q, dO and dQ
        (4096, 64, True, 0, 8),
        (1024, 256, True, 0, 32),
        (16384, 16, True, 0, 4),
        (16384, 14, True, 0, 4),
        (16384, 5, True, 0, 3),  # 3 and 2, not 4 and 1
        (16384, 2, True, 0, 2),
    ],
)
def test_heads_at_once(seqlen, heads, unequal, forward_group, expected):
    bytes_of_head = seqlen * 128 * (4 if forward_group else 8)
    assert launch.heads_at_once(heads, bytes_of_head, unequal, forward_group) == expected
