"""Forward of FlashAttention-3 (Shah et al. 2024) for Hopper, in Gluon.

One partition copies: Q tiles (two slots, so that the next tile's Q is there before this one ends) and a ring of K and V
blocks. Two warpgroups of 64 rows each compute. In each, the scores of block j and the output of block j - 1 are on the
tensor cores together, and the softmax of j runs while the output of j - 1 finishes; between the two, a hand-over makes one
issue its products while the other does its exponentials. Unlike there, this goes on across tiles: the first scores of the
next tile are issued together with the last output of this one, so that short rows (causal, packed documents) do not empty
the pipeline.
"""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from axo_flash.kernels.hopper.tiles import (
    INFO,
    advance,
    bar_arrive,
    bar_sync,
    block_range,
    copy_rows_in,
    copy_rows_out,
    get_info,
    locate,
    mask,
    masked_first,
    next_tile,
    partition_barrier,
    put_info,
)

TURN: gl.constexpr = gl.constexpr(5)  # hardware barriers 5, 6, (7): whose turn it is to issue
K_FREE: gl.constexpr = gl.constexpr(8)  # 8 ... 11: K read, one a ring slot
V_FREE: gl.constexpr = gl.constexpr(12)  # 12 ... 15: V read
LN2: gl.constexpr = gl.constexpr(0.6931471805599453)


@gluon.jit
def _copy(q_desc, k_desc, v_desc, q_tile, k_ring, v_ring, info, q_full, q_empty, k_full, v_full,
          schedule, counter, num_heads, seqlen_q, seqlen_k, batch, section, sections, left, right, num_tiles,
          group, NUM_WG: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, VARLEN: gl.constexpr,
          HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr):
    """The copying partition: tile after tile, its Q, then its K and V blocks."""
    BLOCK_M: gl.constexpr = 64 * NUM_WG
    EVERYONE: gl.constexpr = 128 + 128 * NUM_WG
    slot = 0
    phase = 0
    copied = 0
    q_slot = 0
    q_phase = 1
    tile = gl.program_id(0)
    while tile < num_tiles:
        block, sequence, head, start, rows, start_k, cols = locate(
            tile, num_tiles, num_heads, seqlen_q, seqlen_k, batch, section, sections, schedule, BLOCK_M, VARLEN, HAS_RIGHT)
        row = block * BLOCK_M
        kv_head = head // group
        lo, full_lo, full_hi, hi = block_range(row, rows, cols, left, right, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT)
        tile = next_tile(counter, num_tiles)
        mbarrier.wait(q_empty.index(q_slot), q_phase)
        put_info(info, q_slot, 0, 1)
        put_info(info, q_slot, 1, row)
        put_info(info, q_slot, 2, head)
        put_info(info, q_slot, 3, sequence)
        if VARLEN:
            put_info(info, q_slot, 4, start)
            put_info(info, q_slot, 5, rows)
            put_info(info, q_slot, 6, cols)
        partition_barrier()
        mbarrier.expect(q_full.index(q_slot), NUM_WG * q_desc.block_type.nbytes)
        for w in gl.static_range(NUM_WG):
            copy_rows_in(q_desc, q_full.index(q_slot), q_tile.index(q_slot * NUM_WG + w), sequence, head, start, rows,
                         row + 64 * w, VARLEN)
        q_slot ^= 1
        if q_slot == 0:
            q_phase ^= 1
        for i in range(gl.maximum(hi - lo, 1)):
            col = masked_first(i, lo, full_lo, full_hi, hi) * BLOCK_N
            if copied >= STAGES:
                bar_sync(K_FREE + slot, EVERYONE)
            mbarrier.expect(k_full.index(slot), k_desc.block_type.nbytes)
            copy_rows_in(k_desc, k_full.index(slot), k_ring.index(slot), sequence, kv_head, start_k, cols, col, VARLEN)
            if copied >= STAGES:
                bar_sync(V_FREE + slot, EVERYONE)
            mbarrier.expect(v_full.index(slot), v_desc.block_type.nbytes)
            copy_rows_in(v_desc, v_full.index(slot), v_ring.index(slot), sequence, kv_head, start_k, cols, col, VARLEN)
            copied += 1
            slot, phase = advance(slot, phase, STAGES)
    mbarrier.wait(q_empty.index(q_slot), q_phase)
    put_info(info, q_slot, 0, 0)
    mbarrier.arrive(q_full.index(q_slot), count=1)
    for _ in range(gl.minimum(copied, STAGES)):  # nobody may leave while arrivals are open
        slot = gl.where(slot == 0, STAGES - 1, slot - 1)
        bar_sync(K_FREE + slot, EVERYONE)
        bar_sync(V_FREE + slot, EVERYONE)


