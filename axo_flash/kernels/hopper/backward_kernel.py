"""Backward by recomputation for Hopper, in Gluon.

A tile is 128 keys of one head. Two warpgroups of 64 keys each recompute P^T and dS^T, keep both in registers as operands
of dV and dK, and never wait for one another: what they owe dQ, they leave in shared memory. A third one multiplies it with K
and adds the product to dQ, in fp32 in global memory, straight from its registers. (In FlashAttention-3 the two warpgroups
compute dQ together, and so meet twice a block, and the copy engine adds it.) A fourth finds the tiles and copies.

Between tiles: the next one's first queries are there already, its V comes when the last dP has been computed, its K when dQ
has been. dV and dK leave straight from registers, dV while dK is computed: so neither waits for shared memory to be free,
nor is waited for.

Registers are what the form of this kernel comes from. The two warpgroups have 208 each, of which dK and dV take 128 and P and
dP, or dS, another 48 to 64. Nothing may be kept in local memory: what loads from there waits in the queue of the reductions,
which is always full.

With grouped heads a tile is of a kv head and walks over all `group` query heads that read it, which adds up dK and dV in
registers; or, where tiles differ in length, of a query head, of which `share` share a kv head: the tiles that run side by
side would otherwise be spread over more heads than the cache holds. launch.py then adds up what they owe dK and dV.

The kernels of workspace.py go before and after: one prepares delta, lse and a zeroed dQ, one rounds dQ. Both leave out the
rows that but one tile meets, whose dQ that tile writes.

Not WITH_DQ, this is the second half of a backward whose first, dq_kernel.py, has left delta and lse: there is no third
warpgroup, dS never leaves registers, of which there are 240 now, and K of the next tile comes as soon as the last scores are
computed.
"""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from axo_flash.kernels.hopper.fragments import add_fragments, write
from axo_flash.kernels.hopper.tiles import (
    INFO,
    advance,
    bar_arrive,
    bar_sync,
    block_range,
    copy_in,
    copy_rows_in,
    get_info,
    locate,
    next_tile,
    padded_row,
    partition_barrier,
    put_info,
)

DS_FULL: gl.constexpr = gl.constexpr(5)  # hardware barriers 5, 6: dS there
K_FREE: gl.constexpr = gl.constexpr(5)  # without dQ: K read for the last time in a tile
V_FREE: gl.constexpr = gl.constexpr(7)  # V read for the last time in a tile
Q_FREE: gl.constexpr = gl.constexpr(8)  # 8 ... 11: Q read, one a ring slot
DO_FREE: gl.constexpr = gl.constexpr(12)  # 12 ... 15: dO read

TILES: gl.constexpr = gl.constexpr(4)  # described at a time: one that leaves, one in work, and the next (a power of two)
# The words that describe a tile.
WORKING: gl.constexpr = gl.constexpr(0)  # 0 behind the last one
COL: gl.constexpr = gl.constexpr(1)  # its first key in the sequence
COLS: gl.constexpr = gl.constexpr(2)  # the sequence's keys
ROWS: gl.constexpr = gl.constexpr(3)  # the sequence's queries
HEAD: gl.constexpr = gl.constexpr(4)
LO: gl.constexpr = gl.constexpr(5)  # the blocks of queries that it meets: tiles.block_range
FULL_LO: gl.constexpr = gl.constexpr(6)
FULL_HI: gl.constexpr = gl.constexpr(7)
HI: gl.constexpr = gl.constexpr(8)
FIRST: gl.constexpr = gl.constexpr(9)  # its first key in dk and dv, counted in rows of one head
HEADS: gl.constexpr = gl.constexpr(10)  # of dk and dv
PADDED: gl.constexpr = gl.constexpr(11)  # the sequence's first row in the workspaces
BEGIN: gl.constexpr = gl.constexpr(12)  # in dq: the sequence; varlen: its first row


