"""Backward by recomputation for Hopper, in Gluon.

A tile is 128 keys of one kv head. Two warpgroups of 64 keys each recompute P^T and dS^T, keep both in registers as operands
of dV and dK, and never wait for one another: what they owe dQ, they leave in shared memory. A third warpgroup, which also
copies Q and dO in, multiplies it with K and adds the product to dQ, in fp32 in global memory, by the copy engine. (In
FlashAttention-3 the two warpgroups compute dQ together, and so meet twice a block.)

The kernels of workspace.py go before and after: one prepares delta, lse and a zeroed dQ, one rounds dQ.
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
    copy_add,
    copy_in,
    copy_rows_in,
    copy_rows_out,
    get_info,
    locate,
    next_tile,
    partition_barrier,
    put_info,
)

Q_FREE: gl.constexpr = gl.constexpr(8)  # hardware barriers 8, 9: Q read, one a ring slot
DO_FREE: gl.constexpr = gl.constexpr(10)  # 10, 11
DS_FULL: gl.constexpr = gl.constexpr(12)  # 12, 13: dS there


@gluon.jit
def _exp2_here(x):
    """2 ** x, computed where it stands: left to itself, the compiler sinks it to below the next product, to which there
    are no registers for both its argument and its result."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], gl.float32, False, 1)


