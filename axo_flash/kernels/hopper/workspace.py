"""What the backward kernel works in, prepared before it and read out after it: plain Triton, as both are bound by memory.

In the workspaces, (heads, padded rows), every sequence begins on a multiple of BLOCK rows: no block holds rows of two.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _owner(row, cu_seqlens, batch, total, BLOCK: tl.constexpr):
    """Varlen: which sequence a row of the workspaces belongs to, its first row there and in q, and its length. What lies
    behind the last document is one more sequence."""
    owners = 0
    for first in range(0, batch + 1, 128):
        i = first + tl.arange(0, 128)
        starts = tl.load(cu_seqlens + i, mask=i <= batch, other=0)
        owners += tl.sum(((i <= batch) & ((starts // BLOCK + i) * BLOCK <= row)).to(tl.int32), 0)
    sequence = owners - 1
    start = tl.load(cu_seqlens + sequence)
    end = tl.load(cu_seqlens + sequence + 1, mask=sequence < batch, other=total)
    return sequence, (start // BLOCK + sequence) * BLOCK, start, end - start


@triton.jit
def _keys_of(sequence, cu_seqlens_k, batch):
    """Varlen: how many keys a sequence has."""
    start = tl.load(cu_seqlens_k + sequence)
    return tl.load(cu_seqlens_k + sequence + 1, mask=sequence < batch, other=start) - start


@triton.jit
def _summed_up(row, seqlen, seqlen_k, left, right, BLOCK: tl.constexpr, KEYS: tl.constexpr, HAS_LEFT: tl.constexpr,
               HAS_RIGHT: tl.constexpr):
    """Is dq of the rows row ... row + BLOCK - 1 the sum of what several tiles of KEYS keys owe, or of none? If it is but one
    that they meet, that one writes dq. As tiles.block_range counts them."""
    offset = seqlen_k - seqlen
    begin = 0
    end = seqlen_k
    if HAS_LEFT:
        begin = tl.maximum(row + offset - left, 0)
    if HAS_RIGHT:
        end = tl.minimum(end, tl.minimum(row + BLOCK, seqlen) + offset + right)
    return (tl.maximum(end, 0) + KEYS - 1) // KEYS - begin // KEYS != 1


@triton.jit(
    do_not_specialize=["stride_ob", "stride_om", "stride_oh", "stride_db", "stride_dm", "stride_dh", "num_heads", "batch",
                       "seqlen", "seqlen_k", "left", "right", "padded_rows"],
    do_not_specialize_on_alignment=["cu_seqlens", "cu_seqlens_k", "dlse", "lse"],
)
def prepare_kernel(out, dout, lse, dlse, lse_log2, dp_start, dq_acc, cu_seqlens, cu_seqlens_k, stride_ob, stride_om,
                   stride_oh, stride_db, stride_dm, stride_dh, num_heads, batch, seqlen, seqlen_k, left, right, padded_rows,
                   HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, VARLEN: tl.constexpr,
                   HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_DLSE: tl.constexpr):
    """At its place in the workspaces: lse in base 2, what the sums of dP start from, which is -delta with
    delta = out . dout - dlse, and zeros in dq_acc where dq is summed up. A row that is nobody's, or sees nothing, has an lse
    of inf: its P is 0. Strides are in units of 8 elements. grid: (padded_rows // BLOCK, heads)"""
    first = tl.program_id(0) * BLOCK
    head = tl.program_id(1).to(tl.int64)
    if VARLEN:
        sequence, padded, start, length = _owner(first, cu_seqlens, batch, seqlen, BLOCK)
        o_base = out + (start.to(tl.int64) * stride_om + head * stride_oh) * 8
        do_base = dout + (start.to(tl.int64) * stride_dm + head * stride_dh) * 8
        stats = head * seqlen + start
        hidden = sequence == batch
        seqlen_k = _keys_of(sequence, cu_seqlens_k, batch)
    else:
        each = tl.cdiv(seqlen, BLOCK) * BLOCK
        sequence = (first // each).to(tl.int64)
        padded = first // each * each
        length = seqlen
        o_base = out + (sequence * stride_ob + head * stride_oh) * 8
        do_base = dout + (sequence * stride_db + head * stride_dh) * 8
        stats = (sequence * num_heads + head) * seqlen
        hidden = False
    rows = first - padded + tl.arange(0, BLOCK)
    dims = tl.arange(0, HEAD_DIM)
    real = (rows < length) & (not hidden)
    tile = rows.to(tl.int64)[:, None]
    o = tl.load(o_base + tile * stride_om * 8 + dims[None, :], mask=real[:, None], other=0.0).to(tl.float32)
    do = tl.load(do_base + tile * stride_dm * 8 + dims[None, :], mask=real[:, None], other=0.0).to(tl.float32)
    value = tl.sum(o * do, 1)
    if HAS_DLSE:
        value -= tl.load(dlse + stats + rows, mask=real, other=0.0)
    row_lse = tl.load(lse + stats + rows, mask=real, other=float("-inf"))
    where = head * padded_rows + first
    row = where + tl.arange(0, BLOCK)
    tl.store(lse_log2 + row, tl.where(row_lse == float("-inf"), float("inf"), row_lse * LOG2E))
    tl.store(dp_start + row, -value)
    if _summed_up(first - padded, length, seqlen_k, left, right, BLOCK, KEYS, HAS_LEFT, HAS_RIGHT):
        zeros = tl.zeros([BLOCK * HEAD_DIM], tl.float32)
        tl.store(dq_acc + where * HEAD_DIM + tl.arange(0, BLOCK * HEAD_DIM), zeros)


@triton.jit
def _in_order(x, HEAD_DIM: tl.constexpr):
    """[64, HEAD_DIM] from 64 * HEAD_DIM numbers as fragments.add_fragments leaves them: of 64 columns after another,
    (8 columns, warp, row of 8, pair of columns, upper or lower 8 rows, one of the pair)."""
    x = tl.reshape(x, [HEAD_DIM // 64, 8, 4, 8, 4, 2, 2])
    return tl.reshape(tl.permute(x, (2, 5, 3, 0, 1, 4, 6)), [64, HEAD_DIM])


@triton.jit(
    do_not_specialize=["stride_b", "stride_m", "stride_h", "batch", "seqlen", "seqlen_k", "left", "right", "padded_rows"],
    do_not_specialize_on_alignment=["cu_seqlens", "cu_seqlens_k"],
)
def finish_kernel(dq_acc, dq, cu_seqlens, cu_seqlens_k, stride_b, stride_m, stride_h, batch, seqlen, seqlen_k, left, right,
                  padded_rows, scale, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, VARLEN: tl.constexpr,
                  HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """dq = scale * dq_acc, put in order and rounded, where it is summed up. grid: (padded_rows // BLOCK, heads), BLOCK being
    64, and the last ones first: their sums are still in the cache. Strides are in units of 8 elements."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK
    head = (tl.num_programs(1) - 1 - tl.program_id(1)).to(tl.int64)
    if VARLEN:
        sequence, padded, start, length = _owner(first, cu_seqlens, batch, seqlen, BLOCK)
        base = dq + (start.to(tl.int64) * stride_m + head * stride_h) * 8
        seqlen_k = _keys_of(sequence, cu_seqlens_k, batch)
    else:
        each = tl.cdiv(seqlen, BLOCK) * BLOCK
        padded = first // each * each
        length = seqlen
        base = dq + ((first // each).to(tl.int64) * stride_b + head * stride_h) * 8
    if _summed_up(first - padded, length, seqlen_k, left, right, BLOCK, KEYS, HAS_LEFT, HAS_RIGHT):
        rows = first - padded + tl.arange(0, BLOCK)
        dims = tl.arange(0, HEAD_DIM)
        x = tl.load(dq_acc + (head * padded_rows + first) * HEAD_DIM + tl.arange(0, BLOCK * HEAD_DIM))
        x = _in_order(x, HEAD_DIM)
        where = base + rows.to(tl.int64)[:, None] * stride_m * 8 + dims[None, :]
        tl.store(where, (x * scale).to(dq.dtype.element_ty), mask=(rows < length)[:, None])
