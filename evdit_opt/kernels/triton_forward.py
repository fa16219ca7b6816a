"""Tile attention as one fused Triton kernel (forward). Import this module only to run it.

A program owns one tile of queries that all see the same keys, and walks the key ranges of that
tile. Only the last block of a range is masked, so there is no arithmetic per element to find out
what is kept. head_dim 96 is computed as 64 + 32, not padded to 128. Method: arXiv 2502.06155.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from evdit_opt.errors import UnsupportedInputError
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
    split_head_dim,
    store_part,
    strides,
    writable,
)
from evdit_opt.kernels.triton_tables import make_tables

__all__ = ["forward"]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    intervals: tuple[int, ...],
    log_weights: tuple[float, ...],
    geometry: Geometry,
    scale: float,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Tile attention by the fused kernel.

    Args and returns as in :func:`evdit_opt.kernels.decomposed.forward`, but float32, float16 and
    bfloat16 only.

    Args:
        config: other block sizes than the default of the device.

    Raises:
        UnsupportedInputError: see :func:`evdit_opt.kernels.triton_launch.check_supported`.
    """
    check_supported(q)
    config = config or config_for("forward", q)
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    target = writable(out)
    if scale <= 0.0:
        # The kernel takes the maximum before it scales, which needs a positive scale.
        q, scale = q * (-1.0 if scale else 0.0), -scale or 1.0
    q, k, v = (addressable(x) for x in (q, k, v))
    bias, *bias_strides = bias_arguments(attn_mask, q)
    batch, heads, seq, head_dim = q.shape
    tables = make_tables(intervals, log_weights, geometry, config.block_m, q.device)
    descriptors: tuple[Any, ...] = (None,) * 4
    if config.use_tma:
        k, v = _aligned(k), _aligned(v)
        descriptors = (*_descriptors(k, config.block_n), *_descriptors(v, config.block_n))
    with on_device_of(q):
        forward_kernel[(tables.tiles.shape[0] * heads * batch,)](
            q, k, v, target, lse, bias, tables.tiles, tables.ranges, tables.weights, *descriptors,
            *strides(q, k, v, target), *bias_strides,
            batch, heads, seq, heads // k.shape[1], scale,
            USE_TMA=config.use_tma, **launch_options(config, head_dim, tables, bias),
        )  # fmt: skip
    if target is not out:
        out.copy_(target)
    return out, lse


def _descriptors(x: Tensor, block_n: int) -> tuple[Any, ...]:
    """Descriptors of both parts of head_dim of ``x`` ``[batch, heads, seq, head_dim]``."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return tuple(
        TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, block_n, part])
        if part
        else None
        for part in split_head_dim(x.shape[-1])
    )


def _aligned(x: Tensor) -> Tensor:
    """``x`` with the alignment that a descriptor needs, copied if it must be.

    Raises:
        UnsupportedInputError: if rows of head_dim numbers can never be aligned.
    """
    size = x.element_size()
    if x.shape[-1] * size % 16:
        raise UnsupportedInputError(
            f"expected rows of a multiple of 16 bytes for use_tma=True, got head_dim {x.shape[-1]} "
            f"of {x.dtype}; use a configuration without it"
        )
    if x.data_ptr() % 16 == 0 and all(n > 0 and n * size % 16 == 0 for n in x.stride()[:3]):
        return x
    return x.clone(memory_format=torch.contiguous_format)


@triton.jit
def _load_block(
    descriptor, base, stride, batch, head, start, count, offsets, first_column,
    HEAD_DIM: tl.constexpr, PART: tl.constexpr, PADDED: tl.constexpr, BLOCK_N: tl.constexpr,
    USE_TMA: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """PART columns of keys or values start .. start + count. # [BLOCK_N, PART]"""
    if USE_TMA and not MASKED:
        block = descriptor.load([batch.to(tl.int32), head.to(tl.int32), start, first_column])
        return block.reshape(BLOCK_N, PART)
    else:
        columns = first_column + tl.arange(0, PART)
        base += start.to(tl.int64) * stride
        return load_part(base, stride, offsets, columns, count, HEAD_DIM, MASKED, PADDED)