@gluon.jit
def _describe(info, slot, col, cols, rows, head, lo, full_lo, full_hi, hi, first, heads, padded, begin):
    put_info(info, slot, WORKING, 1)
    put_info(info, slot, COL, col)
    put_info(info, slot, COLS, cols)
    put_info(info, slot, ROWS, rows)
    put_info(info, slot, HEAD, head)
    put_info(info, slot, LO, lo)
    put_info(info, slot, FULL_LO, full_lo)
    put_info(info, slot, FULL_HI, full_hi)
    put_info(info, slot, HI, hi)
    put_info(info, slot, FIRST, first)
    put_info(info, slot, HEADS, heads)
    put_info(info, slot, PADDED, padded)
    put_info(info, slot, BEGIN, begin)


@gluon.jit
def _exp2_here(x):
    """2 ** x, computed where it stands: left to itself, the compiler sinks it to below the next product, to which there
    are no registers for both its argument and its result."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], gl.float32, False, 1)


@gluon.jit
def _rounded_here(x, dtype: gl.constexpr):
    """x rounded to dtype, two in a register. Left to itself, the compiler keeps each in a register of its own."""
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [x], gl.bfloat16, False, 2)
    else:
        return gl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [x], gl.float16, False, 2)


@gluon.jit
def _times(x, y):
    """x * y rounded as x is, and like it two in a register. y: fp32."""
    if x.dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "{ .reg .b32 a, b; shl.b32 a, $1, 16; and.b32 b, $1, 0xffff0000; mul.f32 a, a, $2; mul.f32 b, b, $3; "
            "cvt.rn.bf16x2.f32 $0, b, a; }", "=r,r,f,f", [x, y], gl.bfloat16, False, 2)
    else:
        return gl.inline_asm_elementwise(
            "{ .reg .b16 c, d; .reg .b32 a, b; mov.b32 {c, d}, $1; cvt.f32.f16 a, c; cvt.f32.f16 b, d; mul.f32 a, a, $2; "
            "mul.f32 b, b, $3; cvt.rn.f16x2.f32 $0, b, a; }", "=r,r,f,f", [x, y], gl.float16, False, 2)


@gluon.jit
def _zero_here(count):
    """0, as nothing is counted that far, which the compiler cannot know: an address that is computed from it is computed
    where it stands, and not once for all, to be kept in registers that there are not."""
    return count >> 30


@gluon.jit
def _next(head, block, lo, hi):
    """The next one of a walk over the blocks lo ... hi - 1 of one query head after another."""
    last = block == hi - 1
    return gl.where(last, head + 1, head), gl.where(last, lo, block + 1)


@gluon.jit
def _copy_keys(desc, tile, full, sequence, head, start, seqlen, col, VARLEN: gl.constexpr):
    """K or V of a tile: the keys col, col + 1, ..."""
    mbarrier.expect(full, 2 * desc.block_type.nbytes)
    for w in gl.static_range(2):
        row = col + w * desc.block_type.shape[-2]
        copy_rows_in(desc, full, tile.index(w), sequence, head, start, seqlen, row, VARLEN)


@gluon.jit
def _copy_queries(q_desc, do_desc, lse_desc, dp_start_desc, q_ring, do_ring, lse_ring, dp_start, q_full, do_full, slot,
                  copied, sequence, head, start, rows, row, padded, STAGES: gl.constexpr, VARLEN: gl.constexpr):
    """One block of Q and dO, and what S and dP of it start from, into a slot of the rings."""
    if copied >= STAGES:
        bar_sync(Q_FREE + slot, 384)
    mbarrier.expect(q_full.index(slot), q_desc.block_type.nbytes + lse_desc.block_type.nbytes)
    copy_rows_in(q_desc, q_full.index(slot), q_ring.index(slot), sequence, head, start, rows, row, VARLEN)
    copy_in(lse_desc, [head, padded + row], q_full.index(slot), lse_ring.index(slot))
    if copied >= STAGES:
        bar_sync(DO_FREE + slot, 384)
    mbarrier.expect(do_full.index(slot), do_desc.block_type.nbytes + dp_start_desc.block_type.nbytes)
    copy_rows_in(do_desc, do_full.index(slot), do_ring.index(slot), sequence, head, start, rows, row, VARLEN)
    copy_in(dp_start_desc, [head, padded + row], do_full.index(slot), dp_start.index(slot))


@gluon.jit
def _copy(q_desc, k_desc, v_desc, do_desc, lse_desc, dp_start_desc, q_ring, k_tile, v_tile, do_ring, lse_ring, dp_start,
          info, k_full, k_empty, v_full, q_full, do_full, schedule, counter, num_heads, seqlen_q, seqlen_k, batch, section,
          sections, left, right, num_tiles, group, share, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
          STAGES: gl.constexpr, VARLEN: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
          WITH_DQ: gl.constexpr):
    """The copying partition: tile after tile, what it is, and its queries. V and K, for which there is room when the tile
    before is through with its own, come behind as many queries as there is room for."""
    slot = 0
    copied = 0
    tiles = 0
    tile = gl.program_id(0)
    while tile < num_tiles:
        block, sequence, tile_head, start_k, cols, start, rows = locate(
            tile, num_tiles, num_heads, seqlen_k, seqlen_q, batch, section, sections, schedule, BLOCK_N, VARLEN, False)
        tile = next_tile(counter, num_tiles)
        col = block * BLOCK_N
        lo, full_lo, full_hi, hi = block_range(col, cols, rows, right, left, BLOCK_N, BLOCK_M, HAS_RIGHT, HAS_LEFT)
        padded = padded_row(sequence, start, rows, BLOCK_M, VARLEN)
        _describe(info, tiles & (TILES - 1), col, cols, rows, tile_head, lo, full_lo, full_hi, hi,
                  (start_k + col if VARLEN else sequence * seqlen_k + col) * num_heads + tile_head, num_heads, padded,
                  start if VARLEN else sequence)
        partition_barrier()
        head = tile_head * group
        row_block = lo
        count = (hi - lo) * group
        ahead = gl.minimum(count, STAGES - 1)
        for _ in range(ahead):
            _copy_queries(
                q_desc, do_desc, lse_desc, dp_start_desc, q_ring, do_ring, lse_ring, dp_start, q_full, do_full, slot, copied,
                sequence, head, start, rows, row_block * BLOCK_M, padded, STAGES, VARLEN)
            copied += 1
            slot = gl.where(slot == STAGES - 1, 0, slot + 1)
            head, row_block = _next(head, row_block, lo, hi)
        if WITH_DQ:
            if tiles > 0:
                bar_sync(V_FREE, 384)
            _copy_keys(v_desc, v_tile, v_full, sequence, tile_head // share, start_k, cols, col, VARLEN)
            mbarrier.wait(k_empty, (tiles & 1) ^ 1)
            _copy_keys(k_desc, k_tile, k_full, sequence, tile_head // share, start_k, cols, col, VARLEN)
        else:
            if tiles > 0:
                bar_sync(K_FREE, 384)
            _copy_keys(k_desc, k_tile, k_full, sequence, tile_head // share, start_k, cols, col, VARLEN)
            if tiles > 0:
                bar_sync(V_FREE, 384)
            _copy_keys(v_desc, v_tile, v_full, sequence, tile_head // share, start_k, cols, col, VARLEN)
        for _ in range(count - ahead):
            _copy_queries(
                q_desc, do_desc, lse_desc, dp_start_desc, q_ring, do_ring, lse_ring, dp_start, q_full, do_full, slot, copied,
                sequence, head, start, rows, row_block * BLOCK_M, padded, STAGES, VARLEN)
            copied += 1
            slot = gl.where(slot == STAGES - 1, 0, slot + 1)
            head, row_block = _next(head, row_block, lo, hi)
        tiles += 1
    put_info(info, tiles & (TILES - 1), WORKING, 0)
    if tiles > 0:
        bar_sync(V_FREE, 384)
        if not WITH_DQ:
            bar_sync(K_FREE, 384)
    if WITH_DQ:
        mbarrier.wait(k_empty, (tiles & 1) ^ 1)
    mbarrier.arrive(k_full, count=1)
    for _ in range(gl.minimum(copied, STAGES)):  # nobody may leave while arrivals are open
        slot = gl.where(slot == 0, STAGES - 1, slot - 1)
        bar_sync(Q_FREE + slot, 384)
        bar_sync(DO_FREE + slot, 384)


@gluon.jit
def _write_keys(out, x, info, info_slot, w: gl.constexpr):
    """x [64, head_dim] to where the tile's keys 64 w ... 64 w + 63 lie in `out`, which is contiguous. That is asked for once
    more, as there are no registers to keep it."""
    pitch = get_info(info, info_slot, HEADS) * (2 * x.shape[1])
    where = out.to(gl.int64) + get_info(info, info_slot, FIRST).to(gl.int64) * (2 * x.shape[1])
    rows = get_info(info, info_slot, COLS) - get_info(info, info_slot, COL) - 64 * w
    write(where + 64 * w * pitch, x, pitch, rows, out.dtype.element_ty)


@gluon.jit
def _row_of_dq(begin, row, head, stride_b, stride_m, stride_h, VARLEN: gl.constexpr):
    """Where row `row` lies in dq, in units of 8 elements as the strides are. begin: the sequence; varlen: its first row."""
    begin = begin.to(gl.int64)
    if VARLEN:
        return (begin + row) * stride_m + head.to(gl.int64) * stride_h
    else:
        return begin * stride_b + row.to(gl.int64) * stride_m + head.to(gl.int64) * stride_h


@gluon.jit
def _dq(dq_acc, dq, k_tile, ds_ring, info, k_full, k_empty, ds_empty, left, right, padded_rows, stride_b, stride_m, stride_h,
        scale, group, D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, VARLEN: gl.constexpr,
        HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr):
    """The partition that computes dQ, 64 columns at a time, to live in few registers. Where several tiles owe something to
    the same block of rows, they add it up in fp32 in global memory, and workspace.finish_kernel rounds the sums; where only
    one does, as at the beginning of every causal document, it writes dQ itself."""
    WN: gl.constexpr = BLOCK_N // 2
    zeros = gl.zeros([BLOCK_M, 64], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
    done = 0
    info_slot = 0
    phase = 0
    mbarrier.wait(k_full, 0)
    working = get_info(info, 0, WORKING)
    while working != 0:
        cols = get_info(info, info_slot, COLS)
        rows = get_info(info, info_slot, ROWS)
        lo = get_info(info, info_slot, LO)
        hi = get_info(info, info_slot, HI)
        padded = get_info(info, info_slot, PADDED)
        begin = get_info(info, info_slot, BEGIN)
        head = get_info(info, info_slot, HEAD) * group
        count = (hi - lo) * group
        row_block = lo
        if count == 0:
            mbarrier.arrive(k_empty, count=1)
        for i in range(count):
            row = row_block * BLOCK_M
            first, _, _, end = block_range(row, rows, cols, left, right, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT)
            side = done & 1
            done += 1
            bar_sync(DS_FULL + side, 384)
            for part in gl.static_range(D // 64):
                product = zeros
                for w in gl.static_range(2):
                    ds = ds_ring.index(2 * w + side).permute((1, 0))
                    k = k_tile.index(w + _zero_here(done)).reshape([WN, D]).slice(part * 64, 64, dim=1)
                    product = warpgroup_mma(ds, k, product, use_acc=w > 0, is_async=True)
                product = warpgroup_mma_wait(0, deps=[product])
                if part == D // 64 - 1:
                    mbarrier.arrive(ds_empty.index(side), count=1)
                    if i == count - 1:
                        mbarrier.arrive(k_empty, count=1)
                if end - first > 1:
                    add_fragments(
                        dq_acc + (head.to(gl.int64) * padded_rows + padded + row) * D + part * 4096, product)
                else:
                    where = _row_of_dq(begin, row, head, stride_b, stride_m, stride_h, VARLEN) * 16 + part * 128
                    write(dq.to(gl.int64) + where, product * scale, stride_m * 16, rows - row, dq.dtype.element_ty)
            head, row_block = _next(head, row_block, lo, hi)
        info_slot = (info_slot + 1) & (TILES - 1)
        phase ^= 1
        mbarrier.wait(k_full, phase)
        working = get_info(info, info_slot, WORKING)


@gluon.jit
def _probabilities(s, lse, block, hidden, first_row, last_row, scale_log2, HAS_LEFT: gl.constexpr):
    """P of the queries of block number `block`. s [keys, queries]; lse [queries], times log2(e); hidden: does it need the
    mask; a key is seen by the rows first_row ... last_row."""
    if hidden:
        # In an MMA layout bits 1 and 2 of the row come from the lane and the others from the register's number: see
        # tiles.mask.
        rows = gl.arange(0, s.shape[1], gl.SliceLayout(0, s.type.layout))
        number = (rows & -7)[None, :]
        lane = (rows & 6)[None, :] + block * s.shape[1]
        s = gl.where(number >= first_row[:, None] - lane, s, -float("inf"))
        if HAS_LEFT:
            s = gl.where(number <= last_row[:, None] - lane, s, -float("inf"))
    return _exp2_here(s * scale_log2 - lse[None, :])


@gluon.jit
def _step(k_tile, v, q_ring, do_ring, lse_ring, dp_start, ds_ring, q_full, do_full, ds_empty, p, dk, dv, slot, phase, done,
          next_block, next_hidden, first_row, last_row, scale_log2, dv_out, info, info_slot, w: gl.constexpr,
          STAGES: gl.constexpr, EARLY: gl.constexpr, HAS_LEFT: gl.constexpr, WITH_DQ: gl.constexpr, LAST: gl.constexpr):
    """One block of queries: dV, dP, dS and dK from its P; and P of the next block, unless it is the LAST one of the tile:
    then dV leaves while dK is computed.

    The next scores are on the tensor cores while dS is computed (EARLY, where there are the registers) or behind it; their
    exponentials run while dK is.
    """
    WN: gl.constexpr = p.shape[0]
    BLOCK_M: gl.constexpr = p.shape[1]
    D: gl.constexpr = dk.shape[1]
    dtype: gl.constexpr = q_ring.dtype
    score_layout: gl.constexpr = p.type.layout
    row_layout: gl.constexpr = gl.SliceLayout(0, score_layout)
    operand: gl.constexpr = gl.DotOperandLayout(0, dk.type.layout, 2)
    zeros = gl.zeros([WN, BLOCK_M], gl.float32, score_layout)
    q = q_ring.index(slot).reshape([BLOCK_M, D])
    do = do_ring.index(slot).reshape([BLOCK_M, D])
    next_slot, next_phase = advance(slot, phase, STAGES)
    next_q = q_ring.index(next_slot).reshape([BLOCK_M, D]).permute((1, 0))
    k = k_tile.index(w + _zero_here(done)).reshape([WN, D])
    start = dp_start.index(slot).reshape([BLOCK_M]).load(row_layout)[None, :]  # -delta: no registers for it beside dP
    start = gl.broadcast(start, zeros)[0]
    p = _rounded_here(p, dtype)  # for dS too: there are no registers for it in both precisions
    if EARLY:
        if not LAST:
            mbarrier.wait(q_full.index(next_slot), next_phase)
        dp_token = warpgroup_mma(v, do.permute((1, 0)), start, is_async=True)
        dv_token = warpgroup_mma(gl.convert_layout(p, operand), do, dv, is_async=True)
        if LAST:
            dp = warpgroup_mma_wait(1, deps=[dp_token])
        else:
            s_token = warpgroup_mma(k, next_q, zeros, use_acc=False, is_async=True)
            dp = warpgroup_mma_wait(2, deps=[dp_token])
    else:  # dV first: in the other order the assembler runs out of registers and serialises all products
        dv_token = warpgroup_mma(gl.convert_layout(p, operand), do, dv, is_async=True)
        dp_token = warpgroup_mma(v, do.permute((1, 0)), start, is_async=True)
        dv = warpgroup_mma_wait(1, deps=[dv_token])
        dp = warpgroup_mma_wait(0, deps=[dp_token])
        bar_arrive(DO_FREE + slot, 384)
    if LAST:
        bar_arrive(V_FREE, 384)
    ds = _times(p, dp)
    if WITH_DQ:
        side = done & 1
        mbarrier.wait(ds_empty.index(side), (done >> 1 & 1) ^ 1)
        ds_ring.index(2 * w + side).store(ds)
        fence_async_shared()
        bar_arrive(DS_FULL + side, 384)
    if not EARLY and not LAST:
        mbarrier.wait(q_full.index(next_slot), next_phase)
        s_token = warpgroup_mma(k, next_q, zeros, use_acc=False, is_async=True)
    dk_token = warpgroup_mma(gl.convert_layout(ds, operand), q, dk, is_async=True)
    if EARLY:
        dv = warpgroup_mma_wait(1, deps=[dv_token])
        bar_arrive(DO_FREE + slot, 384)
    if not LAST:
        s = warpgroup_mma_wait(1, deps=[s_token])
        lse = lse_ring.index(next_slot).reshape([BLOCK_M]).load(row_layout)
        p = _probabilities(s, lse, next_block, next_hidden, first_row, last_row, scale_log2, HAS_LEFT)
        # awaited here, and not where it is used: a spin loop is a wall behind which the assembler cannot move the
        # exponentials, and left to itself it moves them behind the wait for dK
        mbarrier.wait(do_full.index(next_slot), next_phase)
    else:
        _write_keys(dv_out, dv, info, info_slot, w)
    dk = warpgroup_mma_wait(0, deps=[dk_token])
    bar_arrive(Q_FREE + slot, 384)
    return p, dk, dv, next_slot, next_phase


@gluon.jit
def _compute(w: gl.constexpr, dk_out, dv_out, q_ring, k_tile, v_tile, do_ring, lse_ring, dp_start, ds_ring, info, k_full,
             v_full, q_full, do_full, ds_empty, scale, scale_log2, left, right, group, D: gl.constexpr,
             BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, EARLY: gl.constexpr,
             HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, WITH_DQ: gl.constexpr):
    """Warpgroup w: dK and dV of the keys 64 w ... 64 w + 63 of every tile."""
    WN: gl.constexpr = BLOCK_N // 2
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    local_cols = gl.arange(0, WN, gl.SliceLayout(1, score_layout)) + w * WN
    v = v_tile.index(w).reshape([WN, D])
    slot = 0
    phase = 0
    info_slot = 0
    kv_phase = 0
    done = 0
    mbarrier.wait(k_full, 0)
    working = get_info(info, 0, WORKING)
    while working != 0:
        col = get_info(info, info_slot, COL)
        cols = get_info(info, info_slot, COLS)
        rows = get_info(info, info_slot, ROWS)
        lo = get_info(info, info_slot, LO)
        full_lo = get_info(info, info_slot, FULL_LO)
        full_hi = get_info(info, info_slot, FULL_HI)
        hi = get_info(info, info_slot, HI)
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
        count = (hi - lo) * group
        if count > 0:
            mbarrier.wait(q_full.index(slot), phase)
            q = q_ring.index(slot).reshape([BLOCK_M, D]).permute((1, 0))
            zeros = gl.zeros([WN, BLOCK_M], gl.float32, score_layout)
            k = k_tile.index(w + _zero_here(done)).reshape([WN, D])
            s_token = warpgroup_mma(k, q, zeros, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=[s_token])
            lse = lse_ring.index(slot).reshape([BLOCK_M]).load(gl.SliceLayout(0, score_layout))
            p = _probabilities(
                s, lse, lo, (lo < full_lo) | (lo >= full_hi), first_row, last_row, scale_log2, HAS_LEFT)
            mbarrier.wait(do_full.index(slot), phase)
            mbarrier.wait(v_full, kv_phase)
            block = lo
            for _ in range(count - 1):
                block = gl.where(block == hi - 1, lo, block + 1)
                p, dk, dv, slot, phase = _step(
                    k_tile, v, q_ring, do_ring, lse_ring, dp_start, ds_ring, q_full, do_full, ds_empty, p, dk, dv, slot,
                    phase, done, block, (block < full_lo) | (block >= full_hi), first_row, last_row, scale_log2, dv_out,
                    info, info_slot, w, STAGES, EARLY, HAS_LEFT, WITH_DQ, False)
                done += 1
            if not WITH_DQ:
                bar_arrive(K_FREE, 384)
            p, dk, dv, slot, phase = _step(
                k_tile, v, q_ring, do_ring, lse_ring, dp_start, ds_ring, q_full, do_full, ds_empty, p, dk, dv, slot, phase,
                done, block, False, first_row, last_row, scale_log2, dv_out, info, info_slot, w, STAGES, EARLY, HAS_LEFT,
                WITH_DQ, True)
            done += 1
        else:  # nobody sees these keys
            mbarrier.wait(v_full, kv_phase)
            bar_arrive(V_FREE, 384)
            if not WITH_DQ:
                bar_arrive(K_FREE, 384)
            _write_keys(dv_out, dv, info, info_slot, w)
        _write_keys(dk_out, dk * scale, info, info_slot, w)
        info_slot = (info_slot + 1) & (TILES - 1)
        kv_phase ^= 1
        mbarrier.wait(k_full, kv_phase)
        working = get_info(info, info_slot, WORKING)


@gluon.jit(do_not_specialize=[
    "num_tiles", "num_heads", "seqlen_q", "seqlen_k", "batch", "section", "sections", "left", "right", "padded_rows",
    "stride_b", "stride_m", "stride_h", "group", "share"])
def backward_kernel(q_desc, k_desc, v_desc, do_desc, lse_desc, dp_start_desc, dq_acc, dq, dk, dv, schedule,
                    counter, num_tiles, num_heads, seqlen_q, seqlen_k, batch, section, sections, left, right,
                    padded_rows, stride_b, stride_m, stride_h, scale, scale_log2, group, share, D: gl.constexpr,
                    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, EARLY: gl.constexpr,
                    VARLEN: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
                    WITH_DQ: gl.constexpr, REGS: gl.constexpr, DQ_REGS: gl.constexpr):
    """grid: (multiprocessors,). Varlen: schedule's first word is the number of its tiles. dk and dv are contiguous, with
    num_heads heads, as many as tiles have; the strides are dq's, in units of 8 elements. dq_acc, dq: None if not WITH_DQ."""
    dtype: gl.constexpr = q_desc.dtype
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N // 2, BLOCK_M], dtype)
    q_ring = gl.allocate_shared_memory(dtype, [STAGES] + q_desc.block_type.shape, q_desc.layout)
    do_ring = gl.allocate_shared_memory(dtype, [STAGES] + do_desc.block_type.shape, do_desc.layout)
    k_tile = gl.allocate_shared_memory(dtype, [2] + k_desc.block_type.shape, k_desc.layout)
    v_tile = gl.allocate_shared_memory(dtype, [2] + v_desc.block_type.shape, v_desc.layout)
    if WITH_DQ:
        ds_ring = gl.allocate_shared_memory(dtype, [4, BLOCK_N // 2, BLOCK_M], ds_layout)  # 2 * warpgroup + side
    else:
        ds_ring = q_ring  # not used
    lse_ring = gl.allocate_shared_memory(gl.float32, [STAGES] + lse_desc.block_type.shape, lse_desc.layout)
    dp_start = gl.allocate_shared_memory(gl.float32, [STAGES] + dp_start_desc.block_type.shape, dp_start_desc.layout)
    info = gl.allocate_shared_memory(gl.int32, [TILES * INFO, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    k_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ds_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(k_full, count=1)
    mbarrier.init(v_full, count=1)
    mbarrier.init(k_empty, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(do_full.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(ds_empty.index(i), count=1)
    if VARLEN:
        num_tiles = gl.load(schedule) * num_heads
        schedule += 8
    # the tuples must stand here: given a name, their constants would become tensors
    if WITH_DQ:
        gl.warp_specialize([
            (_copy, (q_desc, k_desc, v_desc, do_desc, lse_desc, dp_start_desc, q_ring, k_tile, v_tile, do_ring, lse_ring,
                     dp_start, info, k_full, k_empty, v_full, q_full, do_full, schedule, counter, num_heads, seqlen_q,
                     seqlen_k, batch, section, sections, left, right, num_tiles, group, share, BLOCK_M, BLOCK_N, STAGES,
                     VARLEN, HAS_LEFT, HAS_RIGHT, True)),
            (_dq, (dq_acc, dq, k_tile, ds_ring, info, k_full, k_empty, ds_empty, left, right, padded_rows, stride_b, stride_m,
                   stride_h, scale, group, D, BLOCK_M, BLOCK_N, VARLEN, HAS_LEFT, HAS_RIGHT)),
            (_compute, (0, dk, dv, q_ring, k_tile, v_tile, do_ring, lse_ring, dp_start, ds_ring, info, k_full, v_full,
                        q_full, do_full, ds_empty, scale, scale_log2, left, right, group, D, BLOCK_M, BLOCK_N, STAGES,
                        EARLY, HAS_LEFT, HAS_RIGHT, True)),
            (_compute, (1, dk, dv, q_ring, k_tile, v_tile, do_ring, lse_ring, dp_start, ds_ring, info, k_full, v_full,
                        q_full, do_full, ds_empty, scale, scale_log2, left, right, group, D, BLOCK_M, BLOCK_N, STAGES,
                        EARLY, HAS_LEFT, HAS_RIGHT, True)),
        ], [4, 4, 4], [DQ_REGS, REGS, REGS])
    else:
        gl.warp_specialize([
            (_copy, (q_desc, k_desc, v_desc, do_desc, lse_desc, dp_start_desc, q_ring, k_tile, v_tile, do_ring, lse_ring,
                     dp_start, info, k_full, k_empty, v_full, q_full, do_full, schedule, counter, num_heads, seqlen_q,
                     seqlen_k, batch, section, sections, left, right, num_tiles, group, share, BLOCK_M, BLOCK_N, STAGES,
                     VARLEN, HAS_LEFT, HAS_RIGHT, False)),
            (_compute, (0, dk, dv, q_ring, k_tile, v_tile, do_ring, lse_ring, dp_start, ds_ring, info, k_full, v_full,
                        q_full, do_full, ds_empty, scale, scale_log2, left, right, group, D, BLOCK_M, BLOCK_N, STAGES,
                        EARLY, HAS_LEFT, HAS_RIGHT, False)),
            (_compute, (1, dk, dv, q_ring, k_tile, v_tile, do_ring, lse_ring, dp_start, ds_ring, info, k_full, v_full,
                        q_full, do_full, ds_empty, scale, scale_log2, left, right, group, D, BLOCK_M, BLOCK_N, STAGES,
                        EARLY, HAS_LEFT, HAS_RIGHT, False)),
        ], [4, 4], [REGS, REGS])
