"""Which tile of which document comes when: made on the device from cu_seqlens, so that packed rows need no host sync."""

import triton
import triton.language as tl


@triton.jit(
    do_not_specialize=["batch", "total", "total_other"],
    do_not_specialize_on_alignment=["cu_seqlens", "cu_seqlens_other"],
)
def schedule_kernel(cu_seqlens, cu_seqlens_other, schedule, batch, total, total_other,
                    BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr):
    """Row 0 of schedule (int32, 8 words a row): the number of tiles. Then one row a tile, (sequence, block, start, seqlen,
    start_other, seqlen_other): the longest document first, so that the short ones even out who has less to do, and all of a
    document together, so that what its tiles read is still in the cache; of a causal one, the longest tile first.

    grid: (batch + 1,), one program a document; the last one is what lies behind them all, which sees nothing.
    """
    own = tl.program_id(0)
    start = tl.load(cu_seqlens + own)
    end = tl.load(cu_seqlens + own + 1, mask=own < batch, other=total)
    start_other = tl.load(cu_seqlens_other + own)
    end_other = tl.load(cu_seqlens_other + own + 1, mask=own < batch, other=start_other)
    tiles = (end - start + BLOCK - 1) // BLOCK
    everything = 0
    place = 0
    for first in range(0, batch + 1, 128):
        document = first + tl.arange(0, 128)
        starts = tl.load(cu_seqlens + document, mask=document <= batch, other=0)
        ends = tl.load(cu_seqlens + document + 1, mask=document < batch, other=total)
        length = tl.where(document <= batch, (ends - starts + BLOCK - 1) // BLOCK, 0)
        everything += tl.sum(length, 0)
        place += tl.sum(tl.where((length > tiles) | ((length == tiles) & (document < own)), length, 0), 0)
    for first in range(0, tiles, 128):
        i = first + tl.arange(0, 128)
        row = schedule + (place + i + 1) * 8
        mine = i < tiles
        tl.store(row, own + tl.zeros_like(i), mask=mine)
        tl.store(row + 1, tiles - 1 - i if LAST_FIRST else i, mask=mine)
        tl.store(row + 2, start + tl.zeros_like(i), mask=mine)
        tl.store(row + 3, end - start + tl.zeros_like(i), mask=mine)
        tl.store(row + 4, start_other + tl.zeros_like(i), mask=mine)
        tl.store(row + 5, end_other - start_other + tl.zeros_like(i), mask=mine)
    if own == 0:
        tl.store(schedule, everything)
