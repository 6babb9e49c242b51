"""Which tile of which document comes when: made on the device from cu_seqlens, so that packed rows need no host sync."""

import triton
import triton.language as tl


@triton.jit(
    do_not_specialize=["batch", "total", "total_other"],
    do_not_specialize_on_alignment=["cu_seqlens", "cu_seqlens_other"],
)
def schedule_kernel(cu_seqlens, cu_seqlens_other, schedule, batch, total, total_other,
                    BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr):
    """Row 0 of schedule (int32, 8 words a row): the number of tiles. Then one row a tile, longest first:
    (sequence, block, start, seqlen, start_other, seqlen_other).

    grid: (batch + 1,), one program a document; the last one is what lies behind them all, which sees nothing.

    The c-th tile of a document, counted from where causal tiles are short (their number of blocks is c), goes behind all
    tiles of a greater c and behind those of the same c in earlier documents. With L(b) tiles in document b that is place
    sum_b max(L(b) - c, 0) + |{b < own: L(b) >= c}|: known without a sort.
    """
    own = tl.program_id(0)
    start = tl.load(cu_seqlens + own)
    end = tl.load(cu_seqlens + own + 1, mask=own < batch, other=total)
    start_other = tl.load(cu_seqlens_other + own)
    end_other = tl.load(cu_seqlens_other + own + 1, mask=own < batch, other=start_other)
    tiles = (end - start + BLOCK - 1) // BLOCK
    everything = 0
    for first in range(0, tl.maximum(tiles, 1), 128):
        block = first + tl.arange(0, 128)
        c = block + 1 if LAST_FIRST else tiles - block
        place = tl.zeros([128], tl.int32)
        everything = 0
        for first_document in range(0, batch + 1, 128):
            b = first_document + tl.arange(0, 128)
            starts = tl.load(cu_seqlens + b, mask=b <= batch, other=0)
            ends = tl.load(cu_seqlens + b + 1, mask=b < batch, other=total)
            length = tl.where(b <= batch, (ends - starts + BLOCK - 1) // BLOCK, 0)
            everything += tl.sum(length, 0)
            longer = tl.maximum(length[None, :] - c[:, None], 0)
            before = (b < own)[None, :] & (length[None, :] >= c[:, None])
            place += tl.sum(longer + before.to(tl.int32), 1)
        row = schedule + (place + 1) * 8
        mine = block < tiles
        tl.store(row, own + tl.zeros_like(block), mask=mine)
        tl.store(row + 1, block, mask=mine)
        tl.store(row + 2, start + tl.zeros_like(block), mask=mine)
        tl.store(row + 3, end - start + tl.zeros_like(block), mask=mine)
        tl.store(row + 4, start_other + tl.zeros_like(block), mask=mine)
        tl.store(row + 5, end_other - start_other + tl.zeros_like(block), mask=mine)
    if own == 0:
        tl.store(schedule, everything)
