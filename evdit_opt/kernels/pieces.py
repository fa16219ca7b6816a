"""The pieces of a tile attention on tensors: which queries are computed together, and what from.

A piece is either all queries that see the whole sequence, or a block of neighbouring sparse rows.
What it is, is known before there are tensors; its dense calls give one part each, and the parts are
merged by log-sum-exp.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from evdit_opt.kernels.constants import constant
from evdit_opt.kernels.decomposition import Block, Decomposition
from evdit_opt.kernels.dense import lse_dtype
from evdit_opt.kernels.geometry import Geometry, Ranges, join
from evdit_opt.kernels.merge import merge

__all__ = [
    "Part", "Piece", "pieces_of", "put_together", "rows_per_block", "shared_ranges",
]  # fmt: skip

Part = tuple[Tensor, Tensor]
"""What queries get from some of their keys: out ``[rows | batch, heads, queries, head_dim]`` and
log-sum-exp ``[rows | batch, heads, queries]``."""

# Queries of a block on a CPU: enough for the flash kernel's large query tiles (from 768 queries),
# few enough for its partial results to stay in the cache.
CPU_BLOCK_QUERIES = 2048


def rows_per_block(geometry: Geometry, device_type: str) -> int:
    """Frames of a block. Elsewhere than on a CPU launches cost more than passes over memory."""
    if device_type != "cpu":
        return geometry.frames
    return max(1, CPU_BLOCK_QUERIES // geometry.tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Queries that are computed together: what is known of them before there are tensors.

    Attributes:
        batch: of the samples.
        heads: of the query heads; of each key head one.
        ranges: their tokens.
        block: the sparse rows they are; None: they see the whole sequence.
        weights: of every dense call the log-weight of its keys, for each row.
    """

    batch: slice
    heads: slice
    ranges: Ranges
    block: Block | None
    weights: tuple[tuple[float, ...], ...]

    @property
    def rows(self) -> int:
        """Frames that take the place of the batch in calls with keys of their own."""
        return 1 if self.block is None else self.block.count


def pieces_of(
    plan: Decomposition, geometry: Geometry, q: Tensor, kv_heads: int, rows: int | None = None
) -> list[Piece]:
    """The pieces of a call; they cover every query once.

    Args:
        plan: the mask.
        geometry: frames and text of the sequence.
        q: ``[batch, heads, seq, head_dim]``; its sizes and its device count.
        kv_heads: heads of k and v.
        rows: at most so many frames in a block; None: what suits the device.
    """
    blocks = plan.blocks(rows or rows_per_block(geometry, q.device.type))
    dense = geometry.ranges(plan.dense, with_text=True)
    # The rows of a block take the place of the batch: of one sample, or there are none.
    one_by_one = q.shape[0] != 1 and any(block.count > 1 for block in blocks)
    batches = [slice(b, b + 1) for b in range(q.shape[0])] if one_by_one else [slice(None)]
    shared = [weights for _, weights in shared_ranges(plan, geometry)]
    groups = q.shape[1] // kv_heads
    pieces = []
    for group in range(groups):
        # Query head h reads key head h // groups: a strided slice of the query heads, no copies.
        heads = slice(group, None, groups)
        if dense:
            everything = Piece(
                batch=slice(None), heads=heads, ranges=dense, block=None, weights=((0.0,),)
            )
            pieces.append(everything)
        pieces += [
            Piece(
                batch=batch, heads=heads, ranges=geometry.ranges(block.frames), block=block,
                weights=_weights(block, shared),
            )
            for batch in batches
            for block in blocks
        ]  # fmt: skip
    return pieces


def _weights(block: Block, shared: list[tuple[float, ...]]) -> tuple[tuple[float, ...], ...]:
    """Of the own keys of a block, and of those that all sparse rows see."""
    own = [(weight,) * block.count for *_, weight in block.own]
    none, rows = (0.0,) * block.count, slice(block.position, block.position + block.count)
    return (*own, *(weights[rows] if any(weights) else none for weights in shared))


def shared_ranges(
    plan: Decomposition, geometry: Geometry
) -> list[tuple[Ranges, tuple[float, ...]]]:
    """Tokens of each group of shared keys, and their log-weight per sparse row.

    The text joins a group without weights, or is one.
    """
    groups = [(geometry.ranges(group.keys), group.weights) for group in plan.shared]
    if geometry.text:
        without = next((n for n, (_, weights) in enumerate(groups) if not any(weights)), None)
        if without is None:
            groups.append((geometry.text, (0.0,)))
        else:
            ranges, weights = groups[without]
            groups[without] = (join(sorted(ranges + geometry.text)), weights)
    return groups


def put_together(
    pieces: Iterable[Piece], parts: Iterable[list[Part]], q: Tensor, may_be_empty: bool
) -> tuple[Tensor, Tensor]:
    """Merge the parts of each piece, and write them to where its queries are.

    Args:
        pieces: of the call.
        parts: of each piece; overwritten.
        q: the queries, for the sizes of the results.
        may_be_empty: whether there is a mask of keys.

    Returns:
        out like ``torch.empty_like(q)``, lse ``[batch, heads, seq]`` (natural log, float32 or 64).
    """
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=lse_dtype(q.dtype))
    for piece, found in zip(pieces, parts, strict=True):
        (rows, rows_lse), *others = map(_weighted, found, piece.weights)
        for part in others:
            rows, rows_lse = merge(rows, rows_lse, *part, may_be_empty=may_be_empty)
        _put(rows, piece, out)
        _put(rows_lse.unsqueeze(-1), piece, lse.unsqueeze(-1))
    return out, lse


def _weighted(part: Part, weights: tuple[float, ...]) -> Part:
    rows, lse = part
    return rows, lse + constant(weights, lse)[:, None, None] if any(weights) else lse


def _put(rows: Tensor, piece: Piece, out: Tensor) -> None:
    """Write the queries of a piece to where they are.

    Args:
        rows: ``[rows | batch, heads, queries, dim]``, as in a :data:`Part`.
        piece: which queries.
        out: ``[batch, heads, seq, dim]``.
    """
    if piece.rows > 1:
        rows = rows.transpose(0, 1).flatten(1, 2).unsqueeze(0)  # side by side again
    out, offset = out[piece.batch, piece.heads], 0
    for start, stop in piece.ranges:
        out[:, :, start:stop] = rows[:, :, offset : offset + stop - start]
        offset += stop - start
