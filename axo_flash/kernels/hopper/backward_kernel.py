"""Backward by recomputation for Hopper, in Gluon.

A tile is 128 keys of one head. Two warpgroups of 64 keys each recompute P^T and dS^T, keep both in registers as operands
of dV and dK, and never wait for one another: what they owe dQ, they leave in shared memory. A third warpgroup, which also
copies Q and dO in, multiplies it with K and adds the product to dQ, in fp32 in global memory, straight from its registers.
(In FlashAttention-3 the two warpgroups compute dQ together, and so meet twice a block, and the copy engine adds it.)

Between tiles: as soon as dQ has been computed from the last dS, the next tile's K and queries are asked for. dV leaves from
where V was, which nobody needs then, while dK is computed, and dK from where dS was; the next V comes when dV has left.

With grouped heads a tile is of a kv head and walks over all `group` query heads that read it, which adds up dK and dV in
registers; or, where tiles differ in length, of a query head, of which `share` share a kv head: the tiles that run side by
side would otherwise be spread over more heads than the cache holds. launch.py then adds up what they owe dK and dV.

The kernels of workspace.py go before and after: one prepares delta, lse and a zeroed dQ, one rounds dQ. Both leave out the
rows that but one tile meets, whose dQ that tile writes.
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
    copy_in,
    copy_rows_in,
    copy_rows_out,
    get_info,
    locate,
    next_tile,
    partition_barrier,
    put_info,
    reinterpret,
)

DS_FULL: gl.constexpr = gl.constexpr(5)  # hardware barriers 5, 6: dS there
Q_FREE: gl.constexpr = gl.constexpr(8)  # 8 ... 11: Q read, one a ring slot
DO_FREE: gl.constexpr = gl.constexpr(12)  # 12 ... 15: dO read
TILES: gl.constexpr = gl.constexpr(4)  # described at a time: one that leaves, one in work, and the next (a power of two)


@gluon.jit
def _exp2_here(x):
    """2 ** x, computed where it stands: left to itself, the compiler sinks it to below the next product, to which there
    are no registers for both its argument and its result."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], gl.float32, False, 1)


@gluon.jit
def _zero_here(count):
    """0, as nothing is counted that far, which the compiler cannot know: an address that is computed from it is computed
    where it stands, and not once for all, to be kept in registers that there are not. Local memory would have to wait in the
    queue in which the reductions are, so there must be no loads of it in the loops over blocks."""
    return count >> 30