@gluon.jit
def _halves(x):
    """The left and the right half of x's columns. In an MMA layout which half a column is in is a bit of the register's
    number, so this moves nothing."""
    return gl.split(x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute((0, 2, 1)))


@gluon.jit
def _fold_max(x):
    """x [64, n] to [64, 8] by maxima within each thread: a tree, as the long chain of a plain reduction is latency."""
    if x.shape[1] > 8:
        left, right = _halves(x)
        return _fold_max(gl.maximum(left, right))
    else:
        return x


@gluon.jit
def _fold_sum_into(folded, x):
    """folded [64, 8] and the sums of x [64, n] within each thread."""
    if x.shape[1] == 8:
        return folded + x
    else:
        left, right = _halves(x)
        return _fold_sum_into(_fold_sum_into(folded, left), right)


@gluon.jit
def _no_sum(x):
    """Zeros in the form of the running sums: [64, 8], a thread's own columns of x."""
    if x.shape[1] == 8:
        return gl.zeros_like(x)
    else:
        left, _ = _halves(x)
        return _no_sum(left)


@gluon.jit
def _maximum(s, m):
    """The new running maximum of each row."""
    return gl.maximum(m, gl.convert_layout(gl.max(_fold_max(s), 1), m.type.layout))


@gluon.jit
def _exponentials(s, m, m_new, l, scale_log2):
    """One block more: p (fp32), the new sums, still one a thread, and the factor for what was summed before."""
    m_used = gl.where(m_new == -float("inf"), 0.0, m_new)  # a row that has seen nothing yet
    scaled = m_used * scale_log2
    alpha = gl.exp2(m * scale_log2 - scaled)
    p = gl.exp2(s * scale_log2 - scaled[:, None])
    l = _fold_sum_into(l * gl.convert_layout(alpha, gl.SliceLayout(1, l.type.layout))[:, None], p)
    return p, l, alpha


@gluon.jit
def _finish(o_desc, lse, o_tile, acc, m, l, row, local, head, sequence, start, seqlen, num_heads, seqlen_q, scale_log2,
            w: gl.constexpr, VARLEN: gl.constexpr):
    """Write 64 rows of out and lse (`row` + `local`, of which w * 64 is part); the copy engine does its part while the
    next tile runs."""
    l = gl.convert_layout(gl.sum(l, 1), m.type.layout)
    inverse = 1.0 / gl.where(l == 0.0, 1.0, l)
    out = acc * gl.convert_layout(inverse, gl.SliceLayout(1, acc.type.layout))[:, None]
    tile = o_tile.index(w)
    tma.store_wait(0)  # of the tile before
    tile.reshape([acc.shape[0], acc.shape[1]]).store(out.to(o_tile.dtype))
    fence_async_shared()
    copy_rows_out(o_desc, tile, sequence, head, start, seqlen, row + w * 64, VARLEN)
    if VARLEN:
        stats = head.to(gl.int64) * seqlen_q + start
    else:
        stats = (sequence.to(gl.int64) * num_heads + head) * seqlen_q
    gl.store(lse + stats + row + local, m * (scale_log2 * LN2) + gl.log(l), mask=row + local < seqlen)