@gluon.jit
def _padded(sequence, start, seqlen, BLOCK: gl.constexpr, VARLEN: gl.constexpr):
    """The first row of a sequence in the workspaces, where each begins on a multiple of BLOCK."""
    if VARLEN:
        return (start // BLOCK + sequence) * BLOCK
    else:
        return sequence * ((seqlen + BLOCK - 1) // BLOCK * BLOCK)


@gluon.jit
def _head_and_block(i, lo, span, kv_head, GROUP: gl.constexpr):
    """Number i of a walk over the blocks lo ... lo + span - 1 of every query head that reads kv_head."""
    return kv_head * GROUP + i // span, lo + i % span


@gluon.jit
def _copy_queries(q_desc, do_desc, s_start_desc, dp_start_desc, q_ring, do_ring, s_start, dp_start, q_full, do_full, slot,
                  copied, sequence, head, start, rows, row, padded, STAGES: gl.constexpr, VARLEN: gl.constexpr):
    """One block of Q and dO, and what S and dP of it start from, into a slot of the rings."""
    if copied >= STAGES:
        bar_sync(Q_FREE + slot, 384)
    mbarrier.expect(q_full.index(slot), q_desc.block_type.nbytes + s_start_desc.block_type.nbytes)
    copy_rows_in(q_desc, q_full.index(slot), q_ring.index(slot), sequence, head, start, rows, row, VARLEN)
    copy_in(s_start_desc, [head, padded + row], q_full.index(slot), s_start.index(slot))
    if copied >= STAGES:
        bar_sync(DO_FREE + slot, 384)
    mbarrier.expect(do_full.index(slot), do_desc.block_type.nbytes + dp_start_desc.block_type.nbytes)
    copy_rows_in(do_desc, do_full.index(slot), do_ring.index(slot), sequence, head, start, rows, row, VARLEN)
    copy_in(dp_start_desc, [head, padded + row], do_full.index(slot), dp_start.index(slot))


@gluon.jit
def _copy_and_dq(q_desc, k_desc, v_desc, do_desc, s_start_desc, dp_start_desc, dq_desc, q_ring, k_tile, v_tile, do_ring,
                 s_start, dp_start, ds_ring, dq_tile, info, kv_full, kv_empty, q_full, do_full, ds_empty, schedule, counter,
                 turns, num_kv_heads, seqlen_q, seqlen_k, batch, section, left, right, num_tiles, padded_rows,
                 GROUP: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
                 VARLEN: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, DETERMINISTIC: gl.constexpr):
    """The copying partition, which also computes dQ: 64 rows by 64 columns at a time, to live in few registers."""
    WN: gl.constexpr = BLOCK_N // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    PARTS: gl.constexpr = BLOCK_M * D // 4096
    SIDE: gl.constexpr = D // 64  # parts side by side
    zeros = gl.zeros([64, 64], gl.float32, layout)
    slot = 0
    copied = 0
    done = 0
    kv_phase = 1
    tile = gl.program_id(0)
    while tile < num_tiles:
        block, sequence, kv_head, start_k, cols, start, rows = locate(
            tile, num_kv_heads, seqlen_k, seqlen_q, batch, section, schedule, BLOCK_N, VARLEN, False)
        col = block * BLOCK_N
        lo, _, _, hi = block_range(col, cols, rows, right, left, BLOCK_N, BLOCK_M, HAS_RIGHT, HAS_LEFT)
        span = gl.maximum(hi - lo, 1)
        count = (hi - lo) * GROUP
        padded = _padded(sequence, start, rows, BLOCK_M, VARLEN)
        tile = next_tile(counter, num_tiles)
        for i in range(gl.minimum(count, STAGES)):
            head, block_m = _head_and_block(i, lo, span, kv_head, GROUP)
            _copy_queries(
                q_desc, do_desc, s_start_desc, dp_start_desc, q_ring, do_ring, s_start, dp_start, q_full, do_full, slot,
                copied, sequence, head, start, rows, block_m * BLOCK_M, padded, STAGES, VARLEN)
            copied += 1
            slot = gl.where(slot == STAGES - 1, 0, slot + 1)
        mbarrier.wait(kv_empty, kv_phase)
        kv_phase ^= 1
        put_info(info, 0, 0, 1)
        put_info(info, 0, 1, col)
        put_info(info, 0, 2, kv_head)
        put_info(info, 0, 3, sequence)
        if VARLEN:
            put_info(info, 0, 4, start_k)
            put_info(info, 0, 5, cols)
            put_info(info, 0, 6, rows)
        partition_barrier()
        mbarrier.expect(kv_full, 2 * k_desc.block_type.nbytes + 2 * v_desc.block_type.nbytes)
        for w in gl.static_range(2):
            copy_rows_in(k_desc, kv_full, k_tile.index(w), sequence, kv_head, start_k, cols, col + w * WN, VARLEN)
            copy_rows_in(v_desc, kv_full, v_tile.index(w), sequence, kv_head, start_k, cols, col + w * WN, VARLEN)

        for i in range(count):
            head, block_m = _head_and_block(i, lo, span, kv_head, GROUP)
            row = block_m * BLOCK_M
            side = done & 1
            done += 1
            bar_sync(DS_FULL + side, 384)
            if DETERMINISTIC:
                first = block_range(row, rows, cols, left, right, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT)[0]
                turn = turns + head * (padded_rows // BLOCK_M) + (padded + row) // BLOCK_M
            for part in gl.static_range(PARTS):
                dq = zeros
                for w in gl.static_range(2):
                    ds = ds_ring.index(side * 2 + w).permute((1, 0)).slice(part // SIDE * 64, 64, dim=0)
                    k = k_tile.index(w).reshape([WN, D]).slice(part % SIDE * 64, 64, dim=1)
                    dq = warpgroup_mma(ds, k, dq, use_acc=w > 0, is_async=True)
                if part == PARTS - 1:
                    ahead = i + STAGES
                    if ahead < count:
                        next_head, next_block = _head_and_block(ahead, lo, span, kv_head, GROUP)
                        _copy_queries(
                            q_desc, do_desc, s_start_desc, dp_start_desc, q_ring, do_ring, s_start, dp_start, q_full,
                            do_full, slot, copied, sequence, next_head, start, rows, next_block * BLOCK_M, padded, STAGES,
                            VARLEN)
                        copied += 1
                        slot = gl.where(slot == STAGES - 1, 0, slot + 1)
                dq = warpgroup_mma_wait(0, deps=[dq])
                if part == PARTS - 1:
                    mbarrier.arrive(ds_empty.index(side), count=1)
                tma.store_wait(1)  # the other buffer may still be read
                buffer = (done * PARTS + part) & 1
                dq_tile.index(buffer).reshape([64, 64]).store(dq)
                fence_async_shared()
                if DETERMINISTIC and part == 0:  # whoever comes before has added its own
                    while gl.atomic_add(turn, 0, sem="acquire") != block - first:
                        pass
                copy_add(dq_desc, [head, padded + row + part // SIDE * 64, part % SIDE * 64], dq_tile.index(buffer))
            if DETERMINISTIC:
                # the sums must be there, not only read from here, before the next block may add its own
                gl.inline_asm_elementwise(
                    "cp.async.bulk.wait_group 0; mov.b32 $0, 0;", "=r,r,~{memory}", [row], gl.int32, False, 1)
                partition_barrier()
                gl.atomic_add(turn, 1, sem="release")
    mbarrier.wait(kv_empty, kv_phase)
    put_info(info, 0, 0, 0)
    mbarrier.arrive(kv_full, count=1)
    for _ in range(gl.minimum(copied, STAGES)):  # nobody may leave while arrivals are open
        slot = gl.where(slot == 0, STAGES - 1, slot - 1)
        bar_sync(Q_FREE + slot, 384)
        bar_sync(DO_FREE + slot, 384)
    tma.store_wait(0)


@gluon.jit
def _compute(w: gl.constexpr, dk_desc, dv_desc, q_ring, k_tile, v_tile, do_ring, s_start, dp_start, ds_ring, info, kv_full,
             kv_empty, q_full, do_full, ds_empty, scale, scale_log2, seqlen_q, seqlen_k, left, right,
             GROUP: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
             VARLEN: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr):
    """Warpgroup w: dK and dV of the keys 64 w ... 64 w + 63 of every tile."""
    WN: gl.constexpr = BLOCK_N // 2
    dtype: gl.constexpr = q_ring.dtype
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(0, score_layout)
    local_rows = gl.arange(0, BLOCK_M, row_layout)
    local_cols = gl.arange(0, WN, gl.SliceLayout(1, score_layout)) + w * WN
    zeros = gl.zeros([WN, BLOCK_M], gl.float32, score_layout)
    k = k_tile.index(w).reshape([WN, D])
    v = v_tile.index(w).reshape([WN, D])
    slot = 0
    phase = 0
    kv_phase = 0
    done = 0
    mbarrier.wait(kv_full, 0)
    working = get_info(info, 0, 0)
    while working != 0:
        col = get_info(info, 0, 1)
        kv_head = get_info(info, 0, 2)
        sequence = get_info(info, 0, 3)
        start_k = 0
        cols = seqlen_k
        rows = seqlen_q
        if VARLEN:
            start_k = get_info(info, 0, 4)
            cols = get_info(info, 0, 5)
            rows = get_info(info, 0, 6)
        lo, full_lo, full_hi, hi = block_range(col, cols, rows, right, left, BLOCK_N, BLOCK_M, HAS_RIGHT, HAS_LEFT)
        # the rows that see a key: from first_row to last_row
        position = local_cols + (col - (cols - rows))
        if HAS_RIGHT:
            first_row = position - right
        else:
            first_row = gl.zeros_like(position)
        last_row = position + left
        if col + BLOCK_N > cols:  # no row sees the keys behind the last
            first_row = gl.where(local_cols + col < cols, first_row, rows + BLOCK_M)
            full_lo = hi
        dk = gl.zeros([WN, D], gl.float32, out_layout)
        dv = gl.zeros([WN, D], gl.float32, out_layout)
        block = lo
        for _ in range((hi - lo) * GROUP):
            q = q_ring.index(slot).reshape([BLOCK_M, D])
            do = do_ring.index(slot).reshape([BLOCK_M, D])
            # The accumulators start at -lse / softmax_scale and -delta, so that neither needs registers beside them.
            mbarrier.wait(q_full.index(slot), phase)
            start = s_start.index(slot).reshape([BLOCK_M]).load(row_layout)[None, :]
            s_token = warpgroup_mma(k, q.permute((1, 0)), gl.broadcast(start, zeros)[0], is_async=True)
            s = warpgroup_mma_wait(0, deps=[s_token])
            if (block < full_lo) | (block >= full_hi):
                # bits 1 and 2 of the row come from the lane, the others from the register's number: see forward_kernel._mask
                number = (local_rows & -7)[None, :]
                lane = (local_rows & 6)[None, :] + block * BLOCK_M
                s = gl.where(number >= first_row[:, None] - lane, s, -float("inf"))
                if HAS_LEFT:
                    s = gl.where(number <= last_row[:, None] - lane, s, -float("inf"))
            p = _exp2_here(s * scale_log2)
            p_operand = gl.convert_layout(p.to(dtype), operand)
            mbarrier.wait(do_full.index(slot), phase)
            start = dp_start.index(slot).reshape([BLOCK_M]).load(row_layout)[None, :]
            dv_token = warpgroup_mma(p_operand, do, dv, is_async=True)
            dp_token = warpgroup_mma(v, do.permute((1, 0)), gl.broadcast(start, zeros)[0], is_async=True)
            dv = warpgroup_mma_wait(1, deps=[dv_token])
            dp = warpgroup_mma_wait(0, deps=[dp_token])
            ds = (p * dp).to(dtype)
            side = done & 1
            mbarrier.wait(ds_empty.index(side), (done >> 1 & 1) ^ 1)
            ds_ring.index(side * 2 + w).store(ds)
            fence_async_shared()
            bar_arrive(DS_FULL + side, 384)
            dk_token = warpgroup_mma(gl.convert_layout(ds, operand), q, dk, is_async=True)
            bar_arrive(DO_FREE + slot, 384)
            dk = warpgroup_mma_wait(0, deps=[dk_token])
            bar_arrive(Q_FREE + slot, 384)
            done += 1
            slot, phase = advance(slot, phase, STAGES)
            block = gl.where(block == hi - 1, lo, block + 1)

        # where this warpgroup's K and V lay, dK and dV leave
        v_tile.index(w).reshape([WN, D]).store(dv.to(dtype))
        fence_async_shared()
        copy_rows_out(dv_desc, v_tile.index(w), sequence, kv_head, start_k, cols, col + w * WN, VARLEN)
        if done > 0:  # the third warpgroup may still read K
            mbarrier.wait(ds_empty.index((done - 1) & 1), (done - 1) >> 1 & 1)
        k_tile.index(w).reshape([WN, D]).store((dk * scale).to(dtype))
        fence_async_shared()
        copy_rows_out(dk_desc, k_tile.index(w), sequence, kv_head, start_k, cols, col + w * WN, VARLEN)
        tma.store_wait(0)
        mbarrier.arrive(kv_empty, count=1)
        kv_phase ^= 1
        mbarrier.wait(kv_full, kv_phase)
        working = get_info(info, 0, 0)


@gluon.jit(do_not_specialize=[
    "num_tiles", "num_kv_heads", "seqlen_q", "seqlen_k", "batch", "section", "left", "right", "padded_rows"])
def backward_kernel(q_desc, k_desc, v_desc, do_desc, s_start_desc, dp_start_desc, dq_desc, dk_desc, dv_desc, schedule,
                    counter, turns, num_tiles, num_kv_heads, seqlen_q, seqlen_k, batch, section, left, right, padded_rows,
                    scale, scale_log2, GROUP: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
                    STAGES: gl.constexpr, VARLEN: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
                    DETERMINISTIC: gl.constexpr, REGS: gl.constexpr):
    """grid: (multiprocessors,). Varlen: schedule's first word is the number of its tiles."""
    dtype: gl.constexpr = q_desc.dtype
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N // 2, BLOCK_M], dtype)
    q_ring = gl.allocate_shared_memory(dtype, [STAGES] + q_desc.block_type.shape, q_desc.layout)
    do_ring = gl.allocate_shared_memory(dtype, [STAGES] + do_desc.block_type.shape, do_desc.layout)
    k_tile = gl.allocate_shared_memory(dtype, [2] + k_desc.block_type.shape, k_desc.layout)
    v_tile = gl.allocate_shared_memory(dtype, [2] + v_desc.block_type.shape, v_desc.layout)
    ds_ring = gl.allocate_shared_memory(dtype, [4, BLOCK_N // 2, BLOCK_M], ds_layout)
    dq_tile = gl.allocate_shared_memory(gl.float32, [2] + dq_desc.block_type.shape, dq_desc.layout)
    s_start = gl.allocate_shared_memory(gl.float32, [STAGES] + s_start_desc.block_type.shape, s_start_desc.layout)
    dp_start = gl.allocate_shared_memory(gl.float32, [STAGES] + dp_start_desc.block_type.shape, dp_start_desc.layout)
    info = gl.allocate_shared_memory(gl.int32, [INFO, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    kv_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    kv_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ds_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(kv_full, count=1)
    mbarrier.init(kv_empty, count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(do_full.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(ds_empty.index(i), count=1)
    if VARLEN:
        num_tiles = gl.load(schedule) * num_kv_heads
        schedule += 8
    # the tuples must stand here: given a name, their constants would become tensors
    gl.warp_specialize([
        (_copy_and_dq, (q_desc, k_desc, v_desc, do_desc, s_start_desc, dp_start_desc, dq_desc, q_ring, k_tile, v_tile,
                        do_ring, s_start, dp_start, ds_ring, dq_tile, info, kv_full, kv_empty, q_full, do_full, ds_empty,
                        schedule, counter, turns, num_kv_heads, seqlen_q, seqlen_k, batch, section, left, right, num_tiles,
                        padded_rows, GROUP, D, BLOCK_M, BLOCK_N, STAGES, VARLEN, HAS_LEFT, HAS_RIGHT, DETERMINISTIC)),
        (_compute, (0, dk_desc, dv_desc, q_ring, k_tile, v_tile, do_ring, s_start, dp_start, ds_ring, info, kv_full,
                    kv_empty, q_full, do_full, ds_empty, scale, scale_log2, seqlen_q, seqlen_k, left, right, GROUP, D,
                    BLOCK_M, BLOCK_N, STAGES, VARLEN, HAS_LEFT, HAS_RIGHT)),
        (_compute, (1, dk_desc, dv_desc, q_ring, k_tile, v_tile, do_ring, s_start, dp_start, ds_ring, info, kv_full,
                    kv_empty, q_full, do_full, ds_empty, scale, scale_log2, seqlen_q, seqlen_k, left, right, GROUP, D,
                    BLOCK_M, BLOCK_N, STAGES, VARLEN, HAS_LEFT, HAS_RIGHT)),
    ], [4, 4], [REGS, REGS])
