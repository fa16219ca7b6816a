"""The gradient of tile attention as fused Triton kernels. Import this module only to run it.

Attention weights are recomputed from the log-sum-exp of the queries, as in flash attention. Two
kernels walk the kept tiles, so FLOPs are those of the kept tiles and memory is linear: one owns
tiles of queries and sums over their key ranges, the other owns tiles of keys and sums over the
query ranges that see them, and over the query heads that share its key head. Every row is written
by one program, without atomics: the same input gives the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from evdit_opt.kernels.geometry import Geometry
from evdit_opt.kernels.triton_configs import LaunchConfig
from evdit_opt.kernels.triton_launch import (
    addressable,
    bias_arguments,
    check_supported,
    config_for,
    launch_options,
    load_part,
    locate,
    on_device_of,
    store_part,
    strides,
    writable,
)
from evdit_opt.kernels.triton_tables import make_tables

__all__ = ["backward"]

DELTA_ROWS = 32


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    intervals: tuple[int, ...],
    log_weights: tuple[float, ...],
    geometry: Geometry,
    scale: float,
    grad_q_config: LaunchConfig | None = None,
    grad_kv_config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v.

    Args and returns as in :func:`evdit_opt.kernels.decomposed_backward.backward`, but float32,
    float16 and bfloat16 only.

    Args:
        grad_q_config: other block sizes than the default of the device for the gradient of q.
        grad_kv_config: the same for the gradients of k and v.

    Raises:
        UnsupportedInputError: see :func:`evdit_opt.kernels.triton_launch.check_supported`.
    """
    check_supported(q)
    grad_q_config = grad_q_config or config_for("grad_q", q)
    grad_kv_config = grad_kv_config or config_for("grad_kv", q)
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    grad_q, grad_k, grad_v = (writable(x) for x in grads)
    grad_out, q, k, v, out = (addressable(x) for x in (grad_out, q, k, v, out))
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    bias, *bias_strides = bias_arguments(attn_mask, q)
    batch, heads, seq, head_dim = q.shape
    key_heads = k.shape[1]
    shapes = batch, heads, seq, heads // key_heads, scale
    by_query = make_tables(intervals, log_weights, geometry, grad_q_config.block_m, q.device)
    by_key = make_tables(
        intervals, log_weights, geometry, grad_kv_config.block_n, q.device, transposed=True
    )
    with on_device_of(q):
        delta_kernel[(triton.cdiv(seq, DELTA_ROWS), heads, batch)](
            grad_out, out, delta, *strides(grad_out, out), heads, seq,
            HEAD_DIM=head_dim, COLUMNS=max(16, triton.next_power_of_2(head_dim)), ROWS=DELTA_ROWS,
        )  # fmt: skip
        grad_q_kernel[(by_query.tiles.shape[0] * heads * batch,)](
            q, k, v, grad_out, lse, delta, bias, grad_q,
            by_query.tiles, by_query.ranges, by_query.weights,
            *strides(q, k, v, grad_out), *bias_strides, *strides(grad_q), *shapes,
            **launch_options(grad_q_config, head_dim, by_query, bias),
        )  # fmt: skip
        grad_kv_kernel[(by_key.tiles.shape[0] * key_heads * batch,)](
            q, k, v, grad_out, lse, delta, bias, grad_k, grad_v,
            by_key.tiles, by_key.ranges, by_key.weights,
            *strides(q, k, v, grad_out), *bias_strides, *strides(grad_k, grad_v), *shapes,
            **launch_options(grad_kv_config, head_dim, by_key, bias),
        )  # fmt: skip
    for grad, written in zip(grads, (grad_q, grad_k, grad_v), strict=True):
        if written is not grad:
            grad.copy_(written)
    return grads


