"""dQ for Hopper, in Gluon, without sums in memory: the first half of a backward whose other half is backward_kernel without
its dQ.

A tile is 128 queries of one head. Two warpgroups of 64 queries each keep Q and the sums of dQ in registers and walk over the
keys that their own queries see; P and dS never leave registers. Before that they compute delta, from O and dO, and leave it
and lse for the other kernel. A third partition finds the tiles and copies: the next one's Q, O and dO come while this one is
computed, and dQ leaves from where its dO was.
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
    next_tile,
    padded_row,
    partition_barrier,
    put_info,
)

K_FREE: gl.constexpr = gl.constexpr(5)  # hardware barriers 5 ... 8: K read, one a ring slot
V_FREE: gl.constexpr = gl.constexpr(9)  # 9 ... 12: V read
LOG2E: gl.constexpr = gl.constexpr(1.4426950408889634)
# The words that describe a tile.
WORKING: gl.constexpr = gl.constexpr(0)  # 0 behind the last one
ROW: gl.constexpr = gl.constexpr(1)  # its first query in the sequence
ROWS: gl.constexpr = gl.constexpr(2)  # the sequence's queries
COLS: gl.constexpr = gl.constexpr(3)  # the sequence's keys
HEAD: gl.constexpr = gl.constexpr(4)
SEQUENCE: gl.constexpr = gl.constexpr(5)
START: gl.constexpr = gl.constexpr(6)  # varlen: the sequence's first row in q
LO: gl.constexpr = gl.constexpr(7)  # the blocks of keys that are copied for it: LO ... HI - 1
HI: gl.constexpr = gl.constexpr(8)


@gluon.jit
def _copy(q_desc, k_desc, v_desc, do_desc, o_desc, q_tile, o_tile, do_tile, k_ring, v_ring, info, full, empty, k_full, v_full,
          schedule, counter, num_heads, seqlen_q, seqlen_k, batch, section, sections, left, right, num_tiles, group,
          BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, VARLEN: gl.constexpr, HAS_LEFT: gl.constexpr,
          HAS_RIGHT: gl.constexpr):
    """The copying partition: tile after tile, its Q, O and dO, then its blocks of K and V."""
    slot = 0
    phase = 0
    copied = 0
    tiles = 0
    tile = gl.program_id(0)
    while tile < num_tiles:
        block, sequence, head, start, rows, start_k, cols = locate(
            tile, num_tiles, num_heads, seqlen_q, seqlen_k, batch, section, sections, schedule, BLOCK_M, VARLEN, HAS_RIGHT)
        row = block * BLOCK_M
        kv_head = head // group
        lo, _, _, hi = block_range(row, rows, cols, left, right, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT)
        tile = next_tile(counter, num_tiles)
        side = tiles & 1
        mbarrier.wait(empty, side ^ 1)
        put_info(info, side, WORKING, 1)
        put_info(info, side, ROW, row)
        put_info(info, side, ROWS, rows)
        put_info(info, side, COLS, cols)
        put_info(info, side, HEAD, head)
        put_info(info, side, SEQUENCE, sequence)
        put_info(info, side, START, start)
        put_info(info, side, LO, lo)
        put_info(info, side, HI, hi)
        partition_barrier()
        mbarrier.expect(full, 6 * q_desc.block_type.nbytes)
        for w in gl.static_range(2):
            copy_rows_in(q_desc, full, q_tile.index(w), sequence, head, start, rows, row + 64 * w, VARLEN)
            copy_rows_in(do_desc, full, do_tile.index(2 * side + w), sequence, head, start, rows, row + 64 * w, VARLEN)
            copy_rows_in(o_desc, full, o_tile.index(w), sequence, head, start, rows, row + 64 * w, VARLEN)
        tiles += 1
        for block in range(lo, hi):
            if copied >= STAGES:
                bar_sync(K_FREE + slot, 384)
            mbarrier.expect(k_full.index(slot), k_desc.block_type.nbytes)
            copy_rows_in(
                k_desc, k_full.index(slot), k_ring.index(slot), sequence, kv_head, start_k, cols, block * BLOCK_N, VARLEN)
            if copied >= STAGES:
                bar_sync(V_FREE + slot, 384)
            mbarrier.expect(v_full.index(slot), v_desc.block_type.nbytes)
            copy_rows_in(
                v_desc, v_full.index(slot), v_ring.index(slot), sequence, kv_head, start_k, cols, block * BLOCK_N, VARLEN)
            copied += 1
            slot, phase = advance(slot, phase, STAGES)
    mbarrier.wait(empty, (tiles & 1) ^ 1)
    put_info(info, tiles & 1, WORKING, 0)
    mbarrier.arrive(full, count=1)
    for _ in range(gl.minimum(copied, STAGES)):  # nobody may leave while arrivals are open
        slot = gl.where(slot == 0, STAGES - 1, slot - 1)
        bar_sync(K_FREE + slot, 384)
        bar_sync(V_FREE + slot, 384)


@gluon.jit
def _delta(o_tile, do_tile, D: gl.constexpr, row_layout: gl.constexpr):
    """O . dO of each of 64 rows."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    delta = gl.zeros([64], gl.float32, row_layout)
    for part in gl.static_range(D // 64):
        o = o_tile.reshape([64, D]).slice(part * 64, 64, dim=1).load(layout).to(gl.float32)
        do = do_tile.reshape([64, D]).slice(part * 64, 64, dim=1).load(layout).to(gl.float32)
        delta += gl.convert_layout(gl.sum(o * do, 1), row_layout)
    return delta


@gluon.jit
def _pass_over(k_full, v_full, slot, phase, STAGES: gl.constexpr):
    """A block that the other warpgroup alone has a use for."""
    mbarrier.wait(k_full.index(slot), phase)
    mbarrier.wait(v_full.index(slot), phase)
    bar_arrive(K_FREE + slot, 384)
    bar_arrive(V_FREE + slot, 384)
    return advance(slot, phase, STAGES)


@gluon.jit
def _probabilities(s, lse, masked, rows, col, offset, seqlen_k, left, right, scale_log2, HAS_LEFT: gl.constexpr,
                   HAS_RIGHT: gl.constexpr):
    if masked:
        s = mask(s, rows, col, offset, seqlen_k, left, right, HAS_LEFT, HAS_RIGHT)
    return gl.exp2(s * scale_log2 - lse[:, None])


@gluon.jit
def _step(q, do, dp_start, lse, k_ring, v_ring, k_full, v_full, acc, p, slot, phase, masked, rows, col, offset, seqlen_k,
          left, right, scale_log2, STAGES: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, LAST: gl.constexpr):
    """One block of keys: dP, dS and dQ from its P; and P of the next block, unless it is the LAST one."""
    BLOCK_N: gl.constexpr = p.shape[1]
    D: gl.constexpr = acc.shape[1]
    dtype: gl.constexpr = k_ring.dtype
    operand: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    zeros = gl.zeros_like(p)
    k = k_ring.index(slot).reshape([BLOCK_N, D])
    v = v_ring.index(slot).reshape([BLOCK_N, D]).permute((1, 0))
    start, _ = gl.broadcast(dp_start[:, None], zeros)
    mbarrier.wait(v_full.index(slot), phase)
    next_slot, next_phase = advance(slot, phase, STAGES)
    if not LAST:
        mbarrier.wait(k_full.index(next_slot), next_phase)
    dp_token = warpgroup_mma(do, v, start, is_async=True)
    if not LAST:
        next_k = k_ring.index(next_slot).reshape([BLOCK_N, D]).permute((1, 0))
        s_token = warpgroup_mma(q, next_k, zeros, use_acc=False, is_async=True)
        dp = warpgroup_mma_wait(1, deps=[dp_token])
    else:
        dp = warpgroup_mma_wait(0, deps=[dp_token])
    bar_arrive(V_FREE + slot, 384)
    ds = (p * dp).to(dtype)
    acc_token = warpgroup_mma(gl.convert_layout(ds, operand), k, acc, is_async=True)
    if not LAST:
        s = warpgroup_mma_wait(1, deps=[s_token])
        p = _probabilities(s, lse, masked, rows, col, offset, seqlen_k, left, right, scale_log2, HAS_LEFT, HAS_RIGHT)
    acc = warpgroup_mma_wait(0, deps=[acc_token])
    bar_arrive(K_FREE + slot, 384)
    return acc, p, next_slot, next_phase


@gluon.jit
def _compute(w: gl.constexpr, dq_desc, lse, dlse, lse_log2, dp_start, q_tile, o_tile, do_tile, k_ring, v_ring, info, full,
             empty, k_full, v_full, num_heads, seqlen_q, padded_rows, left, right, scale, scale_log2, D: gl.constexpr,
             BLOCK_N: gl.constexpr, STAGES: gl.constexpr, VARLEN: gl.constexpr, HAS_LEFT: gl.constexpr,
             HAS_RIGHT: gl.constexpr, HAS_DLSE: gl.constexpr):
    """Warpgroup w: the rows 64 w ... 64 w + 63 of every tile."""
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, score_layout)
    local = gl.arange(0, 64, row_layout)
    slot = 0
    phase = 0
    side = 0
    mbarrier.wait(full, 0)
    working = get_info(info, 0, WORKING)
    while working != 0:
        row = get_info(info, side, ROW) + 64 * w
        rows_here = get_info(info, side, ROWS)
        cols = get_info(info, side, COLS)
        head = get_info(info, side, HEAD)
        sequence = get_info(info, side, SEQUENCE)
        start = get_info(info, side, START)
        first = get_info(info, side, LO)
        end = get_info(info, side, HI)
        do_place = do_tile.index(2 * side + w)
        rows = local + row
        real = rows < rows_here
        if VARLEN:
            stats = head.to(gl.int64) * seqlen_q + start
        else:
            stats = (sequence.to(gl.int64) * num_heads + head) * seqlen_q
        row_lse = gl.load(lse + stats + rows, mask=real, other=-float("inf"))
        row_lse = gl.where(row_lse == -float("inf"), float("inf"), row_lse * LOG2E)  # sees nothing: its P is 0
        q = q_tile.index(w).reshape([64, D]).load(gl.DotOperandLayout(0, score_layout, 2))
        minus_delta = -_delta(o_tile.index(w), do_place, D, row_layout)
        if HAS_DLSE:
            minus_delta += gl.load(dlse + stats + rows, mask=real, other=0.0)
        tma.store_wait(0)  # of the tile before, from where the next one's dO goes
        mbarrier.arrive(empty, count=1)
        where = head.to(gl.int64) * padded_rows + padded_row(sequence, start, rows_here, 64, VARLEN) + row
        within = (local < 64) & (row < rows_here)  # all 64, or none
        gl.store(lse_log2 + where + local, row_lse, mask=within)
        gl.store(dp_start + where + local, minus_delta, mask=within)

        offset = cols - rows_here
        lo, full_lo, full_hi, hi = block_range(row, rows_here, cols, left, right, 64, BLOCK_N, HAS_LEFT, HAS_RIGHT)
        lo = gl.where(row < rows_here, gl.minimum(lo, end), end)
        hi = gl.where(row < rows_here, gl.minimum(hi, end), end)
        for _ in range(lo - first):
            slot, phase = _pass_over(k_full, v_full, slot, phase, STAGES)
        acc = gl.zeros([64, D], gl.float32, out_layout)
        if hi > lo:
            do = do_place.reshape([64, D])
            mbarrier.wait(k_full.index(slot), phase)
            k = k_ring.index(slot).reshape([BLOCK_N, D]).permute((1, 0))
            zeros = gl.zeros([64, BLOCK_N], gl.float32, score_layout)
            s_token = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=[s_token])
            p = _probabilities(s, row_lse, (lo < full_lo) | (lo >= full_hi), rows, lo * BLOCK_N, offset, cols, left, right,
                               scale_log2, HAS_LEFT, HAS_RIGHT)
            for block in range(lo + 1, hi):
                acc, p, slot, phase = _step(
                    q, do, minus_delta, row_lse, k_ring, v_ring, k_full, v_full, acc, p, slot, phase,
                    (block < full_lo) | (block >= full_hi), rows, block * BLOCK_N, offset, cols, left, right, scale_log2,
                    STAGES, HAS_LEFT, HAS_RIGHT, False)
            acc, p, slot, phase = _step(
                q, do, minus_delta, row_lse, k_ring, v_ring, k_full, v_full, acc, p, slot, phase, False, rows, 0, offset,
                cols, left, right, scale_log2, STAGES, HAS_LEFT, HAS_RIGHT, True)
        for _ in range(end - hi):
            slot, phase = _pass_over(k_full, v_full, slot, phase, STAGES)
        do_place.reshape([64, D]).store((acc * scale).to(k_ring.dtype))
        fence_async_shared()
        copy_rows_out(dq_desc, do_place, sequence, head, start, rows_here, row, VARLEN)
        side ^= 1
        mbarrier.wait(full, side)
        working = get_info(info, side, WORKING)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=[
    "num_tiles", "num_heads", "seqlen_q", "seqlen_k", "batch", "section", "sections", "left", "right", "padded_rows",
    "group"])