@gluon.jit
def _step(q, k_ring, v_ring, k_full, v_full, acc, p, m, l, slot, phase, masked, rows, col, offset, seqlen_k, left, right,
          scale_log2, o_desc, lse, o_tile, old_row, local, old_head, old_sequence, old_start, old_seqlen, num_heads, seqlen_q,
          w: gl.constexpr, NUM_WG: gl.constexpr, STAGES: gl.constexpr, SCORES_FIRST: gl.constexpr,
          FIRST: gl.constexpr, VARLEN: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr):
    """The output of the pending block (p, slot), and the scores and P of the next one.

    SCORES_FIRST: the scores go to the tensor cores before the output, which leaves the maximum time to be found before the
    output is there; it takes more registers. FIRST: the next block begins a tile. What the old tile has to write (old_...)
    is written while the scores are computed, so then the output always goes first.
    """
    EVERYONE: gl.constexpr = 128 + 128 * NUM_WG
    BLOCK_N: gl.constexpr = p.shape[1]
    D: gl.constexpr = acc.shape[1]
    dtype: gl.constexpr = k_ring.dtype
    out_layout: gl.constexpr = acc.type.layout
    operand_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    v = v_ring.index(slot).reshape([BLOCK_N, D])
    next_slot, next_phase = advance(slot, phase, STAGES)
    k = k_ring.index(next_slot).reshape([BLOCK_N, D]).permute((1, 0))
    zeros = gl.zeros_like(p)
    # p is converted here and not where it was computed: it would be unpacked and packed again on the loop's way back
    if SCORES_FIRST and not FIRST:
        mbarrier.wait(k_full.index(next_slot), next_phase)
        bar_sync(TURN + w, 256)
        s_token = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
        acc_token = warpgroup_mma(gl.convert_layout(p.to(dtype), operand_layout), v, acc, is_async=True)
        bar_arrive(TURN + (w + 1) % NUM_WG, 256)
        s = warpgroup_mma_wait(1, deps=[s_token])
    else:
        operand = gl.convert_layout(p.to(dtype), operand_layout)
        mbarrier.wait(k_full.index(next_slot), next_phase)
        bar_sync(TURN + w, 256)
        acc_token = warpgroup_mma(operand, v, acc, is_async=True)
        s_token = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
        bar_arrive(TURN + (w + 1) % NUM_WG, 256)
        acc = warpgroup_mma_wait(1, deps=[acc_token])
        bar_arrive(V_FREE + slot, EVERYONE)
        if FIRST:
            _finish(o_desc, lse, o_tile, acc, m, l, old_row, local, old_head, old_sequence, old_start, old_seqlen, num_heads,
                    seqlen_q, scale_log2, w, VARLEN)
            acc = gl.zeros_like(acc)
            m = gl.full_like(m, -float("inf"))
            l = gl.zeros_like(l)
        s = warpgroup_mma_wait(0, deps=[s_token])
    bar_arrive(K_FREE + next_slot, EVERYONE)
    if masked:
        s = mask(s, rows, col, offset, seqlen_k, left, right, HAS_LEFT, HAS_RIGHT)
    m_new = _maximum(s, m)
    # A spin loop is a wall that the assembler moves nothing across. In front of it the maximum is found while the output is
    # computed; behind it the scaling of the output goes between the exponentials, of which the hardware takes one in eight
    # cycles.
    mbarrier.wait(v_full.index(next_slot), next_phase)
    if SCORES_FIRST and not FIRST:
        acc = warpgroup_mma_wait(0, deps=[acc_token])
        bar_arrive(V_FREE + slot, EVERYONE)
    p, l, alpha = _exponentials(s, m, m_new, l, scale_log2)
    if not FIRST:
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, out_layout))[:, None]
    return acc, p, m_new, l, next_slot, next_phase


