"""Tile attention as one fused Triton kernel (forward). Import this module only to run it.

A program owns one tile of queries that all see the same keys, and walks the key ranges of that
tile. Only the last block of a range is masked, so there is no arithmetic per element to find out
what is kept. head_dim 96 is computed as 64 + 32, not padded to 128. Method: arXiv 2502.06155.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from evdit_opt.errors import UnsupportedInputError
from evdit_opt.kernels.dense import key_bias
from evdit_opt.kernels.geometry import Geometry
from evdit_opt.kernels.triton_tables import make_tables

__all__ = ["LaunchConfig", "default_config", "forward", "split_head_dim"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchConfig:
    """Block sizes and launch options of the kernel."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def default_config(capability: tuple[int, int], head_dim: int, dtype: torch.dtype) -> LaunchConfig:
    """The configuration for a compute capability, checked by compiling: it fits and hardly spills.

    Compiled, never timed: nothing here was chosen by speed on a GPU.
    """
    if dtype == torch.float32:
        block = 32 if head_dim <= 64 else 16
        return LaunchConfig(block_m=64, block_n=block, num_warps=8, num_stages=1)
    if head_dim > 128:
        return LaunchConfig(block_m=64, block_n=32, num_warps=8, num_stages=2)
    stages = 3 if head_dim > 64 and capability in ((9, 0), (10, 0), (10, 3)) else 2
    return LaunchConfig(block_m=128, block_n=64, num_warps=8, num_stages=stages)


# The interpreter's time goes with the number of tiles, not with their size.
INTERPRETER_CONFIG = LaunchConfig(block_m=64, block_n=64, num_warps=4, num_stages=1)


