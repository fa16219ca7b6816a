"""Tile attention as a few dense attention calls: exact, and no kernel of our own.

Dense rows and text queries are one call against the whole sequence. The sparse rows are taken in
blocks of neighbours, and what a block keeps in parts, each one dense call:

* its own frames (or one stretch of a window): the rows as the batch of one call;
* every group of shared keys, text included: one call of all its queries.

The parts are put together by log-sum-exp; the weight of a tile is a shift of that number. FLOPs are
those of the kept tiles, and what is held beside the result is a block, never seq x seq.
Mask family: Efficient-vDiT, arXiv 2502.06155.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from evdit_opt.kernels.constants import constant
from evdit_opt.kernels.decomposition import Block, Decomposition, decompose
from evdit_opt.kernels.dense import attend as dense_attend
from evdit_opt.kernels.dense import key_bias, lse_dtype
from evdit_opt.kernels.geometry import Geometry, own_windows, take
from evdit_opt.kernels.merge import merge

__all__ = ["Attend", "forward", "rows_per_block"]

# q, k, v, bias, scale -> out, log-sum-exp
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], tuple[Tensor, Tensor]]

# Queries of a block on a CPU: enough for the flash kernel's large query tiles (from 768 queries),
# few enough for its partial results to stay in the cache.
CPU_BLOCK_QUERIES = 2048


def rows_per_block(geometry: Geometry, device_type: str) -> int:
    """Frames of a block. Elsewhere than on a CPU launches cost more than passes over memory."""
    if device_type != "cpu":
        return geometry.frames
    return max(1, CPU_BLOCK_QUERIES // geometry.tokens)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    intervals: tuple[int, ...],
    log_weights: tuple[float, ...],
    geometry: Geometry,
    scale: float,
    attend: Attend = dense_attend,
) -> tuple[Tensor, Tensor]:
    """Tile attention.

    Args:
        q: ``[batch, heads, seq, head_dim]``, any strides.
        k: ``[batch, kv_heads, seq, head_dim]``, any strides; heads is a multiple of kv_heads.
        v: like k.
        attn_mask: None or a key-padding mask ``[batch | 1, heads | 1, 1, seq]``, bool or float.
        intervals: ``TileMask.segments()[0]``.
        log_weights: ``TileMask.segments()[1]``.
        geometry: frames and text of the sequence.
        scale: multiplies the logits.
        attend: computes the dense calls; as :func:`evdit_opt.kernels.dense.attend`.

    Returns:
        out like ``torch.empty_like(q)``, lse ``[batch, heads, seq]`` (natural log, float32 or 64).
    """
    plan = decompose(intervals, log_weights, geometry.frames)
    blocks = plan.blocks(rows_per_block(geometry, q.device.type))
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=lse_dtype(q.dtype))
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    bias = key_bias(attn_mask, q)
    groups = q.shape[1] // k.shape[1]
    for group in range(groups):
        # Query head h reads key head h // groups: a strided slice of the query heads, no copies.
        heads = slice(group, None, groups)
        own_bias = bias[:, heads] if bias is not None and bias.shape[1] > 1 else bias
        call = _Call(
            q[:, heads], k, v, own_bias, out[:, heads], lse[:, heads], geometry, scale, attend
        )
        _dense_rows(call, plan)
        # The rows of a block take the place of the batch.
        one_by_one = q.shape[0] > 1 and any(block.count > 1 for block in blocks)
        for part in call.split() if one_by_one else [call]:
            shared = _shared_keys(part, plan)
            for block in blocks:
                _sparse_rows(part, block, shared)
    return out, lse


@dataclass(frozen=True, slots=True)
class _Call:
    """Tensors of one call with as many query heads as key heads; out and lse are written to."""

    q: Tensor  # [batch, heads, seq, head_dim]
    k: Tensor
    v: Tensor
    bias: Tensor | None  # [batch | 1, heads | 1, 1, seq]
    out: Tensor
    lse: Tensor  # [batch, heads, seq]
    geometry: Geometry
    scale: float
    attend: Attend

    def split(self) -> list["_Call"]:
        """One call per batch element."""
        calls = []
        for b in range(self.q.shape[0]):
            one = slice(b, b + 1)
            bias = self.bias[one] if self.bias is not None and self.bias.shape[0] > 1 else self.bias
            calls.append(
                _Call(
                    self.q[one], self.k[one], self.v[one], bias, self.out[one], self.lse[one],
                    self.geometry, self.scale, self.attend,
                )
            )  # fmt: skip
        return calls


@dataclass(frozen=True, slots=True)
class _Keys:
    """Keys that all sparse rows see, side by side, and their log-weight per sparse row."""

    k: Tensor  # [batch, heads, keys, head_dim]
    v: Tensor
    bias: Tensor | None  # [batch | 1, heads | 1, 1, keys]
    weights: Tensor | None  # [sparse rows]; None if all are 0


def _dense_rows(call: _Call, plan: Decomposition) -> None:
    """Queries that see the whole sequence: frames kept in full, and text."""
    ranges = call.geometry.ranges(plan.dense, with_text=True)
    if not ranges:
        return
    out, lse = call.attend(take(call.q, ranges), call.k, call.v, call.bias, call.scale)
    _put(call, ranges, out, lse)


def _shared_keys(call: _Call, plan: Decomposition) -> list[_Keys]:
    """The groups of shared keys, copied next to one another once; the text joins a plain group."""
    geometry = call.geometry
    groups = [(geometry.ranges(group.keys), group.weights) for group in plan.shared]
    if geometry.text:
        plain = next((n for n, (_, weights) in enumerate(groups) if not any(weights)), None)
        if plain is None:
            groups.append((geometry.text, (0.0,)))
        else:
            groups[plain] = (groups[plain][0] + geometry.text, groups[plain][1])
    keys = []
    for ranges, weights in groups:
        bias = None
        if call.bias is not None:
            bias = take(call.bias.transpose(2, 3), ranges).transpose(2, 3)
        shift = constant(weights, call.lse) if any(weights) else None
        keys.append(_Keys(take(call.k, ranges), take(call.v, ranges), bias, shift))
    return keys


def _sparse_rows(call: _Call, block: Block, shared: list[_Keys]) -> None:
    """One block of sparse rows, from its parts."""
    geometry, rows = call.geometry, block.count
    ranges = geometry.ranges(block.frames)
    q = take(call.q, ranges)
    parts = []
    for start, stop, weight in block.own:
        k, v = (_own(x, geometry, block, start, stop) for x in (call.k, call.v))
        bias = None
        if call.bias is not None:
            bias = _own(call.bias.transpose(2, 3), geometry, block, start, stop).transpose(2, 3)
        out, lse = call.attend(_by_row(q, rows), k, v, bias, call.scale)
        parts.append((out, lse + weight if weight else lse))
    for keys in shared:
        out, lse = call.attend(q, keys.k, keys.v, keys.bias, call.scale)
        out, lse = _by_row(out, rows), _by_row(lse.unsqueeze(-1), rows).squeeze(-1)
        if keys.weights is not None:
            lse = lse + keys.weights[block.position : block.position + rows, None, None]
        parts.append((out, lse))
    out, lse = parts[0]
    for part in parts[1:]:
        out, lse = merge(out, lse, *part, may_be_empty=call.bias is not None)
    out, lse = _side_by_side(out, q.shape[0]), _side_by_side(lse.unsqueeze(-1), q.shape[0])
    _put(call, ranges, out, lse.squeeze(-1))


def _own(x: Tensor, geometry: Geometry, block: Block, start: int, stop: int) -> Tensor:
    """Frames ``row + start .. row + stop`` of every row: ``[rows | batch, heads, keys, dim]``."""
    if stop - start > 1:
        return own_windows(x, geometry, block.frames[0][0], block.count, start, stop)
    shifted = [(first + start, last + start) for first, last in block.frames]
    return _by_row(take(x, geometry.ranges(shifted)), block.count)


def _by_row(x: Tensor, rows: int) -> Tensor:
    """``[1, heads, rows * tokens, dim]`` as ``[rows, heads, tokens, dim]``; one row: as it is."""
    return x if rows == 1 else x[0].unflatten(1, (rows, -1)).transpose(0, 1)


def _side_by_side(x: Tensor, batch: int) -> Tensor:
    """The inverse of :func:`_by_row`."""
    return x if x.shape[0] == batch else x.transpose(0, 1).flatten(1, 2).unsqueeze(0)


def _put(call: _Call, ranges: list[tuple[int, int]], out: Tensor, lse: Tensor) -> None:
    """Write rows that lie next to one another to their token ranges."""
    offset = 0
    for start, stop in ranges:
        rows = slice(offset, offset + stop - start)
        call.out[:, :, start:stop] = out[:, :, rows]
        call.lse[:, :, start:stop] = lse[:, :, rows]
        offset += stop - start