@gluon.jit
def _padded(sequence, start, seqlen, BLOCK: gl.constexpr, VARLEN: gl.constexpr):
    """The first row of a sequence in the workspaces, where each begins on a multiple of BLOCK."""
    if VARLEN:
        return (start // BLOCK + sequence) * BLOCK
    else:
        return sequence * ((seqlen + BLOCK - 1) // BLOCK * BLOCK)


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
def _row_of_dq(dq, sequence, head, start, row, stride_b, stride_m, stride_h, VARLEN: gl.constexpr):
    """Where row `row` of a sequence lies in dq; strides in units of 8 elements."""
    if VARLEN:
        return dq + ((start + row).to(gl.int64) * stride_m + head.to(gl.int64) * stride_h) * 8
    else:
        return dq + (sequence.to(gl.int64) * stride_b + row.to(gl.int64) * stride_m + head.to(gl.int64) * stride_h) * 8


# --- dQ -------------------------------------------------------------------------------------------------------------
# Where several tiles owe something to the same block of rows, they add it up in fp32 in global memory, and finish_kernel
# rounds the sums; where only one does, as at the beginning of every causal document, it writes dQ itself.


@gluon.jit
def _add_fragments(where, x):
    """Add x [64, 64] to 4096 floats in global memory, which lie there as its layout holds them: of every thread 16 bytes,
    beside the next thread's. As wide as what the copy engine adds, and without the detour through shared memory, whose
    bandwidth is what this kernel is shortest of. workspace.finish_kernel puts them in order."""
    x = x.reshape([4, 2, 8, 8, 4, 2]).permute((3, 0, 2, 4, 1, 5)).reshape([1024, 4])
    row = gl.arange(0, 1024, gl.SliceLayout(1, x.type.layout))[:, None]
    col = gl.arange(0, 4, gl.SliceLayout(0, x.type.layout))[None, :]
    where += row * 4 + col
    # not gl.atomic_add: behind a branch the assembler does not see that nobody wants to know what was there before
    gl.inline_asm_elementwise(
        "red.relaxed.gpu.global.add.v4.f32 [$4], {$8, $9, $10, $11}; mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; "
        "mov.b32 $3, 0;", "=r,=r,=r,=r,l,l,l,l,f,f,f,f,~{memory}", [where.to(gl.int64), x], gl.int32, False, 4)


@gluon.jit
def _write_rows(dq, x, stride_m, rows, scale):
    """x [64, 64], scaled and rounded, to the first `rows` rows at dq."""
    # columns as (register, lane, one of two): then the first is a constant in the address, and needs no register there
    x = x.reshape([64, 8, 4, 2])
    three: gl.constexpr = gl.SliceLayout(3, x.type.layout)
    row = gl.arange(0, 64, gl.SliceLayout(1, gl.SliceLayout(2, three)))[:, None][:, :, None][:, :, :, None]
    group = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(2, three)))[None, :][:, :, None][:, :, :, None]
    lane = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(0, three)))[None, :][None, :, :][:, :, :, None]
    one = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(0, gl.SliceLayout(0, x.type.layout))))
    one = one[None, :][None, :, :][None, :, :, :]
    where = (dq + (row * (stride_m * 8) + lane * 2)) + (group * 8 + one)
    gl.store(where, (x * scale).to(dq.dtype.element_ty), mask=row < rows)


@gluon.jit
def _find(tile, num_tiles, info, info_slot, num_heads, seqlen_q, seqlen_k, batch, section, schedule, BLOCK_N: gl.constexpr,
          VARLEN: gl.constexpr):
    """Describe tile number `tile` in a slot of `info`: there it takes no registers until it is wanted."""
    block, sequence, head, start_k, cols, start, rows = locate(
        gl.minimum(tile, num_tiles - 1), num_tiles, num_heads, seqlen_k, seqlen_q, batch, section, schedule, BLOCK_N, VARLEN,
        False)
    put_info(info, info_slot, 0, (tile < num_tiles).to(gl.int32))
    put_info(info, info_slot, 1, block * BLOCK_N)
    put_info(info, info_slot, 2, head)
    put_info(info, info_slot, 3, sequence)
    if VARLEN:
        put_info(info, info_slot, 4, start_k)
        put_info(info, info_slot, 5, cols)
        put_info(info, info_slot, 6, rows)
        put_info(info, info_slot, 7, start)
    partition_barrier()


@gluon.jit
def _described(info, info_slot, seqlen_q, seqlen_k, VARLEN: gl.constexpr):
    """The tile in a slot of `info`: first key, head, sequence; first row and length of the keys, and of the queries."""
    start_k = 0
    start = 0
    cols = seqlen_k
    rows = seqlen_q
    if VARLEN:
        start_k = get_info(info, info_slot, 4)
        cols = get_info(info, info_slot, 5)
        rows = get_info(info, info_slot, 6)
        start = get_info(info, info_slot, 7)
    col = get_info(info, info_slot, 1)
    return col, get_info(info, info_slot, 2), get_info(info, info_slot, 3), start_k, cols, start, rows