@triton.jit
def _attend_block(
    acc_0, acc_1, row_max, row_sum, q_0, q_1, k_base, v_base, k_tma_0, k_tma_1, v_tma_0, v_tma_1,
    bias_base, stride_ks, stride_vs, batch, key_head, start, count, weight, scale_log2,
    HEAD_DIM: tl.constexpr, PART_0: tl.constexpr, PART_1: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr, USE_TMA: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over keys start .. start + count (BLOCK_N unless MASKED)."""
    offsets = tl.arange(0, BLOCK_N)
    padded_0: tl.constexpr = PART_0 > HEAD_DIM
    padded_1: tl.constexpr = PART_0 + PART_1 > HEAD_DIM
    k_0 = _load_block(
        k_tma_0, k_base, stride_ks, batch, key_head, start, count, offsets, 0,
        HEAD_DIM, PART_0, padded_0, BLOCK_N, USE_TMA, MASKED,
    )  # fmt: skip
    logits = tl.dot(q_0, tl.trans(k_0), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
    if PART_1 > 0:
        k_1 = _load_block(
            k_tma_1, k_base, stride_ks, batch, key_head, start, count, offsets, PART_0,
            HEAD_DIM, PART_1, padded_1, BLOCK_N, USE_TMA, MASKED,
        )  # fmt: skip
        logits = tl.dot(q_1, tl.trans(k_1), logits, input_precision="ieee")
    if MASKED:
        logits = tl.where(offsets[None, :] < count, logits, float("-inf"))

    # In base 2, and scaled by the multiply-add that subtracts the maximum.
    if HAS_BIAS:
        if MASKED:
            bias = tl.load(bias_base + start + offsets, mask=offsets < count, other=0.0)
        else:
            bias = tl.load(bias_base + start + offsets)
        logits = logits * scale_log2 + (bias * 1.4426950408889634 + weight)[None, :]
        new_max = tl.maximum(row_max, tl.max(logits, 1))
        # No key seen yet: avoid -inf - -inf.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(logits - shift[:, None])
    else:
        new_max = tl.maximum(row_max, tl.max(logits, 1) * scale_log2 + weight)
        shift = new_max
        weights = tl.exp2(logits * scale_log2 - (shift - weight)[:, None])
    rescale = tl.exp2(row_max - shift)
    row_sum = row_sum * rescale + tl.sum(weights, 1)
    v_0 = _load_block(
        v_tma_0, v_base, stride_vs, batch, key_head, start, count, offsets, 0,
        HEAD_DIM, PART_0, padded_0, BLOCK_N, USE_TMA, MASKED,
    )  # fmt: skip
    weights = weights.to(v_0.dtype)
    acc_0 = tl.dot(weights, v_0, acc_0 * rescale[:, None], input_precision="ieee")
    if PART_1 > 0:
        v_1 = _load_block(
            v_tma_1, v_base, stride_vs, batch, key_head, start, count, offsets, PART_0,
            HEAD_DIM, PART_1, padded_1, BLOCK_N, USE_TMA, MASKED,
        )  # fmt: skip
        acc_1 = tl.dot(weights, v_1, acc_1 * rescale[:, None], input_precision="ieee")
    return acc_0, acc_1, new_max, row_sum


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, bias_ptr, tiles_ptr, ranges_ptr, weights_ptr,
    k_tma_0, k_tma_1, v_tma_0, v_tma_1,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs, stride_ob, stride_oh, stride_os,
    stride_bias_b, stride_bias_h, batches, heads, seq, heads_per_key_head, scale,
    HEAD_DIM: tl.constexpr, PART_0: tl.constexpr, PART_1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_WEIGHTS: tl.constexpr, USE_TMA: tl.constexpr,
):  # fmt: skip
    """Grid (tiles * heads * batch,)."""
    batch, head, query_start, row_limit, first_range, last_range = locate(tiles_ptr, batches, heads)
    key_head = head // heads_per_key_head

    rows = tl.arange(0, BLOCK_M)
    columns_0 = tl.arange(0, PART_0)
    mask_0: tl.constexpr = PART_0 > HEAD_DIM
    mask_1: tl.constexpr = PART_0 + PART_1 > HEAD_DIM
    q_base = q_ptr + batch * stride_qb + head * stride_qh + query_start.to(tl.int64) * stride_qs
    q_0 = load_part(q_base, stride_qs, rows, columns_0, row_limit, HEAD_DIM, True, mask_0)
    acc_0 = tl.zeros([BLOCK_M, PART_0], dtype=tl.float32)
    if PART_1 > 0:
        columns_1 = PART_0 + tl.arange(0, PART_1)
        q_1 = load_part(q_base, stride_qs, rows, columns_1, row_limit, HEAD_DIM, True, mask_1)
        acc_1 = tl.zeros([BLOCK_M, PART_1], dtype=tl.float32)
    else:
        q_1 = q_0
        acc_1 = acc_0
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)

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
            acc_0, acc_1, row_max, row_sum = _attend_block(
                acc_0, acc_1, row_max, row_sum, q_0, q_1, k_base, v_base,
                k_tma_0, k_tma_1, v_tma_0, v_tma_1, bias_base, stride_ks, stride_vs,
                batch, key_head, key, BLOCK_N, weight, scale_log2,
                HEAD_DIM, PART_0, PART_1, BLOCK_N, HAS_BIAS, USE_TMA, False,
            )  # fmt: skip
        whole = start + blocks * BLOCK_N
        if whole < stop:
            acc_0, acc_1, row_max, row_sum = _attend_block(
                acc_0, acc_1, row_max, row_sum, q_0, q_1, k_base, v_base,
                k_tma_0, k_tma_1, v_tma_0, v_tma_1, bias_base, stride_ks, stride_vs,
                batch, key_head, whole, stop - whole, weight, scale_log2,
                HEAD_DIM, PART_0, PART_1, BLOCK_N, HAS_BIAS, USE_TMA, True,
            )  # fmt: skip

    lse = (row_max + tl.log2(row_sum)) * 0.6931471805599453
    if HAS_BIAS:
        empty = row_sum == 0.0
        lse = tl.where(empty, float("-inf"), lse)
        row_sum = tl.where(empty, 1.0, row_sum)
    lse_base = lse_ptr + (batch * heads + head) * seq + query_start
    tl.store(lse_base + rows, lse, mask=rows < row_limit)
    out_base = out_ptr + batch * stride_ob + head * stride_oh + query_start.to(tl.int64) * stride_os
    inverse = (1.0 / row_sum)[:, None]
    store_part(out_base, stride_os, rows, columns_0, row_limit, acc_0 * inverse, HEAD_DIM)
    if PART_1 > 0:
        columns_1 = PART_0 + tl.arange(0, PART_1)
        store_part(out_base, stride_os, rows, columns_1, row_limit, acc_1 * inverse, HEAD_DIM)