def dq_kernel(q_desc, k_desc, v_desc, do_desc, o_desc, dq_desc, lse, dlse, lse_log2, dp_start, schedule, counter, num_tiles,
              num_heads, seqlen_q, seqlen_k, batch, section, sections, left, right, padded_rows, scale, scale_log2, group,
              D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, VARLEN: gl.constexpr,
              HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, HAS_DLSE: gl.constexpr, REGS: gl.constexpr):
    """grid: (multiprocessors,). Varlen: seqlen_q is the number of all rows, and schedule's first word that of its tiles.
    lse_log2 and dp_start, (heads, padded_rows), are left as workspace.prepare_kernel leaves them."""
    dtype: gl.constexpr = q_desc.dtype
    q_tile = gl.allocate_shared_memory(dtype, [2] + q_desc.block_type.shape, q_desc.layout)
    o_tile = gl.allocate_shared_memory(dtype, [2] + o_desc.block_type.shape, o_desc.layout)
    do_tile = gl.allocate_shared_memory(dtype, [4] + do_desc.block_type.shape, do_desc.layout)  # 2 * side + warpgroup
    k_ring = gl.allocate_shared_memory(dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout)
    info = gl.allocate_shared_memory(gl.int32, [2 * INFO, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(full, count=1)
    mbarrier.init(empty, count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
    if VARLEN:
        num_tiles = gl.load(schedule) * num_heads
        schedule += 8
    # the tuples must stand here: given a name, their constants would become tensors
    gl.warp_specialize([
        (_copy, (q_desc, k_desc, v_desc, do_desc, o_desc, q_tile, o_tile, do_tile, k_ring, v_ring, info, full, empty, k_full,
                 v_full, schedule, counter, num_heads, seqlen_q, seqlen_k, batch, section, sections, left, right, num_tiles,
                 group, BLOCK_M, BLOCK_N, STAGES, VARLEN, HAS_LEFT, HAS_RIGHT)),
        (_compute, (0, dq_desc, lse, dlse, lse_log2, dp_start, q_tile, o_tile, do_tile, k_ring, v_ring, info, full, empty,
                    k_full, v_full, num_heads, seqlen_q, padded_rows, left, right, scale, scale_log2, D, BLOCK_N, STAGES,
                    VARLEN, HAS_LEFT, HAS_RIGHT, HAS_DLSE)),
        (_compute, (1, dq_desc, lse, dlse, lse_log2, dp_start, q_tile, o_tile, do_tile, k_ring, v_ring, info, full, empty,
                    k_full, v_full, num_heads, seqlen_q, padded_rows, left, right, scale, scale_log2, D, BLOCK_N, STAGES,
                    VARLEN, HAS_LEFT, HAS_RIGHT, HAS_DLSE)),
    ], [4, 4], [REGS, REGS])