@gluon.jit
def _begin(q_desc, k_desc, do_desc, lse_desc, dp_start_desc, q_ring, k_tile, do_ring, lse_ring, dp_start, info, info_slot,
           k_full, q_full, do_full, slot, copied, seqlen_q, seqlen_k, left, right, group, share, BLOCK_M: gl.constexpr,
           BLOCK_N: gl.constexpr, STAGES: gl.constexpr, VARLEN: gl.constexpr, HAS_LEFT: gl.constexpr,
           HAS_RIGHT: gl.constexpr):
    """Ask for what a tile needs first: K, and all but one of the slots full of queries."""
    col, tile_head, sequence, start_k, cols, start, rows = _described(info, info_slot, seqlen_q, seqlen_k, VARLEN)
    _copy_keys(k_desc, k_tile, k_full, sequence, tile_head // share, start_k, cols, col, VARLEN)
    lo, _, _, hi = block_range(col, cols, rows, right, left, BLOCK_N, BLOCK_M, HAS_RIGHT, HAS_LEFT)
    padded = _padded(sequence, start, rows, BLOCK_M, VARLEN)
    head = tile_head * group
    row_block = lo
    for _ in range(gl.minimum((hi - lo) * group, STAGES - 1)):
        _copy_queries(
            q_desc, do_desc, lse_desc, dp_start_desc, q_ring, do_ring, lse_ring, dp_start, q_full, do_full, slot, copied,
            sequence, head, start, rows, row_block * BLOCK_M, padded, STAGES, VARLEN)
        copied += 1
        slot = gl.where(slot == STAGES - 1, 0, slot + 1)
        head, row_block = _next(head, row_block, lo, hi)
    return slot, copied, head, row_block


@gluon.jit
def _copy_and_dq(q_desc, k_desc, v_desc, do_desc, lse_desc, dp_start_desc, dq_acc, dq, q_ring, k_tile, v_tile, do_ring,
                 lse_ring, dp_start, ds_ring, info, k_full, v_full, v_empty, q_full, do_full, ds_empty, schedule, counter,
                 turns, num_heads, seqlen_q, seqlen_k, batch, section, left, right, num_tiles, padded_rows, stride_b,
                 stride_m, stride_h, scale, group, share, D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
                 STAGES: gl.constexpr, VARLEN: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
                 DETERMINISTIC: gl.constexpr):
    """The copying partition, which also computes dQ, 64 columns at a time, to live in few registers."""
    WN: gl.constexpr = BLOCK_N // 2
    zeros = gl.zeros([BLOCK_M, 64], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
    slot = 0
    copied = 0
    done = 0
    info_slot = 0
    v_phase = 0
    ahead_head = 0
    ahead_block = 0
    tile = gl.program_id(0)
    _find(tile, num_tiles, info, 0, num_heads, seqlen_q, seqlen_k, batch, section, schedule, BLOCK_N, VARLEN)
    if tile < num_tiles:
        slot, copied, ahead_head, ahead_block = _begin(
            q_desc, k_desc, do_desc, lse_desc, dp_start_desc, q_ring, k_tile, do_ring, lse_ring, dp_start, info, 0, k_full,
            q_full, do_full, slot, copied, seqlen_q, seqlen_k, left, right, group, share, BLOCK_M, BLOCK_N, STAGES, VARLEN,
            HAS_LEFT, HAS_RIGHT)
        col, tile_head, sequence, start_k, cols, _, _ = _described(info, 0, seqlen_q, seqlen_k, VARLEN)
        _copy_keys(v_desc, v_tile, v_full, sequence, tile_head // share, start_k, cols, col, VARLEN)
    while tile < num_tiles:
        # the next tile, while the first scores of this one are computed
        tile = next_tile(counter, num_tiles)
        next_slot = (info_slot + 1) & (TILES - 1)
        _find(tile, num_tiles, info, next_slot, num_heads, seqlen_q, seqlen_k, batch, section, schedule, BLOCK_N, VARLEN)
        col, tile_head, sequence, _, cols, start, rows = _described(info, info_slot, seqlen_q, seqlen_k, VARLEN)
        info_slot = next_slot
        block = col // BLOCK_N
        lo, _, _, hi = block_range(col, cols, rows, right, left, BLOCK_N, BLOCK_M, HAS_RIGHT, HAS_LEFT)
        count = (hi - lo) * group
        padded = _padded(sequence, start, rows, BLOCK_M, VARLEN)
        head = tile_head * group
        row_block = lo
        for i in range(count):
            row = row_block * BLOCK_M
            first, _, _, end = block_range(row, rows, cols, left, right, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT)
            side = done & 1
            done += 1
            bar_sync(DS_FULL + side, 384)
            if DETERMINISTIC:
                turn = turns + head * (padded_rows // BLOCK_M) + (padded + row) // BLOCK_M
            for part in gl.static_range(D // 64):
                product = zeros
                for w in gl.static_range(2):
                    ds = ds_ring.index(2 * w + side).permute((1, 0))
                    k = k_tile.index(w + _zero_here(done)).reshape([WN, D]).slice(part * 64, 64, dim=1)
                    product = warpgroup_mma(ds, k, product, use_acc=w > 0, is_async=True)
                product = warpgroup_mma_wait(0, deps=[product])
                if part == D // 64 - 1:
                    mbarrier.arrive(ds_empty.index(side), count=1)
                    if i == count - 1 and tile < num_tiles:  # nobody needs K any more: the next tile's, before all else
                        slot, copied, ahead_head, ahead_block = _begin(
                            q_desc, k_desc, do_desc, lse_desc, dp_start_desc, q_ring, k_tile, do_ring, lse_ring, dp_start,
                            info, info_slot, k_full, q_full, do_full, slot, copied, seqlen_q, seqlen_k, left, right, group,
                            share, BLOCK_M, BLOCK_N, STAGES, VARLEN, HAS_LEFT, HAS_RIGHT)
                if end - first > 1:
                    if DETERMINISTIC and part == 0:  # whoever comes before has added its own
                        while gl.atomic_add(turn, 0, sem="acquire") != block - first:
                            pass
                    _add_fragments(
                        dq_acc + (head.to(gl.int64) * padded_rows + padded + row) * D + part * 4096, product)
                else:
                    _write_rows(_row_of_dq(dq, sequence, head, start, row, stride_b, stride_m, stride_h, VARLEN) + part * 64,
                                product, stride_m, rows - row, scale)
                if part == 0 and i + (STAGES - 1) < count:
                    # into the slot of the block before this one, which both warpgroups have left: nothing to wait for
                    _copy_queries(
                        q_desc, do_desc, lse_desc, dp_start_desc, q_ring, do_ring, lse_ring, dp_start, q_full, do_full, slot,
                        copied, sequence, ahead_head, start, rows, ahead_block * BLOCK_M, padded, STAGES, VARLEN)
                    copied += 1
                    slot = gl.where(slot == STAGES - 1, 0, slot + 1)
                    ahead_head, ahead_block = _next(ahead_head, ahead_block, lo, hi)
            if DETERMINISTIC:
                partition_barrier()
                gl.atomic_add(turn, 1, sem="release")
            head, row_block = _next(head, row_block, lo, hi)
        mbarrier.wait(v_empty, v_phase)  # dV has left from where V was
        v_phase ^= 1
        if tile < num_tiles:
            if count == 0:
                slot, copied, ahead_head, ahead_block = _begin(
                    q_desc, k_desc, do_desc, lse_desc, dp_start_desc, q_ring, k_tile, do_ring, lse_ring, dp_start, info,
                    info_slot, k_full, q_full, do_full, slot, copied, seqlen_q, seqlen_k, left, right, group, share, BLOCK_M,
                    BLOCK_N, STAGES, VARLEN, HAS_LEFT, HAS_RIGHT)
            col, tile_head, sequence, start_k, cols, _, _ = _described(info, info_slot, seqlen_q, seqlen_k, VARLEN)
            _copy_keys(v_desc, v_tile, v_full, sequence, tile_head // share, start_k, cols, col, VARLEN)
    mbarrier.arrive(k_full, count=1)
    for _ in range(gl.minimum(copied, STAGES)):  # nobody may leave while arrivals are open
        slot = gl.where(slot == 0, STAGES - 1, slot - 1)
        bar_sync(Q_FREE + slot, 384)
        bar_sync(DO_FREE + slot, 384)


@gluon.jit
def _probabilities(s, lse, block, hidden, first_row, last_row, scale_log2, HAS_LEFT: gl.constexpr):
    """P of the queries of block number `block`. s [keys, queries]; lse [queries], times log2(e); hidden: does it need the
    mask; a key is seen by the rows first_row ... last_row."""
    if hidden:
        # In an MMA layout bits 1 and 2 of the row come from the lane and the others from the register's number: see
        # forward_kernel._mask.
        rows = gl.arange(0, s.shape[1], gl.SliceLayout(0, s.type.layout))
        number = (rows & -7)[None, :]
        lane = (rows & 6)[None, :] + block * s.shape[1]
        s = gl.where(number >= first_row[:, None] - lane, s, -float("inf"))
        if HAS_LEFT:
            s = gl.where(number <= last_row[:, None] - lane, s, -float("inf"))
    return _exp2_here(s * scale_log2 - lse[None, :])


@gluon.jit
def _put_out(desc, stage, x, info, info_slot, seqlen_k, w: gl.constexpr, VARLEN: gl.constexpr):
    """Send x [64, head_dim] to where the tile's keys 64 w ... 64 w + 63 lie, through shared memory. That is asked for again,
    as there are no registers to keep it."""
    start_k = 0
    cols = seqlen_k
    if VARLEN:
        start_k = get_info(info, info_slot, 4)
        cols = get_info(info, info_slot, 5)
    stage.reshape([x.shape[0], x.shape[1]]).store(x)
    fence_async_shared()
    copy_rows_out(desc, stage, get_info(info, info_slot, 3), get_info(info, info_slot, 2), start_k, cols,
                  get_info(info, info_slot, 1) + w * x.shape[0], VARLEN)


@gluon.jit
def _step(k_tile, v, q_ring, do_ring, lse_ring, dp_start, ds_ring, q_full, do_full, ds_empty, p, dk, dv, slot, phase, done,
          next_block, next_hidden, first_row, last_row, scale_log2, dv_desc, v_tile, info, info_slot, seqlen_k,
          w: gl.constexpr, STAGES: gl.constexpr, EARLY: gl.constexpr, VARLEN: gl.constexpr, HAS_LEFT: gl.constexpr,
          LAST: gl.constexpr):
    """One block of queries: dV, dP, dS and dK from its P; and P of the next block, unless it is the LAST one of the tile:
    then dV leaves from where V was, while dK is computed.

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
    if EARLY:
        if not LAST:
            mbarrier.wait(q_full.index(next_slot), next_phase)
        dp_token = warpgroup_mma(v, do.permute((1, 0)), start, is_async=True)
        dv_token = warpgroup_mma(gl.convert_layout(p.to(dtype), operand), do, dv, is_async=True)
        if LAST:
            dp = warpgroup_mma_wait(1, deps=[dp_token])
        else:
            s_token = warpgroup_mma(k, next_q, zeros, use_acc=False, is_async=True)
            dp = warpgroup_mma_wait(2, deps=[dp_token])
    else:  # dV first: in the other order the assembler runs out of registers and serialises all products
        dv_token = warpgroup_mma(gl.convert_layout(p.to(dtype), operand), do, dv, is_async=True)
        dp_token = warpgroup_mma(v, do.permute((1, 0)), start, is_async=True)
        dv = warpgroup_mma_wait(1, deps=[dv_token])
        dp = warpgroup_mma_wait(0, deps=[dp_token])
        bar_arrive(DO_FREE + slot, 384)
    ds = (p * dp).to(dtype)
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
        _put_out(dv_desc, v_tile.index(w), dv.to(dtype), info, info_slot, seqlen_k, w, VARLEN)
    dk = warpgroup_mma_wait(0, deps=[dk_token])
    bar_arrive(Q_FREE + slot, 384)
    return p, dk, dv, next_slot, next_phase


@gluon.jit
def _compute(w: gl.constexpr, dk_desc, dv_desc, q_ring, k_tile, v_tile, do_ring, lse_ring, dp_start, ds_ring, info, k_full,
             v_full, v_empty, q_full, do_full, ds_empty, scale, scale_log2, seqlen_q, seqlen_k, left, right,
             group, D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
             EARLY: gl.constexpr, VARLEN: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr):
    """Warpgroup w: dK and dV of the keys 64 w ... 64 w + 63 of every tile."""
    WN: gl.constexpr = BLOCK_N // 2
    dtype: gl.constexpr = q_ring.dtype
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    local_cols = gl.arange(0, WN, gl.SliceLayout(1, score_layout)) + w * WN
    k = k_tile.index(w).reshape([WN, D])
    v = v_tile.index(w).reshape([WN, D])
    slot = 0
    phase = 0
    info_slot = 0
    kv_phase = 0
    done = 0
    mbarrier.wait(k_full, 0)
    working = get_info(info, 0, 0)
    while working != 0:
        # dK of the tile before has left from where dS will be. (Here, and not later: the barrier that this brings decides
        # where in the loop below the compiler puts the one of each block, which must not be among the exponentials.)
        tma.store_wait(0)
        col = get_info(info, info_slot, 1)
        cols = seqlen_k
        rows = seqlen_q
        if VARLEN:
            cols = get_info(info, info_slot, 5)
            rows = get_info(info, info_slot, 6)
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
        count = (hi - lo) * group
        if count > 0:
            mbarrier.wait(q_full.index(slot), phase)
            q = q_ring.index(slot).reshape([BLOCK_M, D]).permute((1, 0))
            zeros = gl.zeros([WN, BLOCK_M], gl.float32, score_layout)
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
                    phase, done, block, (block < full_lo) | (block >= full_hi), first_row, last_row, scale_log2, dv_desc,
                    v_tile, info, info_slot, seqlen_k, w, STAGES, EARLY, VARLEN, HAS_LEFT, False)
                done += 1
            p, dk, dv, slot, phase = _step(
                k_tile, v, q_ring, do_ring, lse_ring, dp_start, ds_ring, q_full, do_full, ds_empty, p, dk, dv, slot, phase,
                done, block, False, first_row, last_row, scale_log2, dv_desc, v_tile, info, info_slot, seqlen_k, w, STAGES,
                EARLY, VARLEN, HAS_LEFT, True)
            done += 1
        else:  # nobody sees these keys
            mbarrier.wait(v_full, kv_phase)
            _put_out(dv_desc, v_tile.index(w), dv.to(dtype), info, info_slot, seqlen_k, w, VARLEN)
        tma.store_wait(0)
        mbarrier.arrive(v_empty, count=1)
        # dK leaves from where dS was, when dQ has been computed from it
        if done > 0:
            mbarrier.wait(ds_empty.index((done - 1) & 1), (done - 1) >> 1 & 1)
        stages: gl.constexpr = 4 * BLOCK_M // D
        stage = reinterpret(ds_ring, dtype, [stages] + dk_desc.block_type.shape, dk_desc.layout).index(w * (stages // 2))
        _put_out(dk_desc, stage, (dk * scale).to(dtype), info, info_slot, seqlen_k, w, VARLEN)
        info_slot = (info_slot + 1) & (TILES - 1)
        kv_phase ^= 1
        mbarrier.wait(k_full, kv_phase)
        working = get_info(info, info_slot, 0)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=[
    "num_tiles", "num_heads", "seqlen_q", "seqlen_k", "batch", "section", "left", "right", "padded_rows", "stride_b",
    "stride_m", "stride_h", "group", "share"])
def backward_kernel(q_desc, k_desc, v_desc, do_desc, lse_desc, dp_start_desc, dq_acc, dq, dk_desc, dv_desc, schedule,
                    counter, turns, num_tiles, num_heads, seqlen_q, seqlen_k, batch, section, left, right, padded_rows,
                    stride_b, stride_m, stride_h, scale, scale_log2, group, share, D: gl.constexpr,
                    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, EARLY: gl.constexpr,
                    VARLEN: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, DETERMINISTIC: gl.constexpr,
                    REGS: gl.constexpr):
    """grid: (multiprocessors,). Varlen: schedule's first word is the number of its tiles. Strides, of dq, are in units of 8
    elements."""
    dtype: gl.constexpr = q_desc.dtype
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N // 2, BLOCK_M], dtype)
    q_ring = gl.allocate_shared_memory(dtype, [STAGES] + q_desc.block_type.shape, q_desc.layout)
    do_ring = gl.allocate_shared_memory(dtype, [STAGES] + do_desc.block_type.shape, do_desc.layout)
    k_tile = gl.allocate_shared_memory(dtype, [2] + k_desc.block_type.shape, k_desc.layout)
    v_tile = gl.allocate_shared_memory(dtype, [2] + v_desc.block_type.shape, v_desc.layout)
    ds_ring = gl.allocate_shared_memory(dtype, [4, BLOCK_N // 2, BLOCK_M], ds_layout)  # 2 * warpgroup + side
    lse_ring = gl.allocate_shared_memory(gl.float32, [STAGES] + lse_desc.block_type.shape, lse_desc.layout)
    dp_start = gl.allocate_shared_memory(gl.float32, [STAGES] + dp_start_desc.block_type.shape, dp_start_desc.layout)
    info = gl.allocate_shared_memory(gl.int32, [TILES * INFO, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    k_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ds_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(k_full, count=1)
    mbarrier.init(v_full, count=1)
    mbarrier.init(v_empty, count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(do_full.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(ds_empty.index(i), count=1)
    if VARLEN:
        num_tiles = gl.load(schedule) * num_heads
        schedule += 8
    # the tuples must stand here: given a name, their constants would become tensors
    gl.warp_specialize([
        (_copy_and_dq, (q_desc, k_desc, v_desc, do_desc, lse_desc, dp_start_desc, dq_acc, dq, q_ring, k_tile, v_tile,
                        do_ring, lse_ring, dp_start, ds_ring, info, k_full, v_full, v_empty, q_full, do_full, ds_empty,
                        schedule, counter, turns, num_heads, seqlen_q, seqlen_k, batch, section, left, right, num_tiles,
                        padded_rows, stride_b, stride_m, stride_h, scale, group, share, D, BLOCK_M, BLOCK_N, STAGES, VARLEN,
                        HAS_LEFT, HAS_RIGHT, DETERMINISTIC)),
        (_compute, (0, dk_desc, dv_desc, q_ring, k_tile, v_tile, do_ring, lse_ring, dp_start, ds_ring, info, k_full, v_full,
                    v_empty, q_full, do_full, ds_empty, scale, scale_log2, seqlen_q, seqlen_k, left, right, group, D,
                    BLOCK_M, BLOCK_N, STAGES, EARLY, VARLEN, HAS_LEFT, HAS_RIGHT)),
        (_compute, (1, dk_desc, dv_desc, q_ring, k_tile, v_tile, do_ring, lse_ring, dp_start, ds_ring, info, k_full, v_full,
                    v_empty, q_full, do_full, ds_empty, scale, scale_log2, seqlen_q, seqlen_k, left, right, group, D,
                    BLOCK_M, BLOCK_N, STAGES, EARLY, VARLEN, HAS_LEFT, HAS_RIGHT)),
    ], [4, 4], [REGS, REGS])
