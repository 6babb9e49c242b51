"""What the forward and the backward kernels share: where a tile lies, which blocks it meets, how a tile is loaded.

Names: a *row* is a query, a *column* a key. `left` and `right` are AttentionSpec.band; HAS_LEFT and HAS_RIGHT say
whether they bound anything, so that an unbounded side costs nothing. Softcap, ALiBi, dropout and sinks each come with an
argument that is None where they are off, which the compiler removes together with what would be done with it.
"""

import triton
import triton.language as tl

from axo_flash.kernels import dropout

# The interpreter multiplies the raw bits of bf16 operands: upcast them there.
INTERPRETED: tl.constexpr = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
ROUNDS: tl.constexpr = tl.constexpr(dropout.ROUNDS)
BITS: tl.constexpr = tl.constexpr(dropout.BITS)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def dot(a, b):
    """a @ b, accumulated in fp32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b)


@triton.jit
def locate(tile, cu_seqlens, cu_seqlens_other, batch, total, seqlen, seqlen_other, num_tiles,
           BLOCK: tl.constexpr, VARLEN: tl.constexpr, REVERSE: tl.constexpr):
    """The sequence and the rows of tile number `tile` of one head.

    Dense: num_tiles tiles a sequence. Varlen: sequence i owns the tiles from cu_seqlens[i] // BLOCK + i on, which is room
    for all of its rows, so the owner is found from cu_seqlens alone: no host sync, no schedule. What lies behind
    cu_seqlens[batch] is one more sequence, that sees nothing and gets zeros.

    Returns sequence, first row of the sequence (int64), first of the other side, both lengths, first row of the tile.
    """
    if VARLEN:
        owners = 0
        for first in range(0, batch + 1, 128):
            i = first + tl.arange(0, 128)
            starts = tl.load(cu_seqlens + i, mask=i <= batch, other=0)
            owners += tl.sum(((i <= batch) & (starts // BLOCK + i <= tile)).to(tl.int32), 0)
        sequence = owners - 1
        start = tl.load(cu_seqlens + sequence)
        start_other = tl.load(cu_seqlens_other + sequence)
        is_document = sequence < batch
        end = tl.load(cu_seqlens + sequence + 1, mask=is_document, other=total)
        end_other = tl.load(cu_seqlens_other + sequence + 1, mask=is_document, other=start_other)
        block = tile - start // BLOCK - sequence
        return sequence, start.to(tl.int64), start_other.to(tl.int64), end - start, end_other - start_other, block * BLOCK
    else:
        sequence = tile // num_tiles
        block = tile % num_tiles
        if REVERSE:  # the longest tiles of a causal head first
            block = num_tiles - 1 - block
        zero = tl.zeros((), tl.int64)
        return sequence, zero, zero, seqlen, seqlen_other, block * BLOCK


@triton.jit
def block_range(row, seqlen, seqlen_other, left, right, ROWS: tl.constexpr, BLOCK: tl.constexpr,
                HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """Which columns the rows row ... row + ROWS - 1 see, in blocks: [lo, full_lo) and [full_hi, hi) need the mask,
    [full_lo, full_hi) are seen whole by every row, no others are seen at all.

    visible(r, c) is -left <= c - (r + seqlen_other - seqlen) <= right; read the other way round (columns as rows) it has
    the same form with left and right exchanged, which is how the backward uses this function too.
    """
    offset = seqlen_other - seqlen
    last = tl.minimum(row + ROWS, seqlen) - 1
    lo = 0
    full_lo = 0
    hi = seqlen_other
    full_hi = seqlen_other
    if HAS_LEFT:
        lo = tl.maximum(row + offset - left, 0) // BLOCK * BLOCK
        full_lo = (tl.maximum(last + offset - left, 0) + BLOCK - 1) // BLOCK * BLOCK
    if HAS_RIGHT:
        hi = tl.maximum(tl.minimum(hi, last + offset + right + 1), 0)
        full_hi = tl.maximum(tl.minimum(full_hi, row + offset + right + 1), 0)
    full_lo = tl.minimum(full_lo, tl.cdiv(hi, BLOCK) * BLOCK)
    full_hi = tl.maximum(full_hi // BLOCK * BLOCK, full_lo)
    return lo // BLOCK, full_lo // BLOCK, full_hi // BLOCK, tl.cdiv(hi, BLOCK)


@triton.jit
def num_masked(lo, full_lo, full_hi, hi):
    """How many blocks of block_range need the mask."""
    return tl.maximum(full_lo - lo, 0) + tl.maximum(hi - full_hi, 0)


@triton.jit
def block_number(i, lo, full_lo, full_hi, MASKED: tl.constexpr):
    """The i-th of the blocks that need the mask, so that one loop walks both edges; or of the full ones."""
    if MASKED:
        left = tl.maximum(full_lo - lo, 0)
        return tl.where(i < left, lo + i, full_hi + i - left)
    else:
        return full_lo + i


@triton.jit
def visible(rows, cols, seqlen_q, seqlen_k, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """AttentionSpec.visible on two index tensors that broadcast; false for indices past the ends."""
    seen = (rows < seqlen_q) & (cols < seqlen_k)
    distance = cols - rows - (seqlen_k - seqlen_q)
    if HAS_LEFT:
        seen = seen & (distance >= -left)
    if HAS_RIGHT:
        seen = seen & (distance <= right)
    return seen


@triton.jit
def tanh(x):
    """By the exponential: the error, 1e-7, is absolute, as that of a score is; portable, and exact at both ends."""
    return 1.0 - 2.0 / (1.0 + tl.math.exp2(x * (2.0 * LOG2E)))


@triton.jit
def alibi_bias(slope, rows, cols, seqlen_q, seqlen_k):
    """AttentionSpec.alibi_bias on two index tensors that broadcast, times `slope`."""
    distance = cols - rows - (seqlen_k - seqlen_q)
    return -slope * tl.abs(distance).to(tl.float32)


@triton.jit
def alibi_slope(alibi_slopes, stride_slopes, sequence, head, batch):
    """The slope of a head, for scores in base 2; of the last sequence behind the last, where nothing is seen."""
    return tl.load(alibi_slopes + tl.minimum(sequence, batch - 1) * stride_slopes + head) * LOG2E


@triton.jit
def kept(seed, dropped_below, sequence, head, rows, cols):
    """dropout.kept on two index tensors that broadcast: Philox counters, so the same in every kernel and tile."""
    bits, _, _, _ = tl.philox(seed, cols, rows, head, sequence, ROUNDS)
    return (bits >> (32 - BITS)).to(tl.int32) >= dropped_below


@triton.jit
def head_base(pointer, sequence, start, head, stride_batch, stride_row, stride_head, UNIT: tl.constexpr):
    """Address of row 0 of one head of one sequence. Strides come divided by UNIT, so that the compiler knows that they
    are multiples of 16 bytes even where head_dim is no multiple of 16."""
    stride_batch = tl.cast(stride_batch, tl.int64) * UNIT
    stride_row = tl.cast(stride_row, tl.int64) * UNIT
    stride_head = tl.cast(stride_head, tl.int64) * UNIT
    return pointer + sequence * stride_batch + start * stride_row + head * stride_head


@triton.jit
def _addresses(base, row, stride_row, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr):
    stride_row = tl.cast(stride_row, tl.int64) * UNIT  # 64 bits: a head may span more than 2^31 elements
    offsets = tl.arange(0, ROWS)[:, None] * stride_row + tl.arange(0, BLOCK_D)[None, :]
    return base + tl.cast(row, tl.int64) * stride_row + offsets


@triton.jit
def load_tile(base, row, stride_row, limit, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
              UNIT: tl.constexpr, CLIP: tl.constexpr):
    """[ROWS, BLOCK_D] from row `row` on; zeros past HEAD_DIM and, with CLIP, past row `limit`."""
    addresses = _addresses(base, row, stride_row, ROWS, BLOCK_D, UNIT)
    rows = row + tl.arange(0, ROWS)[:, None]
    dims = tl.arange(0, BLOCK_D)[None, :]
    if CLIP:
        if HEAD_DIM < BLOCK_D:
            return tl.load(addresses, mask=(rows < limit) & (dims < HEAD_DIM), other=0.0)
        else:
            return tl.load(addresses, mask=rows < limit, other=0.0)
    elif HEAD_DIM < BLOCK_D:
        return tl.load(addresses, mask=dims < HEAD_DIM, other=0.0)
    else:
        return tl.load(addresses)


@triton.jit
def stream_tile(descriptor, base, sequence, start, head, row, stride_row, limit, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
                BLOCK_D: tl.constexpr, UNIT: tl.constexpr, MASKED: tl.constexpr, VARLEN: tl.constexpr, TMA: tl.constexpr):
    """load_tile inside a loop: through the copy engine where the call has a descriptor (batch, row, head, dim). That clips
    at the end of the tensor, which is not the end of a varlen sequence: its last block is loaded through addresses, for
    what lies behind may be anything, NaN included."""
    if TMA and not (MASKED and VARLEN):
        first = row + tl.cast(start, tl.int32)
        return descriptor.load([sequence, first, head, 0]).reshape([ROWS, BLOCK_D])
    else:
        return load_tile(base, row, stride_row, limit, ROWS, HEAD_DIM, BLOCK_D, UNIT, MASKED)


@triton.jit
def store_tile(base, row, stride_row, limit, tile, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
               UNIT: tl.constexpr):
    """Write [ROWS, BLOCK_D] in the dtype of `base`, without what lies past HEAD_DIM or row `limit`."""
    addresses = _addresses(base, row, stride_row, ROWS, BLOCK_D, UNIT)
    mask = row + tl.arange(0, ROWS)[:, None] < limit
    if HEAD_DIM < BLOCK_D:
        mask = mask & (tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM)
    tl.store(addresses, tile.to(base.dtype.element_ty), mask=mask)