@triton.jit
def delta_kernel(
    grad_out_ptr, out_ptr, delta_ptr, stride_gb, stride_gh, stride_gs, stride_ob, stride_oh,
    stride_os, heads, seq, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sum of grad_out * out over head_dim, a number per query. Grid (rows, heads, batch)."""
    start = tl.program_id(0).to(tl.int64) * ROWS
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    limit = seq - start
    grad_base = grad_out_ptr + batch * stride_gb + head * stride_gh + start * stride_gs
    out_base = out_ptr + batch * stride_ob + head * stride_oh + start * stride_os
    grad = load_part(grad_base, stride_gs, rows, columns, limit, HEAD_DIM, True, True)
    out = load_part(out_base, stride_os, rows, columns, limit, HEAD_DIM, True, True)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + (batch * heads + head) * seq + start + rows, delta, mask=rows < limit)


@triton.jit
def _in_base_2(lse, HAS_BIAS):
    """A log-sum-exp in base 2; +inf, so that exp2(logit - lse) is 0, for queries without a key."""
    lse *= 1.4426950408889634
    if HAS_BIAS:
        lse = tl.where(lse == float("-inf"), float("inf"), lse)
    return lse


@triton.jit
def _query_gradient(
    acc_0, acc_1, q_0, q_1, grad_0, grad_1, lse, delta, k_base, v_base, bias_base,
    stride_ks, stride_vs, start, count, weight, scale_log2,
    HEAD_DIM: tl.constexpr, PART_0: tl.constexpr, PART_1: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds what keys start .. start + count (BLOCK_N unless MASKED) contribute to grad q."""
    offsets = tl.arange(0, BLOCK_N)
    columns_0 = tl.arange(0, PART_0)
    mask_0: tl.constexpr = PART_0 > HEAD_DIM
    mask_1: tl.constexpr = PART_0 + PART_1 > HEAD_DIM
    k_start = k_base + start.to(tl.int64) * stride_ks
    v_start = v_base + start.to(tl.int64) * stride_vs
    k_0 = load_part(k_start, stride_ks, offsets, columns_0, count, HEAD_DIM, MASKED, mask_0)
    v_0 = load_part(v_start, stride_vs, offsets, columns_0, count, HEAD_DIM, MASKED, mask_0)
    logits = tl.dot(q_0, tl.trans(k_0), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
    if PART_1 > 0:
        columns_1 = PART_0 + tl.arange(0, PART_1)
        k_1 = load_part(k_start, stride_ks, offsets, columns_1, count, HEAD_DIM, MASKED, mask_1)
        v_1 = load_part(v_start, stride_vs, offsets, columns_1, count, HEAD_DIM, MASKED, mask_1)
        logits = tl.dot(q_1, tl.trans(k_1), logits, input_precision="ieee")
    if HAS_BIAS:
        if MASKED:
            bias = tl.load(bias_base + start + offsets, mask=offsets < count, other=0.0)
        else:
            bias = tl.load(bias_base + start + offsets)
        added = bias * 1.4426950408889634 + weight
        logits = logits * scale_log2 + added[None, :] - lse[:, None]
    else:
        logits = logits * scale_log2 - (lse - weight)[:, None]
    if MASKED:
        logits = tl.where(offsets[None, :] < count, logits, float("-inf"))
    weights = tl.exp2(logits)
    grad_weights = tl.dot(grad_0, tl.trans(v_0), input_precision="ieee")
    if PART_1 > 0:
        grad_weights = tl.dot(grad_1, tl.trans(v_1), grad_weights, input_precision="ieee")
    grad_logits = (weights * (grad_weights - delta[:, None])).to(k_0.dtype)
    acc_0 = tl.dot(grad_logits, k_0, acc_0, input_precision="ieee")
    if PART_1 > 0:
        acc_1 = tl.dot(grad_logits, k_1, acc_1, input_precision="ieee")
    return acc_0, acc_1


@triton.jit
def grad_q_kernel(
    q_ptr, k_ptr, v_ptr, grad_out_ptr, lse_ptr, delta_ptr, bias_ptr, grad_q_ptr,
    tiles_ptr, ranges_ptr, weights_ptr,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs, stride_gb, stride_gh, stride_gs,
    stride_bias_b, stride_bias_h, stride_dqb, stride_dqh, stride_dqs,
    batches, heads, seq, heads_per_key_head, scale,
    HEAD_DIM: tl.constexpr, PART_0: tl.constexpr, PART_1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Grid (tiles * heads * batch,), a tile of queries each."""
    batch, head, query_start, row_limit, first_range, last_range = locate(tiles_ptr, batches, heads)
    key_head = head // heads_per_key_head
    rows = tl.arange(0, BLOCK_M)
    columns_0 = tl.arange(0, PART_0)
    mask_0: tl.constexpr = PART_0 > HEAD_DIM
    mask_1: tl.constexpr = PART_0 + PART_1 > HEAD_DIM
    q_base = q_ptr + batch * stride_qb + head * stride_qh + query_start.to(tl.int64) * stride_qs
    g_base = (
        grad_out_ptr + batch * stride_gb + head * stride_gh + query_start.to(tl.int64) * stride_gs
    )
    q_0 = load_part(q_base, stride_qs, rows, columns_0, row_limit, HEAD_DIM, True, mask_0)
    grad_0 = load_part(g_base, stride_gs, rows, columns_0, row_limit, HEAD_DIM, True, mask_0)
    acc_0 = tl.zeros([BLOCK_M, PART_0], dtype=tl.float32)
    if PART_1 > 0:
        columns_1 = PART_0 + tl.arange(0, PART_1)
        q_1 = load_part(q_base, stride_qs, rows, columns_1, row_limit, HEAD_DIM, True, mask_1)
        grad_1 = load_part(g_base, stride_gs, rows, columns_1, row_limit, HEAD_DIM, True, mask_1)
        acc_1 = tl.zeros([BLOCK_M, PART_1], dtype=tl.float32)
    else:
        q_1 = q_0
        grad_1 = grad_0
        acc_1 = acc_0
    position = (batch * heads + head) * seq + query_start
    # Rows past the end get +inf, so their weights are 0.
    lse = tl.load(lse_ptr + position + rows, mask=rows < row_limit, other=float("inf"))
    lse = _in_base_2(lse, HAS_BIAS)
    delta = tl.load(delta_ptr + position + rows, mask=rows < row_limit, other=0.0)

    base = (
        grad_q_ptr + batch * stride_dqb + head * stride_dqh
        + query_start.to(tl.int64) * stride_dqs
    )  # fmt: skip
    k_base = k_ptr + batch * stride_kb + key_head * stride_kh
    v_base = v_ptr + batch * stride_vb + key_head * stride_vh
    bias_base = bias_ptr
    if HAS_BIAS:
        bias_base = bias_ptr + batch * stride_bias_b + head * stride_bias_h
    scale_log2 = scale * 1.4426950408889634
    for index in range(first_range, last_range):
        start = tl.load(ranges_ptr + 2 * index)
        stop = tl.load(ranges_ptr + 2 * index + 1)
        weight = 0.0
        if HAS_WEIGHTS:
            weight = tl.load(weights_ptr + index) * 1.4426950408889634
        blocks = (stop - start) // BLOCK_N
        for block in range(0, blocks):
            key = start + block * BLOCK_N
            acc_0, acc_1 = _query_gradient(
                acc_0, acc_1, q_0, q_1, grad_0, grad_1, lse, delta, k_base, v_base, bias_base,
                stride_ks, stride_vs, key, BLOCK_N, weight, scale_log2,
                HEAD_DIM, PART_0, PART_1, BLOCK_N, HAS_BIAS, False,
            )  # fmt: skip
        whole = start + blocks * BLOCK_N
        if whole < stop:
            acc_0, acc_1 = _query_gradient(
                acc_0, acc_1, q_0, q_1, grad_0, grad_1, lse, delta, k_base, v_base, bias_base,
                stride_ks, stride_vs, whole, stop - whole, weight, scale_log2,
                HEAD_DIM, PART_0, PART_1, BLOCK_N, HAS_BIAS, True,
            )  # fmt: skip
    store_part(base, stride_dqs, rows, columns_0, row_limit, acc_0 * scale, HEAD_DIM)
    if PART_1 > 0:
        columns_1 = PART_0 + tl.arange(0, PART_1)
        store_part(base, stride_dqs, rows, columns_1, row_limit, acc_1 * scale, HEAD_DIM)


@triton.jit
def _key_gradient(
    dk_0, dk_1, dv_0, dv_1, k_0, k_1, v_0, v_1, bias, q_base, g_base, lse_base, delta_base,
    stride_qs, stride_gs, start, count, weight, scale_log2,
    HEAD_DIM: tl.constexpr, PART_0: tl.constexpr, PART_1: tl.constexpr, BLOCK_M: tl.constexpr,
    HAS_BIAS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds what queries start .. start + count (BLOCK_M unless MASKED) contribute to grad k, v."""
    offsets = tl.arange(0, BLOCK_M)
    columns_0 = tl.arange(0, PART_0)
    mask_0: tl.constexpr = PART_0 > HEAD_DIM
    mask_1: tl.constexpr = PART_0 + PART_1 > HEAD_DIM
    q_start = q_base + start.to(tl.int64) * stride_qs
    g_start = g_base + start.to(tl.int64) * stride_gs
    q_0 = load_part(q_start, stride_qs, offsets, columns_0, count, HEAD_DIM, MASKED, mask_0)
    grad_0 = load_part(g_start, stride_gs, offsets, columns_0, count, HEAD_DIM, MASKED, mask_0)
    # Transposed: the weights then are the left factor of both products.
    logits = tl.dot(k_0, tl.trans(q_0), input_precision="ieee")  # [BLOCK_N, BLOCK_M]
    if PART_1 > 0:
        columns_1 = PART_0 + tl.arange(0, PART_1)
        q_1 = load_part(q_start, stride_qs, offsets, columns_1, count, HEAD_DIM, MASKED, mask_1)
        grad_1 = load_part(g_start, stride_gs, offsets, columns_1, count, HEAD_DIM, MASKED, mask_1)
        logits = tl.dot(k_1, tl.trans(q_1), logits, input_precision="ieee")
    if MASKED:
        # Queries past the end get +inf, so their weights are 0.
        lse = tl.load(lse_base + start + offsets, mask=offsets < count, other=float("inf"))
        delta = tl.load(delta_base + start + offsets, mask=offsets < count, other=0.0)
    else:
        lse = tl.load(lse_base + start + offsets)
        delta = tl.load(delta_base + start + offsets)
    logits = logits * scale_log2 - (_in_base_2(lse, HAS_BIAS) - weight)[None, :]
    if HAS_BIAS:
        logits += bias[:, None]
    weights = tl.exp2(logits)
    low = weights.to(q_0.dtype)
    dv_0 = tl.dot(low, grad_0, dv_0, input_precision="ieee")
    grad_weights = tl.dot(v_0, tl.trans(grad_0), input_precision="ieee")
    if PART_1 > 0:
        dv_1 = tl.dot(low, grad_1, dv_1, input_precision="ieee")
        grad_weights = tl.dot(v_1, tl.trans(grad_1), grad_weights, input_precision="ieee")
    grad_logits = (weights * (grad_weights - delta[None, :])).to(q_0.dtype)
    dk_0 = tl.dot(grad_logits, q_0, dk_0, input_precision="ieee")
    if PART_1 > 0:
        dk_1 = tl.dot(grad_logits, q_1, dk_1, input_precision="ieee")
    return dk_0, dk_1, dv_0, dv_1


@triton.jit
def grad_kv_kernel(
    q_ptr, k_ptr, v_ptr, grad_out_ptr, lse_ptr, delta_ptr, bias_ptr, grad_k_ptr, grad_v_ptr,
    tiles_ptr, ranges_ptr, weights_ptr,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs, stride_gb, stride_gh, stride_gs,
    stride_bias_b, stride_bias_h,
    stride_dkb, stride_dkh, stride_dks, stride_dvb, stride_dvh, stride_dvs,
    batches, heads, seq, heads_per_key_head, scale,
    HEAD_DIM: tl.constexpr, PART_0: tl.constexpr, PART_1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Grid (tiles * key heads * batch,), a tile of keys each."""
    batch, key_head, key_start, row_limit, first_range, last_range = locate(
        tiles_ptr, batches, heads // heads_per_key_head
    )
    rows = tl.arange(0, BLOCK_N)
    columns_0 = tl.arange(0, PART_0)
    mask_0: tl.constexpr = PART_0 > HEAD_DIM
    mask_1: tl.constexpr = PART_0 + PART_1 > HEAD_DIM
    first_key = key_start.to(tl.int64)
    k_base = k_ptr + batch * stride_kb + key_head * stride_kh + first_key * stride_ks
    v_base = v_ptr + batch * stride_vb + key_head * stride_vh + first_key * stride_vs
    k_0 = load_part(k_base, stride_ks, rows, columns_0, row_limit, HEAD_DIM, True, mask_0)
    v_0 = load_part(v_base, stride_vs, rows, columns_0, row_limit, HEAD_DIM, True, mask_0)
    dk_0 = tl.zeros([BLOCK_N, PART_0], dtype=tl.float32)
    dv_0 = tl.zeros([BLOCK_N, PART_0], dtype=tl.float32)
    if PART_1 > 0:
        columns_1 = PART_0 + tl.arange(0, PART_1)
        k_1 = load_part(k_base, stride_ks, rows, columns_1, row_limit, HEAD_DIM, True, mask_1)
        v_1 = load_part(v_base, stride_vs, rows, columns_1, row_limit, HEAD_DIM, True, mask_1)
        dk_1 = tl.zeros([BLOCK_N, PART_1], dtype=tl.float32)
        dv_1 = tl.zeros([BLOCK_N, PART_1], dtype=tl.float32)
    else:
        k_1 = k_0
        v_1 = v_0
        dk_1 = dk_0
        dv_1 = dv_0
    scale_log2 = scale * 1.4426950408889634
    for member in range(0, heads_per_key_head):
        head = key_head * heads_per_key_head + member
        q_base = q_ptr + batch * stride_qb + head * stride_qh
        g_base = grad_out_ptr + batch * stride_gb + head * stride_gh
        position = (batch * heads + head) * seq
        bias = 0.0
        if HAS_BIAS:
            bias_base = bias_ptr + batch * stride_bias_b + head * stride_bias_h + key_start
            bias = tl.load(bias_base + rows, mask=rows < row_limit, other=0.0) * 1.4426950408889634
        for index in range(first_range, last_range):
            start = tl.load(ranges_ptr + 2 * index)
            stop = tl.load(ranges_ptr + 2 * index + 1)
            weight = 0.0
            if HAS_WEIGHTS:
                weight = tl.load(weights_ptr + index) * 1.4426950408889634
            blocks = (stop - start) // BLOCK_M
            for block in range(0, blocks):
                query = start + block * BLOCK_M
                dk_0, dk_1, dv_0, dv_1 = _key_gradient(
                    dk_0, dk_1, dv_0, dv_1, k_0, k_1, v_0, v_1, bias, q_base, g_base,
                    lse_ptr + position, delta_ptr + position,
                    stride_qs, stride_gs, query, BLOCK_M, weight, scale_log2,
                    HEAD_DIM, PART_0, PART_1, BLOCK_M, HAS_BIAS, False,
                )  # fmt: skip
            whole = start + blocks * BLOCK_M
            if whole < stop:
                dk_0, dk_1, dv_0, dv_1 = _key_gradient(
                    dk_0, dk_1, dv_0, dv_1, k_0, k_1, v_0, v_1, bias, q_base, g_base,
                    lse_ptr + position, delta_ptr + position,
                    stride_qs, stride_gs, whole, stop - whole, weight, scale_log2,
                    HEAD_DIM, PART_0, PART_1, BLOCK_M, HAS_BIAS, True,
                )  # fmt: skip
    dk_base = grad_k_ptr + batch * stride_dkb + key_head * stride_dkh + first_key * stride_dks
    dv_base = grad_v_ptr + batch * stride_dvb + key_head * stride_dvh + first_key * stride_dvs
    store_part(dk_base, stride_dks, rows, columns_0, row_limit, dk_0 * scale, HEAD_DIM)
    store_part(dv_base, stride_dvs, rows, columns_0, row_limit, dv_0, HEAD_DIM)
    if PART_1 > 0:
        columns_1 = PART_0 + tl.arange(0, PART_1)
        store_part(dk_base, stride_dks, rows, columns_1, row_limit, dk_1 * scale, HEAD_DIM)
        store_part(dv_base, stride_dvs, rows, columns_1, row_limit, dv_1, HEAD_DIM)
