"""Forward: online softmax over key blocks (FlashAttention-2, Dao 2023, algorithm 1), one program a tile of queries."""

import torch
import triton
import triton.language as tl

from axo_flash.kernels.spec import AttentionSpec
from axo_flash.kernels.triton.launch import Call, run_tuned
from axo_flash.kernels.triton.tiles import (
    LN2,
    LOG2E,
    alibi_bias,
    alibi_slope,
    block_number,
    block_range,
    dot,
    head_base,
    kept,
    load_tile,
    locate,
    num_masked,
    store_tile,
    stream_tile,
    tanh,
    visible,
)


@triton.jit
def _blocks(acc, m, l, q, k_desc, v_desc, k_base, v_base, sequence, start_k, kv_head, stride_kn, stride_vn,
            count, lo, full_lo, full_hi, row, seqlen_q, seqlen_k, left, right, scale_log2,
            cap_scale, cap_log2, slope, seed, dropped_below, document, head,
            BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
            UNIT: tl.constexpr, MASKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
            VARLEN: tl.constexpr, TMA: tl.constexpr):
    """Fold `count` key blocks, the masked or the full ones, into acc [BLOCK_M, BLOCK_D], the row maxima m and row sums l."""
    rows = row + tl.arange(0, BLOCK_M)
    unit = scale_log2
    if cap_scale is not None or slope is not None:
        unit = 1.0  # s is in base 2 already
    for i in tl.range(0, count):
        col = block_number(i, lo, full_lo, full_hi, MASKED) * BLOCK_N
        k = stream_tile(k_desc, k_base, sequence, start_k, kv_head, col, stride_kn, seqlen_k,
                        BLOCK_N, HEAD_DIM, BLOCK_D, UNIT, MASKED, VARLEN, TMA)
        s = dot(q, tl.trans(k))  # [BLOCK_M, BLOCK_N]
        cols = col + tl.arange(0, BLOCK_N)
        if cap_scale is not None:
            s = tanh(s * cap_scale) * cap_log2
        if slope is not None:
            if cap_scale is None:
                s = s * scale_log2
            s += alibi_bias(slope, rows[:, None], cols[None, :], seqlen_q, seqlen_k)
        if MASKED:
            seen = visible(rows[:, None], cols[None, :], seqlen_q, seqlen_k, left, right, HAS_LEFT, HAS_RIGHT)
            s = tl.where(seen, s, -float("inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        shift = m_new * unit
        if MASKED:  # a row that has seen nothing yet: keep -inf - -inf out of the exponent
            shift = tl.where(m_new == -float("inf"), 0.0, shift)
        p = tl.math.exp2(s * unit - shift[:, None])
        alpha = tl.math.exp2(m * unit - shift)
        l = l * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        if seed is not None:
            p = tl.where(kept(seed, dropped_below, document, head, rows[:, None], cols[None, :]), p, 0.0)
        v = stream_tile(v_desc, v_base, sequence, start_k, kv_head, col, stride_vn, seqlen_k,
                        BLOCK_N, HEAD_DIM, BLOCK_D, UNIT, MASKED, VARLEN, TMA)
        acc += dot(p.to(v.dtype), v)
        m = m_new
    return acc, m, l


@triton.jit(do_not_specialize=["batch", "total_q", "seqlen_q", "seqlen_k", "num_tiles", "left", "right", "dropped_below"])
def forward_kernel(q, k, v, k_desc, v_desc, out, lse, cu_seqlens_q, cu_seqlens_k,
                   stride_qb, stride_qm, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
                   stride_ob, stride_om, stride_oh,
                   batch, total_q, seqlen_q, seqlen_k, num_tiles, num_heads, left, right, scale_log2,
                   cap_scale, cap_log2, alibi_slopes, stride_slopes, sinks, dropout_seed, dropped_below, keep_scale,
                   GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
                   VARLEN: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr):
    """grid: (tiles of one head * heads,), the tiles of a head side by side so that they share its k and v in L2."""
    tiles_of_head = tl.num_programs(0) // num_heads
    head = tl.program_id(0) // tiles_of_head
    kv_head = head // GROUP
    sequence, start_q, start_k, seqlen_q, seqlen_k, row = locate(
        tl.program_id(0) % tiles_of_head, cu_seqlens_q, cu_seqlens_k, batch, total_q, seqlen_q, seqlen_k, num_tiles,
        BLOCK_M, VARLEN, HAS_RIGHT)
    if row >= seqlen_q:
        return
    document = sequence
    lse_start = (sequence.to(tl.int64) * num_heads + head) * seqlen_q
    if VARLEN:
        lse_start = head.to(tl.int64) * total_q + start_q
        sequence = 0
    q_base = head_base(q, sequence, start_q, head, stride_qb, stride_qm, stride_qh, UNIT)
    k_base = head_base(k, sequence, start_k, kv_head, stride_kb, stride_kn, stride_kh, UNIT)
    v_base = head_base(v, sequence, start_k, kv_head, stride_vb, stride_vn, stride_vh, UNIT)
    out_base = head_base(out, sequence, start_q, head, stride_ob, stride_om, stride_oh, UNIT)

    q_tile = load_tile(q_base, row, stride_qm, seqlen_q, BLOCK_M, HEAD_DIM, BLOCK_D, UNIT, True)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    unit = scale_log2
    slope, seed = None, None
    if alibi_slopes is not None:
        slope = alibi_slope(alibi_slopes, stride_slopes, document, head, batch)
    if dropout_seed is not None:
        seed = tl.load(dropout_seed)
    if cap_scale is not None or alibi_slopes is not None:
        unit = 1.0
    if sinks is not None:  # a score that every query sees, but those behind the last sequence
        sink = tl.load(sinks + head) * LOG2E / unit
        m = tl.zeros([BLOCK_M], tl.float32) + tl.where(document < batch, sink, -float("inf"))
        l = tl.where(m == -float("inf"), 0.0, 1.0)
    lo, full_lo, full_hi, hi = block_range(row, seqlen_q, seqlen_k, left, right, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT)
    acc, m, l = _blocks(acc, m, l, q_tile, k_desc, v_desc, k_base, v_base, sequence, start_k, kv_head, stride_kn, stride_vn,
                        num_masked(lo, full_lo, full_hi, hi), lo, full_lo, full_hi, row, seqlen_q, seqlen_k, left, right,
                        scale_log2, cap_scale, cap_log2, slope, seed, dropped_below, document, head,
                        BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D, UNIT, True, HAS_LEFT, HAS_RIGHT, VARLEN, TMA)
    acc, m, l = _blocks(acc, m, l, q_tile, k_desc, v_desc, k_base, v_base, sequence, start_k, kv_head, stride_kn, stride_vn,
                        full_hi - full_lo, lo, full_lo, full_hi, row, seqlen_q, seqlen_k, left, right,
                        scale_log2, cap_scale, cap_log2, slope, seed, dropped_below, document, head,
                        BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D, UNIT, False, HAS_LEFT, HAS_RIGHT, VARLEN, TMA)

    empty = l == 0.0  # a row that sees no key: output 0, lse -inf
    acc = acc / tl.where(empty, 1.0, l)[:, None]
    if dropout_seed is not None:
        acc = acc * keep_scale
    store_tile(out_base, row, stride_om, seqlen_q, acc, BLOCK_M, HEAD_DIM, BLOCK_D, UNIT)
    rows = row + tl.arange(0, BLOCK_M)
    log_sum = tl.where(empty, -float("inf"), m * (unit * LN2) + tl.log(tl.where(empty, 1.0, l)))
    tl.store(lse + lse_start + rows, log_sum, mask=rows < seqlen_q)


def forward(q, k, v, *, spec: AttentionSpec, cu_seqlens_q=None, cu_seqlens_k=None, **extras):
    """out like q, contiguous, and lse fp32 (batch, num_heads, seqlen_q) or (num_heads, total_q); extras: what else the spec
    asks for (alibi_slopes, sinks, dropout_seed)."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    call = Call(spec, cu_seqlens_q, q, k, v, out)
    lse = torch.empty(call.lse_shape, dtype=torch.float32, device=q.device)

    def run(config):
        tma = config.tma and call.can_describe(k, v)
        k_desc, v_desc = (call.describe(x, config.cols) if tma else None for x in (k, v))
        forward_kernel[call.grid(q, config.rows)](
            q, k, v, k_desc, v_desc, out, lse, cu_seqlens_q, cu_seqlens_k, *call.strides, call.batch, q.shape[0],
            call.seqlen_q, call.seqlen_k, call.tiles(q, config.rows), spec.num_heads, call.left, call.right,
            spec.softmax_scale * LOG2E.value, *call.cap, *call.alibi(extras), extras.get("sinks"), *call.dropout(extras),
            **call.constants, BLOCK_M=config.rows, BLOCK_N=config.cols, TMA=tma, **config.options)

    if q.numel():
        run_tuned("forward", spec, q.device, run)
    return out, lse
