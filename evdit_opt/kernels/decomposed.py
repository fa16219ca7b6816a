"""Tile attention as a few dense attention calls: exact, and no kernel of our own.

Dense rows and text queries are one call against the whole sequence. The sparse rows are taken in
blocks of neighbours, and what a block keeps in parts, each one dense call:

* its own frames (or one stretch of a window): the rows as the batch of one call;
* every group of shared keys, text included: one call of all its queries.

The parts are put together by log-sum-exp; the weight of a tile is a shift of that number. FLOPs are
those of the kept tiles, and what is held beside the result is a block, never seq x seq.
Mask family: Efficient-vDiT, arXiv 2502.06155.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from evdit_opt.kernels.decomposition import Block, Decomposition, decompose
from evdit_opt.kernels.dense import attend as dense_attend
from evdit_opt.kernels.dense import key_bias
from evdit_opt.kernels.geometry import Geometry, Ranges, own_windows, take
from evdit_opt.kernels.pieces import Part, Piece, pieces_of, put_together, shared_ranges

__all__ = ["Attend", "attend_pieces", "forward"]

# x [batch, heads, seq, dim], token ranges -> these tokens side by side; those of the whole sequence
# in any order, but always the same one
Take = Callable[[Tensor, Ranges], Tensor]
# all ranges that will be taken, seq -> what takes them
TakeOf = Callable[[list[Ranges], int], Take]

# q, k, v, bias, scale -> out, log-sum-exp
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], tuple[Tensor, Tensor]]


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
    pieces = pieces_of(plan, geometry, q, k.shape[1])
    parts = attend_pieces(pieces, plan, q, k, v, attn_mask, geometry, scale, attend)
    return put_together(pieces, parts, q, may_be_empty=attn_mask is not None)


def attend_pieces(
    pieces: Sequence[Piece],
    plan: Decomposition,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    geometry: Geometry,
    scale: float,
    attend: Attend = dense_attend,
    take_of: TakeOf = lambda wanted, seq: take,
) -> Iterator[list[Part]]:
    """The dense calls of each piece, one after another.

    Args:
        pieces: ``pieces_of`` the call.
        plan: the mask.
        q: as of :func:`forward`, and so is the rest.
        take_of: makes what takes token ranges, as :func:`evdit_opt.kernels.geometry.take`, from all
            that are going to be taken.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    bias = key_bias(attn_mask, q)
    of_keys = [ranges for ranges, _ in shared_ranges(plan, geometry)]
    of_keys += [ranges for piece in pieces for ranges in _own_ranges(piece.block, geometry)]
    seq = geometry.seq_len
    whose: tuple[slice, slice] | None = None
    for piece in pieces:
        if whose != (piece.batch, piece.heads):
            whose, shared = (piece.batch, piece.heads), list[_Keys]()
            own_bias = bias
            if bias is not None:
                own_bias = bias[piece.batch] if bias.shape[0] > 1 else bias
                own_bias = own_bias[:, piece.heads] if bias.shape[1] > 1 else own_bias
                own_bias = own_bias.transpose(2, 3)
            call = _Call(
                q[whose], k[piece.batch], v[piece.batch], own_bias, geometry, scale, attend,
                take_of([other.ranges for other in pieces], seq), take_of(of_keys, seq),
            )  # fmt: skip
        queries = call.take_queries(call.q, piece.ranges)
        if piece.block is None:
            keys = _take_keys(call, [(0, seq)])
            yield [attend(queries, keys.k, keys.v, keys.bias, scale)]
            continue
        if not shared:  # copied next to one another once
            shared = [_take_keys(call, ranges) for ranges, _ in shared_ranges(plan, geometry)]
        yield _sparse_rows(call, piece.block, queries, shared)


@dataclass(frozen=True, slots=True)
class _Call:
    """Tensors of a piece, with as many query heads as key heads."""

    q: Tensor  # [batch, heads, seq, head_dim]
    k: Tensor
    v: Tensor
    bias: Tensor | None  # [batch | 1, heads | 1, seq, 1]
    geometry: Geometry
    scale: float
    attend: Attend
    take_queries: Take
    take_keys: Take


@dataclass(frozen=True, slots=True)
class _Keys:
    """Keys that several rows see, side by side."""

    k: Tensor  # [batch, heads, keys, head_dim]
    v: Tensor
    bias: Tensor | None  # [batch | 1, heads | 1, 1, keys]


def _take_keys(call: _Call, ranges: Ranges) -> _Keys:
    """Keys of all samples, side by side."""
    bias = None
    if call.bias is not None:
        bias = call.take_keys(call.bias, ranges).transpose(2, 3)
    k, v = (call.take_keys(x, ranges) for x in (call.k, call.v))
    return _Keys(k, v, bias)


def _sparse_rows(call: _Call, block: Block, q: Tensor, shared: list[_Keys]) -> list[Part]:
    """The parts of a block of sparse rows; ``q`` are its queries, side by side."""
    rows = block.count
    parts: list[Part] = []
    for start, stop, _ in block.own:
        k, v = (_own(call, x, block, start, stop) for x in (call.k, call.v))
        bias = None
        if call.bias is not None:
            bias = _own(call, call.bias, block, start, stop).transpose(2, 3)
        parts.append(call.attend(_by_row(q, rows), k, v, bias, call.scale))
    for keys in shared:
        out, lse = call.attend(q, keys.k, keys.v, keys.bias, call.scale)
        parts.append((_by_row(out, rows), _by_row(lse.unsqueeze(-1), rows).squeeze(-1)))
    return parts


def _own(call: _Call, x: Tensor, block: Block, start: int, stop: int) -> Tensor:
    """Frames ``row + start .. row + stop`` of every row: ``[rows | batch, heads, keys, dim]``."""
    if stop - start > 1:
        return own_windows(x, call.geometry, block.frames[0][0], block.count, start, stop)
    return _by_row(call.take_keys(x, _shifted(block, start, call.geometry)), block.count)


def _own_ranges(block: Block | None, geometry: Geometry) -> list[Ranges]:
    """Tokens that :func:`_own` takes for the parts of a block."""
    if block is None:
        return []
    return [_shifted(block, start, geometry) for start, stop, _ in block.own if stop - start == 1]


def _shifted(block: Block, start: int, geometry: Geometry) -> Ranges:
    return geometry.ranges([(first + start, last + start) for first, last in block.frames])


def _by_row(x: Tensor, rows: int) -> Tensor:
    """``[1, heads, rows * tokens, dim]`` as ``[rows, heads, tokens, dim]``; one row: as it is."""
    return x if rows == 1 else x[0].unflatten(1, (rows, -1)).transpose(0, 1)