def split_head_dim(head_dim: int) -> tuple[int, int]:
    """head_dim as a power of two plus a smaller one (or 0), each at least 16: the least padding."""
    first = max(16, 1 << (head_dim.bit_length() - 1))
    rest = head_dim - first
    if rest <= 0:
        return first, 0
    second = max(16, triton.next_power_of_2(rest))
    return (first, second) if second < first else (2 * first, 0)


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
    bfloat16 only (bfloat16 not in Triton's interpreter, whose dot is wrong for it).

    Raises:
        UnsupportedInputError: if the tensors are not on a CUDA device (CPU tensors only where
            Triton was imported with its interpreter on), or of another dtype.
    """
    config = config or _config_for(q)
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    bias = key_bias(attn_mask, q)
    bias_strides = [0, 0]
    if bias is not None:
        bias = bias.contiguous()
        bias_strides = [bias.stride(n) if bias.shape[n] > 1 else 0 for n in (0, 1)]
    batch, heads, seq, head_dim = q.shape
    tables = make_tables(intervals, log_weights, geometry, config.block_m, q.device)
    target = out if out.stride(-1) == 1 else torch.empty_like(q)
    first, second = split_head_dim(head_dim)
    arguments = (
        q, k, v, target, lse, bias, tables.tiles, tables.ranges, tables.weights,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *target.stride()[:3], *bias_strides,
        heads, seq, heads // k.shape[1], scale,
    )  # fmt: skip
    with torch.cuda.device(q.device if q.device.type == "cuda" else -1):
        tile_attention_kernel[(tables.tiles.shape[0], heads, batch)](
            *arguments,
            HEAD_DIM=head_dim,
            PART_0=first,
            PART_1=second,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            HAS_BIAS=bias is not None,
            HAS_WEIGHTS=tables.is_weighted,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )
    if target is not out:
        out.copy_(target)
    return out, lse


def _config_for(q: Tensor) -> LaunchConfig:
    interpreted = not isinstance(tile_attention_kernel, triton.JITFunction)
    supported = (torch.float32, torch.float16) + (() if interpreted else (torch.bfloat16,))
    if q.device.type != "cuda" and not (interpreted and q.device.type == "cpu"):
        raise UnsupportedInputError(
            f"expected tensors on a CUDA device for impl='triton', got {q.device}; "
            "use impl='auto' or 'decomposed' there"
        )
    if q.dtype not in supported:
        raise UnsupportedInputError(
            f"expected one of {', '.join(map(str, supported))} for impl='triton', got {q.dtype}; "
            "cast q, k, v or use impl='decomposed'"
        )
    if interpreted:
        return INTERPRETER_CONFIG
    return default_config(torch.cuda.get_device_capability(q.device), q.shape[-1], q.dtype)


@triton.jit
def _load_part(base, stride, rows, columns, row_limit, HEAD_DIM, MASK_ROWS, MASK_COLUMNS):
    """Rows of a [rows, HEAD_DIM] matrix, zero outside of it. # [ROWS, COLUMNS]"""
    pointers = base + rows[:, None] * stride + columns[None, :]
    if MASK_ROWS and MASK_COLUMNS:
        inside = (rows[:, None] < row_limit) & (columns[None, :] < HEAD_DIM)
        return tl.load(pointers, mask=inside, other=0.0)
    if MASK_ROWS:
        return tl.load(pointers, mask=rows[:, None] < row_limit, other=0.0)
    if MASK_COLUMNS:
        return tl.load(pointers, mask=columns[None, :] < HEAD_DIM, other=0.0)
    return tl.load(pointers)


@triton.jit
def _attend_block(
    acc_0, acc_1, row_max, row_sum, q_0, q_1, k_base, v_base, bias_base, stride_ks, stride_vs,
    start, count, weight, scale_log2,
    HEAD_DIM: tl.constexpr, PART_0: tl.constexpr, PART_1: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_WEIGHTS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over keys start .. start + count (BLOCK_N unless MASKED)."""
    offsets = tl.arange(0, BLOCK_N)
    columns_0 = tl.arange(0, PART_0)
    mask_0: tl.constexpr = PART_0 > HEAD_DIM
    mask_1: tl.constexpr = PART_0 + PART_1 > HEAD_DIM
    k_start = k_base + start.to(tl.int64) * stride_ks
    v_start = v_base + start.to(tl.int64) * stride_vs
    k_0 = _load_part(k_start, stride_ks, offsets, columns_0, count, HEAD_DIM, MASKED, mask_0)
    logits = tl.dot(q_0, tl.trans(k_0), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
    if PART_1 > 0:
        columns_1 = PART_0 + tl.arange(0, PART_1)
        k_1 = _load_part(k_start, stride_ks, offsets, columns_1, count, HEAD_DIM, MASKED, mask_1)
        logits = tl.dot(q_1, tl.trans(k_1), logits, input_precision="ieee")
    logits = logits * scale_log2
    if HAS_WEIGHTS:
        logits += weight
    if HAS_BIAS:
        if MASKED:
            bias = tl.load(bias_base + start + offsets, mask=offsets < count, other=0.0)
        else:
            bias = tl.load(bias_base + start + offsets)
        logits += bias[None, :] * 1.4426950408889634
    if MASKED:
        logits = tl.where(offsets[None, :] < count, logits, float("-inf"))

    new_max = tl.maximum(row_max, tl.max(logits, 1))
    if HAS_BIAS:
        # No key seen yet: avoid -inf - -inf.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    else:
        shift = new_max
    weights = tl.exp2(logits - shift[:, None])
    rescale = tl.exp2(row_max - shift)
    row_sum = row_sum * rescale + tl.sum(weights, 1)
    v_0 = _load_part(v_start, stride_vs, offsets, columns_0, count, HEAD_DIM, MASKED, mask_0)
    weights = weights.to(v_0.dtype)
    acc_0 = tl.dot(weights, v_0, acc_0 * rescale[:, None], input_precision="ieee")
    if PART_1 > 0:
        columns_1 = PART_0 + tl.arange(0, PART_1)
        v_1 = _load_part(v_start, stride_vs, offsets, columns_1, count, HEAD_DIM, MASKED, mask_1)
        acc_1 = tl.dot(weights, v_1, acc_1 * rescale[:, None], input_precision="ieee")
    return acc_0, acc_1, new_max, row_sum


@triton.jit
def tile_attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, bias_ptr, tiles_ptr, ranges_ptr, weights_ptr,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs, stride_ob, stride_oh, stride_os,
    stride_bias_b, stride_bias_h, heads, seq, heads_per_key_head, scale,
    HEAD_DIM: tl.constexpr, PART_0: tl.constexpr, PART_1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, heads, batch). Rows of tiles_ptr: query start, stop, first and last range."""
    tile = tiles_ptr + 4 * tl.program_id(0)
    query_start = tl.load(tile)
    query_stop = tl.load(tile + 1)
    first_range = tl.load(tile + 2)
    last_range = tl.load(tile + 3)
    # 64 bits: batch, head and token offsets of a long video pass 2**31 elements.
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    key_head = head // heads_per_key_head

    rows = tl.arange(0, BLOCK_M)
    row_limit = query_stop - query_start
    columns_0 = tl.arange(0, PART_0)
    mask_0: tl.constexpr = PART_0 > HEAD_DIM
    mask_1: tl.constexpr = PART_0 + PART_1 > HEAD_DIM
    q_base = q_ptr + batch * stride_qb + head * stride_qh + query_start.to(tl.int64) * stride_qs
    q_0 = _load_part(q_base, stride_qs, rows, columns_0, row_limit, HEAD_DIM, True, mask_0)
    acc_0 = tl.zeros([BLOCK_M, PART_0], dtype=tl.float32)
    if PART_1 > 0:
        columns_1 = PART_0 + tl.arange(0, PART_1)
        q_1 = _load_part(q_base, stride_qs, rows, columns_1, row_limit, HEAD_DIM, True, mask_1)
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
                acc_0, acc_1, row_max, row_sum, q_0, q_1, k_base, v_base, bias_base,
                stride_ks, stride_vs, key, BLOCK_N, weight, scale_log2,
                HEAD_DIM, PART_0, PART_1, BLOCK_N, HAS_BIAS, HAS_WEIGHTS, False,
            )  # fmt: skip
        whole = start + blocks * BLOCK_N
        if whole < stop:
            acc_0, acc_1, row_max, row_sum = _attend_block(
                acc_0, acc_1, row_max, row_sum, q_0, q_1, k_base, v_base, bias_base,
                stride_ks, stride_vs, whole, stop - whole, weight, scale_log2,
                HEAD_DIM, PART_0, PART_1, BLOCK_N, HAS_BIAS, HAS_WEIGHTS, True,
            )  # fmt: skip

    lse = (row_max + tl.log2(row_sum)) * 0.6931471805599453
    if HAS_BIAS:
        empty = row_sum == 0.0
        lse = tl.where(empty, float("-inf"), lse)
        row_sum = tl.where(empty, 1.0, row_sum)
    inside = rows < row_limit
    lse_base = lse_ptr + (batch * heads + head) * seq + query_start
    tl.store(lse_base + rows, lse, mask=inside)
    out_base = out_ptr + batch * stride_ob + head * stride_oh + query_start.to(tl.int64) * stride_os
    out_rows = out_base + rows[:, None] * stride_os
    out_0 = (acc_0 / row_sum[:, None]).to(out_ptr.dtype.element_ty)
    keep_0 = inside[:, None] & (columns_0[None, :] < HEAD_DIM)
    tl.store(out_rows + columns_0[None, :], out_0, mask=keep_0)
    if PART_1 > 0:
        columns_1 = PART_0 + tl.arange(0, PART_1)
        out_1 = (acc_1 / row_sum[:, None]).to(out_ptr.dtype.element_ty)
        keep_1 = inside[:, None] & (columns_1[None, :] < HEAD_DIM)
        tl.store(out_rows + columns_1[None, :], out_1, mask=keep_1)