@gluon.jit
def _compute(w: gl.constexpr, o_desc, lse, q_tile, k_ring, v_ring, o_tile, info, q_full, q_empty, k_full, v_full,
             num_heads, seqlen_q, seqlen_k, left, right, scale_log2,
             D: gl.constexpr, NUM_WG: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
             SCORES_FIRST: gl.constexpr, VARLEN: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr):
    """Warpgroup w: the rows 64 w ... 64 w + 63 of every tile."""
    BLOCK_M: gl.constexpr = 64 * NUM_WG
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    local = gl.arange(0, 64, gl.SliceLayout(1, score_layout)) + w * 64
    zeros = gl.zeros([64, BLOCK_N], gl.float32, score_layout)

    mbarrier.wait(q_full.index(0), 0)
    working = get_info(info, 0, 0)
    if working != 0:
        slot = 0
        phase = 0
        q_slot = 0
        q_phase = 0
        row = get_info(info, 0, 1)
        head = get_info(info, 0, 2)
        sequence = get_info(info, 0, 3)
        start = 0
        rows_here = seqlen_q
        cols_here = seqlen_k
        if VARLEN:
            start = get_info(info, 0, 4)
            rows_here = get_info(info, 0, 5)
            cols_here = get_info(info, 0, 6)
        offset = cols_here - rows_here
        lo, full_lo, full_hi, hi = block_range(
            row, rows_here, cols_here, left, right, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT)
        if w == NUM_WG - 1:
            bar_arrive(TURN, 256)
        q = q_tile.index(w).reshape([64, D])
        mbarrier.wait(k_full.index(0), 0)
        bar_sync(TURN + w, 256)
        k = k_ring.index(0).reshape([BLOCK_N, D]).permute((1, 0))
        s_token = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
        bar_arrive(TURN + (w + 1) % NUM_WG, 256)
        s = warpgroup_mma_wait(0, deps=[s_token])
        bar_arrive(K_FREE, 128 + 128 * NUM_WG)
        col = masked_first(0, lo, full_lo, full_hi, hi) * BLOCK_N
        s = mask(s, local + row, col, offset, cols_here, left, right, HAS_LEFT, HAS_RIGHT)
        m = gl.full([64], -float("inf"), gl.float32, gl.SliceLayout(1, score_layout))
        m_new = _maximum(s, m)
        p, l, _ = _exponentials(s, m, m_new, _no_sum(s), scale_log2)
        m = m_new
        acc = gl.zeros([64, D], gl.float32, out_layout)
        mbarrier.wait(v_full.index(0), 0)

        while working != 0:
            q = q_tile.index(q_slot * NUM_WG + w).reshape([64, D])
            count = hi - lo
            masked = count - (full_hi - full_lo)
            for i in range(1, count):
                col = masked_first(i, lo, full_lo, full_hi, hi) * BLOCK_N
                acc, p, m, l, slot, phase = _step(
                    q, k_ring, v_ring, k_full, v_full, acc, p, m, l, slot, phase, i < masked, local + row, col, offset,
                    cols_here, left, right, scale_log2, o_desc, lse, o_tile, row, local, head, sequence, start, rows_here,
                    num_heads, seqlen_q, w, NUM_WG, STAGES, SCORES_FIRST, False, VARLEN, HAS_LEFT, HAS_RIGHT)
            mbarrier.arrive(q_empty.index(q_slot), count=1)

            # the tile is done but for the output of its last block, which goes with the first scores of the next tile
            old_row = row
            old_head = head
            old_sequence = sequence
            old_start = start
            old_rows = rows_here
            q_slot ^= 1
            if q_slot == 0:
                q_phase ^= 1
            mbarrier.wait(q_full.index(q_slot), q_phase)
            working = get_info(info, q_slot, 0)
            if working != 0:
                row = get_info(info, q_slot, 1)
                head = get_info(info, q_slot, 2)
                sequence = get_info(info, q_slot, 3)
                if VARLEN:
                    start = get_info(info, q_slot, 4)
                    rows_here = get_info(info, q_slot, 5)
                    cols_here = get_info(info, q_slot, 6)
                    offset = cols_here - rows_here
                lo, full_lo, full_hi, hi = block_range(
                    row, rows_here, cols_here, left, right, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT)
                col = masked_first(0, lo, full_lo, full_hi, hi) * BLOCK_N
                q = q_tile.index(q_slot * NUM_WG + w).reshape([64, D])
                acc, p, m, l, slot, phase = _step(
                    q, k_ring, v_ring, k_full, v_full, acc, p, m, l, slot, phase, True, local + row, col, offset, cols_here,
                    left, right, scale_log2, o_desc, lse, o_tile, old_row, local, old_head, old_sequence, old_start, old_rows,
                    num_heads, seqlen_q, w, NUM_WG, STAGES, SCORES_FIRST, True, VARLEN, HAS_LEFT, HAS_RIGHT)
            else:
                operand = gl.convert_layout(p.to(k_ring.dtype), gl.DotOperandLayout(0, out_layout, 2))
                acc_token = warpgroup_mma(operand, v_ring.index(slot).reshape([BLOCK_N, D]), acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=[acc_token])
                bar_arrive(V_FREE + slot, 128 + 128 * NUM_WG)
                _finish(o_desc, lse, o_tile, acc, m, l, old_row, local, old_head, old_sequence, old_start, old_rows,
                        num_heads, seqlen_q, scale_log2, w, VARLEN)
        if w == 0:
            bar_sync(TURN, 256)  # nobody may leave while an arrival is open
        tma.store_wait(0)


