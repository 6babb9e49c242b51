"""What the Hopper kernels stand on: copies, barriers, where a tile lies, which blocks it meets, and who computes it when.

Names as in the other kernels: a *row* is a query, a *column* a key; `left` and `right` are AttentionSpec.band, and HAS_LEFT
and HAS_RIGHT say whether they bound anything.

A kernel here is persistent: one program a multiprocessor, in it one partition that fetches tiles and copies, and others that
compute. Tiles are handed out by a counter in global memory, the longest (of packed rows: of the longest document) first, so
that no multiprocessor waits for another.
"""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import tma

# triton 3.8 gave the copies and the reduction these names; from 3.9 on the old ones raise
copy_in = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
copy_out = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
partition_barrier = getattr(gl, "barrier", None) or gl.thread_barrier

INFO: gl.constexpr = gl.constexpr(16)  # words that describe a tile
RAGGED_ROWS: gl.constexpr = gl.constexpr(0x40000000)


# --- barriers -------------------------------------------------------------------------------------------------------
# Hardware barriers 0 to 4 are Triton's own. Arriving there costs a warp one instruction, while arriving at an mbarrier
# makes Triton gather the whole partition first; so what the inner loops hand over goes through these.


@gluon.jit
def bar_sync(barrier, THREADS: gl.constexpr):
    """Wait until THREADS threads have arrived at hardware barrier `barrier`, this one included."""
    gl.inline_asm_elementwise("bar.sync $1, $2; mov.b32 $0, 0;", "=r,r,n,~{memory}", [barrier, THREADS], gl.int32, False, 1)


@gluon.jit
def bar_arrive(barrier, THREADS: gl.constexpr):
    gl.inline_asm_elementwise("bar.arrive $1, $2; mov.b32 $0, 0;", "=r,r,n,~{memory}", [barrier, THREADS], gl.int32, False, 1)


@gluon.jit
def advance(slot, phase, SLOTS: gl.constexpr):
    """The next slot of a ring, and the phase of its barriers there."""
    slot += 1
    wrapped = slot == SLOTS
    return gl.where(wrapped, 0, slot), gl.where(wrapped, phase ^ 1, phase)


# --- tiles ----------------------------------------------------------------------------------------------------------


@gluon.jit
def uniform(x):
    """x, which is the same in every thread, as the compiler cannot see for itself: it may then live in a uniform register."""
    return gl.inline_asm_elementwise("shfl.sync.idx.b32 $0, $1, 0, 31, 0xffffffff;", "=r,r", [x], gl.int32, True, 1)


@gluon.jit
def put_info(info, slot, i: gl.constexpr, value):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    info.index(slot * INFO + i).store(gl.full([1], value, gl.int32, layout))


