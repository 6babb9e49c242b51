"""Backward by recomputation (FlashAttention-2, Dao 2023, algorithm 2), in three kernels and without atomics, so that
every gradient is bit-equal from run to run:

    delta  delta[i] = dout[i] . out[i] - dlse[i]
    dkdv   one program a tile of keys, over all query blocks that see it and all query heads that share it (GQA)
    dq     one program a tile of queries, over all key blocks that it sees
"""

import torch
import triton
import triton.language as tl

from axo_flash.kernels.spec import AttentionSpec
from axo_flash.kernels.triton.launch import Call, block_d, run_tuned, stride_unit
from axo_flash.kernels.triton.tiles import (
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


@triton.jit(do_not_specialize=["seqlen"])
def delta_kernel(out, dout, dlse, delta, stride_ob, stride_om, stride_oh, stride_db, stride_dm, stride_dh,
                 seqlen, num_heads, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
                 HAS_DLSE: tl.constexpr, BLOCK_M: tl.constexpr):
    """grid: (row blocks * heads * batch,)"""
    blocks = tl.cdiv(seqlen, BLOCK_M)
    row = tl.program_id(0) % blocks * BLOCK_M
    head = tl.program_id(0) // blocks % num_heads
    sequence = tl.program_id(0) // blocks // num_heads
    out_base = head_base(out, sequence, 0, head, stride_ob, stride_om, stride_oh, UNIT)
    dout_base = head_base(dout, sequence, 0, head, stride_db, stride_dm, stride_dh, UNIT)
    o = load_tile(out_base, row, stride_om, seqlen, BLOCK_M, HEAD_DIM, BLOCK_D, UNIT, True).to(tl.float32)
    do = load_tile(dout_base, row, stride_dm, seqlen, BLOCK_M, HEAD_DIM, BLOCK_D, UNIT, True).to(tl.float32)
    rows = row + tl.arange(0, BLOCK_M)
    index = (sequence.to(tl.int64) * num_heads + head) * seqlen + rows
    value = tl.sum(o * do, 1)
    if HAS_DLSE:
        value -= tl.load(dlse + index, mask=rows < seqlen, other=0.0)
    tl.store(delta + index, value, mask=rows < seqlen)


@triton.jit
def _probabilities(s, rows, cols, lse_log2, seqlen_q, seqlen_k, scale_log2, cap_scale, cap_log2, slope):
    """exp(score - lse) of s = q k^T, and the slope of the cap there; the indices and lse (in base 2)
    broadcast."""
    if cap_scale is not None:
        capped = tanh(s * cap_scale)
        s2 = capped * cap_log2
        cap_slope = 1.0 - capped * capped
    else:
        s2 = s * scale_log2
        cap_slope = 1.0
    if slope is not None:
        s2 += alibi_bias(slope, rows, cols, seqlen_q, seqlen_k)
    return tl.math.exp2(s2 - lse_log2), cap_slope


@triton.jit
def _dkdv_blocks(dk, dv, k, v, q_desc, dout_desc, q_base, dout_base, lse, delta, stats, sequence, start_q, head,
                 stride_qm, stride_dm, count, lo, full_lo, full_hi, col, seqlen_q, seqlen_k, left, right, scale_log2,
                 cap_scale, cap_log2, slope, seed, dropped_below, keep_scale, document,
                 BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
                 UNIT: tl.constexpr, MASKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
                 VARLEN: tl.constexpr, TMA: tl.constexpr):
    """Add what `count` query blocks, the masked or the full ones, contribute to dk and dv [BLOCK_N, BLOCK_D] of the keys
    col, col + 1, ..."""
    cols = col + tl.arange(0, BLOCK_N)
    for i in tl.range(0, count):
        row = block_number(i, lo, full_lo, full_hi, MASKED) * BLOCK_M
        rows = row + tl.arange(0, BLOCK_M)
        q = stream_tile(q_desc, q_base, sequence, start_q, head, row, stride_qm, seqlen_q,
                        BLOCK_M, HEAD_DIM, BLOCK_D, UNIT, MASKED, VARLEN, TMA)
        lse_row = tl.load(lse + stats + rows, mask=rows < seqlen_q if MASKED else None)
        delta_row = tl.load(delta + stats + rows, mask=rows < seqlen_q if MASKED else None)
        s_t = dot(k, tl.trans(q))  # [BLOCK_N, BLOCK_M]
        p_t, cap_slope = _probabilities(s_t, rows[None, :], cols[:, None], (lse_row * LOG2E)[None, :], seqlen_q, seqlen_k,
                                        scale_log2, cap_scale, cap_log2, slope)
        if MASKED:
            seen = visible(rows[None, :], cols[:, None], seqlen_q, seqlen_k, left, right, HAS_LEFT, HAS_RIGHT)
            p_t = tl.where(seen, p_t, 0.0)
        do = stream_tile(dout_desc, dout_base, sequence, start_q, head, row, stride_dm, seqlen_q,
                         BLOCK_M, HEAD_DIM, BLOCK_D, UNIT, MASKED, VARLEN, TMA)
        if seed is not None:
            keep = kept(seed, dropped_below, document, head, rows[None, :], cols[:, None])
            dv += dot(tl.where(keep, p_t, 0.0).to(do.dtype), do)
        else:
            dv += dot(p_t.to(do.dtype), do)
        dp_t = dot(v, tl.trans(do))
        if seed is not None:
            dp_t = tl.where(keep, dp_t * keep_scale, 0.0)
        ds_t = p_t * (dp_t - delta_row[None, :])
        if cap_scale is not None:
            ds_t *= cap_slope
        dk += dot(ds_t.to(q.dtype), q)
    return dk, dv


@triton.jit(do_not_specialize=["batch", "total_q", "total_k", "seqlen_q", "seqlen_k", "num_tiles", "left", "right",
                              "dropped_below"])
def dkdv_kernel(q, k, v, dout, q_desc, dout_desc, dk, dv, lse, delta, cu_seqlens_q, cu_seqlens_k,
                stride_qb, stride_qm, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
                stride_db, stride_dm, stride_dh, stride_dkb, stride_dkn, stride_dkh, stride_dvb, stride_dvn, stride_dvh,
                batch, total_q, total_k, seqlen_q, seqlen_k, num_tiles, num_kv_heads, left, right, scale_log2, scale,
                cap_scale, cap_log2, alibi_slopes, stride_slopes, dropout_seed, dropped_below, keep_scale,
                GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
                VARLEN: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr):
    """grid: (tiles of one kv head * kv heads,)"""
    tiles_of_head = tl.num_programs(0) // num_kv_heads
    kv_head = tl.program_id(0) // tiles_of_head
    sequence, start_k, start_q, seqlen_k, seqlen_q, col = locate(
        tl.program_id(0) % tiles_of_head, cu_seqlens_k, cu_seqlens_q, batch, total_k, seqlen_k, seqlen_q, num_tiles,
        BLOCK_N, VARLEN, False)
    if col >= seqlen_k:
        return
    document = sequence
    seed = None
    if dropout_seed is not None:
        seed = tl.load(dropout_seed)
    if VARLEN:
        sequence = 0
    k_base = head_base(k, sequence, start_k, kv_head, stride_kb, stride_kn, stride_kh, UNIT)
    v_base = head_base(v, sequence, start_k, kv_head, stride_vb, stride_vn, stride_vh, UNIT)
    k_tile = load_tile(k_base, col, stride_kn, seqlen_k, BLOCK_N, HEAD_DIM, BLOCK_D, UNIT, True)
    v_tile = load_tile(v_base, col, stride_vn, seqlen_k, BLOCK_N, HEAD_DIM, BLOCK_D, UNIT, True)
    acc_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    acc_dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    # as block_range's rows here are keys, the band is read the other way round
    lo, full_lo, full_hi, hi = block_range(col, seqlen_k, seqlen_q, right, left, BLOCK_N, BLOCK_M, HAS_RIGHT, HAS_LEFT)

    for member in range(GROUP):
        head = kv_head * GROUP + member
        q_base = head_base(q, sequence, start_q, head, stride_qb, stride_qm, stride_qh, UNIT)
        dout_base = head_base(dout, sequence, start_q, head, stride_db, stride_dm, stride_dh, UNIT)
        if alibi_slopes is not None:
            slope = alibi_slope(alibi_slopes, stride_slopes, document, head, batch)
        else:
            slope = None
        if VARLEN:
            stats = head.to(tl.int64) * total_q + start_q
        else:
            stats = (sequence.to(tl.int64) * num_kv_heads * GROUP + head) * seqlen_q
        acc_dk, acc_dv = _dkdv_blocks(
            acc_dk, acc_dv, k_tile, v_tile, q_desc, dout_desc, q_base, dout_base, lse, delta, stats,
            sequence, start_q, head, stride_qm, stride_dm,
            num_masked(lo, full_lo, full_hi, hi), lo, full_lo, full_hi, col, seqlen_q, seqlen_k, left, right, scale_log2,
            cap_scale, cap_log2, slope, seed, dropped_below, keep_scale, document,
            BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D, UNIT, True, HAS_LEFT, HAS_RIGHT, VARLEN, TMA)
        acc_dk, acc_dv = _dkdv_blocks(
            acc_dk, acc_dv, k_tile, v_tile, q_desc, dout_desc, q_base, dout_base, lse, delta, stats,
            sequence, start_q, head, stride_qm, stride_dm,
            full_hi - full_lo, lo, full_lo, full_hi, col, seqlen_q, seqlen_k, left, right, scale_log2,
            cap_scale, cap_log2, slope, seed, dropped_below, keep_scale, document,
            BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D, UNIT, False, HAS_LEFT, HAS_RIGHT, VARLEN, TMA)

    if dropout_seed is not None:
        acc_dv *= keep_scale
    dk_base = head_base(dk, sequence, start_k, kv_head, stride_dkb, stride_dkn, stride_dkh, UNIT)
    dv_base = head_base(dv, sequence, start_k, kv_head, stride_dvb, stride_dvn, stride_dvh, UNIT)
    store_tile(dk_base, col, stride_dkn, seqlen_k, acc_dk * scale, BLOCK_N, HEAD_DIM, BLOCK_D, UNIT)
    store_tile(dv_base, col, stride_dvn, seqlen_k, acc_dv, BLOCK_N, HEAD_DIM, BLOCK_D, UNIT)


@triton.jit
def _dq_blocks(dq, q, do, lse, delta, k_desc, v_desc, k_base, v_base, sequence, start_k, kv_head, stride_kn, stride_vn,
               count, lo, full_lo, full_hi, row, seqlen_q, seqlen_k, left, right, scale_log2,
               cap_scale, cap_log2, slope, seed, dropped_below, keep_scale, document, head,
               BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
               UNIT: tl.constexpr, MASKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
               VARLEN: tl.constexpr, TMA: tl.constexpr):
    """Add what `count` key blocks, the masked or the full ones, contribute to dq [BLOCK_M, BLOCK_D] of the queries
    row, row + 1, ..."""
    rows = row + tl.arange(0, BLOCK_M)
    for i in tl.range(0, count):
        col = block_number(i, lo, full_lo, full_hi, MASKED) * BLOCK_N
        k = stream_tile(k_desc, k_base, sequence, start_k, kv_head, col, stride_kn, seqlen_k,
                        BLOCK_N, HEAD_DIM, BLOCK_D, UNIT, MASKED, VARLEN, TMA)
        v = stream_tile(v_desc, v_base, sequence, start_k, kv_head, col, stride_vn, seqlen_k,
                        BLOCK_N, HEAD_DIM, BLOCK_D, UNIT, MASKED, VARLEN, TMA)
        s = dot(q, tl.trans(k))  # [BLOCK_M, BLOCK_N]
        p, cap_slope = _probabilities(s, rows[:, None], (col + tl.arange(0, BLOCK_N))[None, :], (lse * LOG2E)[:, None],
                                      seqlen_q, seqlen_k, scale_log2, cap_scale, cap_log2, slope)
        cols = col + tl.arange(0, BLOCK_N)
        if MASKED:
            seen = visible(rows[:, None], cols[None, :], seqlen_q, seqlen_k, left, right, HAS_LEFT, HAS_RIGHT)
            p = tl.where(seen, p, 0.0)
        dp = dot(do, tl.trans(v))
        if seed is not None:
            dp = tl.where(kept(seed, dropped_below, document, head, rows[:, None], cols[None, :]), dp * keep_scale, 0.0)
        ds = p * (dp - delta[:, None])
        if cap_scale is not None:
            ds *= cap_slope
        dq += dot(ds.to(k.dtype), k)
    return dq


@triton.jit(do_not_specialize=["batch", "total_q", "seqlen_q", "seqlen_k", "num_tiles", "left", "right",
                              "dropped_below"])
def dq_kernel(q, k, v, dout, k_desc, v_desc, dq, lse, delta, cu_seqlens_q, cu_seqlens_k,
              stride_qb, stride_qm, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
              stride_db, stride_dm, stride_dh, stride_dqb, stride_dqm, stride_dqh,
              batch, total_q, seqlen_q, seqlen_k, num_tiles, num_heads, left, right, scale_log2, scale,
              cap_scale, cap_log2, alibi_slopes, stride_slopes, dropout_seed, dropped_below, keep_scale,
              GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
              VARLEN: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
              BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr):
    """grid: (tiles of one head * heads,)"""
    tiles_of_head = tl.num_programs(0) // num_heads
    head = tl.program_id(0) // tiles_of_head
    kv_head = head // GROUP
    sequence, start_q, start_k, seqlen_q, seqlen_k, row = locate(
        tl.program_id(0) % tiles_of_head, cu_seqlens_q, cu_seqlens_k, batch, total_q, seqlen_q, seqlen_k, num_tiles,
        BLOCK_M, VARLEN, HAS_RIGHT)
    if row >= seqlen_q:
        return
    document = sequence
    slope, seed = None, None
    if alibi_slopes is not None:
        slope = alibi_slope(alibi_slopes, stride_slopes, document, head, batch)
    if dropout_seed is not None:
        seed = tl.load(dropout_seed)
    stats = (sequence.to(tl.int64) * num_heads + head) * seqlen_q
    if VARLEN:
        stats = head.to(tl.int64) * total_q + start_q
        sequence = 0
    q_base = head_base(q, sequence, start_q, head, stride_qb, stride_qm, stride_qh, UNIT)
    k_base = head_base(k, sequence, start_k, kv_head, stride_kb, stride_kn, stride_kh, UNIT)
    v_base = head_base(v, sequence, start_k, kv_head, stride_vb, stride_vn, stride_vh, UNIT)
    dout_base = head_base(dout, sequence, start_q, head, stride_db, stride_dm, stride_dh, UNIT)
    dq_base = head_base(dq, sequence, start_q, head, stride_dqb, stride_dqm, stride_dqh, UNIT)

    rows = row + tl.arange(0, BLOCK_M)
    q_tile = load_tile(q_base, row, stride_qm, seqlen_q, BLOCK_M, HEAD_DIM, BLOCK_D, UNIT, True)
    do_tile = load_tile(dout_base, row, stride_dm, seqlen_q, BLOCK_M, HEAD_DIM, BLOCK_D, UNIT, True)
    lse_row = tl.load(lse + stats + rows, mask=rows < seqlen_q, other=0.0)
    delta_row = tl.load(delta + stats + rows, mask=rows < seqlen_q, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    lo, full_lo, full_hi, hi = block_range(row, seqlen_q, seqlen_k, left, right, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT)
    acc = _dq_blocks(acc, q_tile, do_tile, lse_row, delta_row, k_desc, v_desc, k_base, v_base, sequence, start_k, kv_head,
                     stride_kn, stride_vn,
                     num_masked(lo, full_lo, full_hi, hi), lo, full_lo, full_hi, row, seqlen_q, seqlen_k, left, right,
                     scale_log2, cap_scale, cap_log2, slope, seed, dropped_below, keep_scale, document, head,
                     BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D, UNIT, True, HAS_LEFT, HAS_RIGHT, VARLEN, TMA)
    acc = _dq_blocks(acc, q_tile, do_tile, lse_row, delta_row, k_desc, v_desc, k_base, v_base, sequence, start_k, kv_head,
                     stride_kn, stride_vn,
                     full_hi - full_lo, lo, full_lo, full_hi, row, seqlen_q, seqlen_k, left, right,
                     scale_log2, cap_scale, cap_log2, slope, seed, dropped_below, keep_scale, document, head,
                     BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D, UNIT, False, HAS_LEFT, HAS_RIGHT, VARLEN, TMA)
    store_tile(dq_base, row, stride_dqm, seqlen_q, acc * scale, BLOCK_M, HEAD_DIM, BLOCK_D, UNIT)


def backward(dout, q, k, v, out, lse, *, spec: AttentionSpec, cu_seqlens_q=None, cu_seqlens_k=None, dlse=None, **extras):
    """(dq, dk, dv), contiguous, of `forward` for dout like out and, optionally, dlse like lse; dsinks behind them if the
    spec has sinks."""
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    delta = _delta(dout, out, lse, dlse, spec)
    scales = spec.softmax_scale * LOG2E.value, spec.softmax_scale

    def run_dkdv(config):
        call = Call(spec, cu_seqlens_q, q, k, v, dout, dk, dv)
        tma = config.tma and call.can_describe(q, dout)
        q_desc, dout_desc = (call.describe(x, config.rows) if tma else None for x in (q, dout))
        dkdv_kernel[call.grid(k, config.cols)](
            q, k, v, dout, q_desc, dout_desc, dk, dv, lse, delta, cu_seqlens_q, cu_seqlens_k, *call.strides, call.batch,
            q.shape[0], k.shape[0], call.seqlen_q, call.seqlen_k, call.tiles(k, config.cols), spec.num_kv_heads,
            call.left, call.right, *scales, *call.cap, *call.alibi(extras), *call.dropout(extras),
            **call.constants, BLOCK_M=config.rows, BLOCK_N=config.cols, TMA=tma, **config.options)

    def run_dq(config):
        call = Call(spec, cu_seqlens_q, q, k, v, dout, dq)
        tma = config.tma and call.can_describe(k, v)
        k_desc, v_desc = (call.describe(x, config.cols) if tma else None for x in (k, v))
        dq_kernel[call.grid(q, config.rows)](
            q, k, v, dout, k_desc, v_desc, dq, lse, delta, cu_seqlens_q, cu_seqlens_k, *call.strides, call.batch,
            q.shape[0], call.seqlen_q, call.seqlen_k, call.tiles(q, config.rows), spec.num_heads, call.left, call.right,
            *scales, *call.cap, *call.alibi(extras), *call.dropout(extras),
            **call.constants, BLOCK_M=config.rows, BLOCK_N=config.cols, TMA=tma, **config.options)

    if k.numel():
        run_tuned("dkdv", spec, q.device, run_dkdv)
    if q.numel():
        run_tuned("dq", spec, q.device, run_dq)
    return (dq, dk, dv, _dsinks(extras["sinks"], lse, delta)) if spec.sinks else (dq, dk, dv)


def _dsinks(sinks, lse, delta):
    """A sink is a score without a value: its ds is -exp(sink - lse) delta, summed over all queries."""
    ds = torch.exp(sinks[:, None] - lse) * delta
    ds = ds.masked_fill(lse == -torch.inf, 0)  # of rows behind the last sequence, whose delta may be anything
    return -(ds.sum((0, 2)) if lse.ndim == 3 else ds.sum(1))


def _delta(dout, out, lse, dlse, spec):
    """fp32, like lse. A varlen call is one long sequence here: rows do not meet."""
    delta = torch.empty_like(lse)
    if spec.varlen:
        dout, out = dout[None], out[None]
    strides = [*out.stride()[:3], *dout.stride()[:3]]
    unit = stride_unit(strides)
    batch, seqlen, num_heads, _ = out.shape

    def run(config):
        delta_kernel[(triton.cdiv(seqlen, config.rows) * num_heads * batch,)](
            out, dout, None if dlse is None else dlse.contiguous(), delta, *(s // unit for s in strides), seqlen, num_heads,
            HEAD_DIM=spec.head_dim, BLOCK_D=block_d(spec.head_dim), UNIT=unit, HAS_DLSE=dlse is not None,
            BLOCK_M=config.rows, **config.options)

    if delta.numel():
        run_tuned("delta", spec, out.device, run)
    return delta
