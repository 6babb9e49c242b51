"""Accumulators of wgmma and global memory: rows written from registers, and sums added up as registers hold them."""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon

# --- rows -----------------------------------------------------------------------------------------------------------


@gluon.jit
def _pairs(x, dtype: gl.constexpr):
    """x [rows, n] rounded to dtype, two neighbours in an int32 [rows, n // 2]."""
    lower, upper = gl.split(x.reshape([x.shape[0], x.shape[1] // 2, 2]))
    if dtype == gl.bfloat16:
        instruction: gl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;"
    else:
        instruction: gl.constexpr = "cvt.rn.f16x2.f32 $0, $2, $1;"
    return gl.inline_asm_elementwise(instruction, "=r,f,f", [lower, upper], gl.int32, True, 1)


def _store_transposed() -> str:
    """Of 16 rows that a warp holds as an accumulator does, 16 pairs of numbers each, so that four threads share a row: make
    every thread's four pairs of a row neighbours, and store them at once. $0 ... $7: scratch; $8 ... $15: of a row and of the
    8th after it in turn, pairs p, p + 4, p + 8, p + 12, p being the thread; $16: address of the first row;
    $24: bytes from row to row; $32: rows that there are.

    All this in assembly, as an address that the compiler sees would be computed once for all, and kept in local memory;
    and by %laneid, as with %tid.x the assembler runs out of registers.
    """
    text = """{
    .reg .pred odd, high, first, second;
    .reg .b32 lane, row, value, other;
    .reg .b64 where, below;
    mov.u32 lane, %laneid;
    shr.u32 row, lane, 2;
    setp.lt.s32 first, row, $32;
    mad.wide.s32 where, row, $24, $16;
    add.s32 row, row, 8;
    setp.lt.s32 second, row, $32;
    mad.wide.s32 below, row, $24, $16;
    and.b32 lane, lane, 3;
    mad.wide.u32 where, lane, 16, where;
    mad.wide.u32 below, lane, 16, below;
    and.b32 value, lane, 1;
    setp.ne.b32 odd, value, 0;
    setp.gt.u32 high, lane, 1;
    """
    text += "".join(f"mov.b32 ${i}, ${i + 8};" for i in range(8))
    # a transposition of 4 x 4, by exchanges with the next thread and the one after it
    for distance, here in ((1, "odd"), (2, "high")):
        for row in range(2):
            for a in (0, 2) if distance == 1 else (0, 1):
                a, b = 2 * a + row, 2 * (a + distance) + row
                text += f"""
                selp.b32 value, ${a}, ${b}, {here};
                shfl.sync.bfly.b32 other, value, {distance}, 31, -1;
                selp.b32 ${a}, other, ${a}, {here};
                selp.b32 ${b}, ${b}, other, {here};"""
    return (
        text
        + """
    @first st.global.v4.b32 [where], {$0, $2, $4, $6};
    @second st.global.v4.b32 [below], {$1, $3, $5, $7};
    }"""
    )


STORE_TRANSPOSED: gl.constexpr = gl.constexpr(" ".join(_store_transposed().split()))
STORE_OPERANDS: gl.constexpr = gl.constexpr(",".join(["=&r"] * 8 + ["r"] * 8 + ["l"] * 8 + ["r"] * 16) + ",~{memory}")


@gluon.jit
def write(where, x, pitch, rows, dtype: gl.constexpr):
    """x [64, n], rounded to dtype, to the first `rows` rows at the address `where`, `pitch` bytes apart."""
    x = _pairs(x, dtype)
    warp = gl.arange(0, 64, gl.SliceLayout(1, x.type.layout)) // 16 * 16
    group = gl.arange(0, x.shape[1], gl.SliceLayout(0, x.type.layout)) // 16
    where += (warp * pitch)[:, None] + (group * 64)[None, :]
    rows, _ = gl.broadcast((rows - warp)[:, None], x)
    gl.inline_asm_elementwise(
        STORE_TRANSPOSED, STORE_OPERANDS, [x, where, gl.full_like(x, pitch), rows], gl.int32, False, 8
    )


# --- sums -----------------------------------------------------------------------------------------------------------


@gluon.jit
def add_fragments(where, x):
    """Add x [64, 64] to 4096 floats in global memory, which lie there as its layout holds them: of every thread 16 bytes,
    beside the next thread's. As wide as what the copy engine adds, and without the detour through shared memory, whose
    bandwidth is what the kernel is shortest of. workspace.finish_kernel puts them in order."""
    x = x.reshape([4, 2, 8, 8, 4, 2]).permute((3, 0, 2, 4, 1, 5)).reshape([1024, 4])
    row = gl.arange(0, 1024, gl.SliceLayout(1, x.type.layout))[:, None]
    col = gl.arange(0, 4, gl.SliceLayout(0, x.type.layout))[None, :]
    where += row * 4 + col
    # not gl.atomic_add: behind a branch the assembler does not see that nobody wants to know what was there before
    gl.inline_asm_elementwise(
        "red.relaxed.gpu.global.add.v4.f32 [$4], {$8, $9, $10, $11}; mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; "
        "mov.b32 $3, 0;",
        "=r,=r,=r,=r,l,l,l,l,f,f,f,f,~{memory}",
        [where.to(gl.int64), x],
        gl.int32,
        False,
        4,
    )