@gluon.jit
def get_info(info, slot, i: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return uniform(gl.max(info.index(slot * INFO + i).load(layout), 0))


@gluon.jit
def copy_rows_in(desc, full, tile, sequence, head, start, seqlen, row, VARLEN: gl.constexpr):
    """Copy the rows row, row + 1, ... of one head of one sequence into shared memory. Rows past its end arrive as zeros:
    those of the next document are not read (see launch.describe)."""
    if VARLEN:
        copy_in(desc, [RAGGED_ROWS, start + seqlen, head, RAGGED_ROWS - seqlen + row, 0], full, tile)
    else:
        copy_in(desc, [sequence, head, row, 0], full, tile)


@gluon.jit
def copy_rows_out(desc, tile, sequence, head, start, seqlen, row, VARLEN: gl.constexpr):
    """The way back; rows past the sequence's end are not written."""
    if VARLEN:
        copy_out(desc, [RAGGED_ROWS, start + seqlen, head, RAGGED_ROWS - seqlen + row, 0], tile)
    else:
        copy_out(desc, [sequence, head, row, 0], tile)


@gluon.jit
def locate(tile, num_tiles, num_heads, seqlen, seqlen_other, batch, section, sections, schedule, BLOCK: gl.constexpr,
           VARLEN: gl.constexpr, REVERSE: gl.constexpr):
    """Which block of which head tile number `tile` is.

    `section` heads at a time, the last of the `sections` with all that are left; within it block by block, heads innermost.
    Varlen: the blocks of all documents, in the order prepared in `schedule`, whose rows are (sequence, block, start, seqlen,
    start_other, seqlen_other).

    Returns block, sequence, head, first row of the sequence, its length, and both of the other side.
    """
    if VARLEN:
        blocks = num_tiles // num_heads
        heads = num_heads
    else:
        blocks = (seqlen + BLOCK - 1) // BLOCK
        heads = batch * num_heads
    which = gl.minimum(tile // (blocks * section), sections - 1)
    first = which * section
    tile -= first * blocks
    heads = gl.where(which == sections - 1, heads - first, section)
    block = tile // heads
    head = first + tile % heads
    if VARLEN:
        row = schedule + block * 8
        return (gl.load(row + 1), gl.load(row), head, gl.load(row + 2), gl.load(row + 3), gl.load(row + 4), gl.load(row + 5))
    else:
        if REVERSE:
            block = blocks - 1 - block
        return block, head // num_heads, head % num_heads, 0, seqlen, 0, seqlen_other


@gluon.jit
def block_range(row, seqlen, seqlen_other, left, right, ROWS: gl.constexpr, BLOCK: gl.constexpr,
                HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr):
    """Which blocks of columns the rows row ... row + ROWS - 1 see: lo <= full_lo <= full_hi <= hi, of which
    full_lo ... full_hi - 1 are seen whole by every row and the others need the mask.

    visible(r, c) is -left <= c - (r + seqlen_other - seqlen) <= right; read the other way round (columns as rows) it has
    the same form with left and right exchanged, which is how the backward uses this function too.
    """
    offset = seqlen_other - seqlen
    last = gl.minimum(row + ROWS, seqlen) - 1
    first_col = 0
    first_full = 0
    end_col = seqlen_other
    end_full = seqlen_other
    if HAS_LEFT:
        first_col = gl.maximum(row + offset - left, 0)
        first_full = gl.maximum(last + offset - left, 0)
    if HAS_RIGHT:
        end_col = gl.minimum(end_col, last + offset + right + 1)
        end_full = gl.maximum(gl.minimum(end_full, row + offset + right + 1), 0)
    lo = first_col // BLOCK
    hi = gl.maximum((gl.maximum(end_col, 0) + BLOCK - 1) // BLOCK, lo)
    full_lo = gl.minimum((first_full + BLOCK - 1) // BLOCK, hi)
    full_hi = gl.maximum(end_full // BLOCK, full_lo)
    return lo, full_lo, full_hi, hi


@gluon.jit
def masked_first(i, lo, full_lo, full_hi, hi):
    """Number i of a walk over the blocks lo ... hi - 1: those that need the mask, last ones first, then the full ones.
    Where there is none, i = 0 gives a block of which nothing is visible."""
    above = hi - full_hi
    masked = above + full_lo - lo
    block = gl.where(i < above, hi - 1 - i, gl.where(i < masked, lo + i - above, full_hi - 1 - (i - masked)))
    return gl.maximum(block, lo)


@gluon.jit
def mask(s, rows, col, offset, seqlen_k, left, right, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr):
    """s with the hidden columns at -inf. rows: of s, in the sequence; col: the block's first column."""
    # In an MMA layout bits 1 and 2 of the column come from the lane and the others from the register's number: split so,
    # the compares are against immediates, and no column number needs a register.
    cols = gl.arange(0, s.shape[1], gl.SliceLayout(0, s.type.layout))
    lane = (cols & 6)[None, :]
    number = (cols & -7)[None, :]
    last = seqlen_k - 1 - col
    if HAS_RIGHT:
        limit = gl.minimum(rows + (offset + right - col), last)[:, None]
        s = gl.where(number <= limit - lane, s, -float("inf"))
    else:
        s = gl.where(number <= last - lane, s, -float("inf"))
    if HAS_LEFT:
        s = gl.where(number >= (rows + (offset - left - col))[:, None] - lane, s, -float("inf"))
    return s


@gluon.jit
def padded_row(sequence, start, seqlen, BLOCK: gl.constexpr, VARLEN: gl.constexpr):
    """The first row of a sequence in the workspaces, where each begins on a multiple of BLOCK."""
    if VARLEN:
        return (start // BLOCK + sequence) * BLOCK
    else:
        return sequence * ((seqlen + BLOCK - 1) // BLOCK * BLOCK)


@gluon.jit
def next_tile(counter, num_tiles):
    """The next tile that nobody has; the program that draws the last number sets the counter back to zero."""
    drawn = gl.atomic_add(counter, 1, sem="relaxed")  # else it would wait for all that has been written
    if drawn == num_tiles - 1:
        gl.atomic_xchg(counter, 0, sem="relaxed")
    return drawn + gl.num_programs(0)