@gluon.jit(do_not_specialize=[
    "num_tiles", "num_heads", "seqlen_q", "seqlen_k", "batch", "section", "sections", "left", "right", "group"])
def forward_kernel(q_desc, k_desc, v_desc, o_desc, lse, schedule, counter, num_tiles, num_heads, seqlen_q, seqlen_k, batch,
                   section, sections, left, right, scale_log2, group, D: gl.constexpr, NUM_WG: gl.constexpr,
                   BLOCK_N: gl.constexpr, STAGES: gl.constexpr, SCORES_FIRST: gl.constexpr, VARLEN: gl.constexpr,
                   HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, REGS: gl.constexpr):
    """grid: (multiprocessors,). Varlen: seqlen_q is the number of all rows, and schedule's first word that of its tiles."""
    dtype: gl.constexpr = q_desc.dtype
    q_tile = gl.allocate_shared_memory(dtype, [2 * NUM_WG] + q_desc.block_type.shape, q_desc.layout)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout)
    o_tile = gl.allocate_shared_memory(dtype, [NUM_WG] + o_desc.block_type.shape, o_desc.layout)
    info = gl.allocate_shared_memory(gl.int32, [2 * INFO, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=NUM_WG)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
    if VARLEN:
        num_tiles = gl.load(schedule) * num_heads
        schedule += 8
    # the tuples must stand here: given a name, their constants would become tensors
    if NUM_WG == 2:
        gl.warp_specialize([
            (_copy, (q_desc, k_desc, v_desc, q_tile, k_ring, v_ring, info, q_full, q_empty, k_full, v_full, schedule,
                     counter, num_heads, seqlen_q, seqlen_k, batch, section, sections, left, right, num_tiles, group, NUM_WG,
                     BLOCK_N, STAGES, VARLEN, HAS_LEFT, HAS_RIGHT)),
            (_compute, (0, o_desc, lse, q_tile, k_ring, v_ring, o_tile, info, q_full, q_empty, k_full, v_full, num_heads,
                        seqlen_q, seqlen_k, left, right, scale_log2, D, NUM_WG, BLOCK_N, STAGES, SCORES_FIRST,
                        VARLEN, HAS_LEFT, HAS_RIGHT)),
            (_compute, (1, o_desc, lse, q_tile, k_ring, v_ring, o_tile, info, q_full, q_empty, k_full, v_full, num_heads,
                        seqlen_q, seqlen_k, left, right, scale_log2, D, NUM_WG, BLOCK_N, STAGES, SCORES_FIRST,
                        VARLEN, HAS_LEFT, HAS_RIGHT)),
        ], [4, 4], [REGS, REGS])
    else:
        gl.warp_specialize([
            (_copy, (q_desc, k_desc, v_desc, q_tile, k_ring, v_ring, info, q_full, q_empty, k_full, v_full, schedule,
                     counter, num_heads, seqlen_q, seqlen_k, batch, section, sections, left, right, num_tiles, group, NUM_WG,
                     BLOCK_N, STAGES, VARLEN, HAS_LEFT, HAS_RIGHT)),
            (_compute, (0, o_desc, lse, q_tile, k_ring, v_ring, o_tile, info, q_full, q_empty, k_full, v_full, num_heads,
                        seqlen_q, seqlen_k, left, right, scale_log2, D, NUM_WG, BLOCK_N, STAGES, SCORES_FIRST,
                        VARLEN, HAS_LEFT, HAS_RIGHT)),
            (_compute, (1, o_desc, lse, q_tile, k_ring, v_ring, o_tile, info, q_full, q_empty, k_full, v_full, num_heads,
                        seqlen_q, seqlen_k, left, right, scale_log2, D, NUM_WG, BLOCK_N, STAGES, SCORES_FIRST,
                        VARLEN, HAS_LEFT, HAS_RIGHT)),
            (_compute, (2, o_desc, lse, q_tile, k_ring, v_ring, o_tile, info, q_full, q_empty, k_full, v_full, num_heads,
                        seqlen_q, seqlen_k, left, right, scale_log2, D, NUM_WG, BLOCK_N, STAGES, SCORES_FIRST,
                        VARLEN, HAS_LEFT, HAS_RIGHT)),
        ], [4, 4, 4], [REGS, REGS, REGS])
