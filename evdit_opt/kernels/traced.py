"""The decomposition as a compiler should see it: few kernels, and the same ones for many rules.

Compiling C++ is what an optimized model costs on a CPU (docs/notes/compile_cost.md). So everything
that depends on the rule is data: in which order tensors are read, and who has which part of what.
"""

import math
from collections.abc import Iterable, Sequence
from functools import reduce
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evdit_opt.kernels.decomposed import Take, attend_pieces
from evdit_opt.kernels.decomposition import decompose
from evdit_opt.kernels.geometry import Geometry, Ranges, take
from evdit_opt.kernels.merge import merge
from evdit_opt.kernels.pieces import Part, Piece, pieces_of

__all__ = ["forward", "take_reordered"]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    intervals: tuple[int, ...],
    log_weights: tuple[float, ...],
    geometry: Geometry,
    scale: float,
) -> Tensor:
    """The output of :func:`evdit_opt.kernels.decomposed.forward`, without its log-sum-exp."""
    plan = decompose(intervals, log_weights, geometry.frames)
    rows_for_batch = any(block.count > 1 for block in plan.blocks(geometry.frames))
    samples = [slice(n, n + 1) for n in range(q.shape[0])] if rows_for_batch else [slice(None)]
    out = torch.empty_like(q)
    # Blocks of as many rows as there are: parts are merged after all calls, not in the cache.
    for sample in samples:
        mask = attn_mask
        if attn_mask is not None and attn_mask.shape[0] > 1:
            mask = attn_mask[sample]
        tensors = q[sample], k[sample], v[sample], mask
        pieces = pieces_of(plan, geometry, tensors[0], k.shape[1], geometry.frames)
        parts = attend_pieces(pieces, plan, *tensors, geometry, scale, take_of=take_reordered)
        for heads, group in groupby(zip(pieces, parts, strict=True), lambda pair: pair[0].heads):
            (rows, lse), *others = _layers(group, geometry.seq_len)
            for other in others:
                rows, lse = merge(rows, lse, *other, attn_mask is not None, in_place=False)
            out[sample, heads] = rows.transpose(1, 2)
    return out


def _layers(computed: Iterable[tuple[Piece, list[Part]]], seq: int) -> list[Part]:
    """The first parts of all pieces in the order of the tokens, the second parts, and so on.

    Returns:
        Per layer rows ``[batch, seq, heads, dim]``, 0 where a token has no such part, and their
        log-sum-exp ``[batch, seq, heads]``: -inf there, in the first layer a very low number.
    """
    layers: list[tuple[list[Tensor], list[Tensor]]] = []
    weights: list[np.ndarray[Any, Any]] = []
    for piece, parts in computed:
        tokens = np.concatenate([np.arange(*bounds) for bounds in piece.ranges])
        for n, (rows, lse) in enumerate(parts):
            if n == len(layers):
                layers.append(([], []))
                weights.append(np.zeros(seq))
            weights[n][tokens] = np.repeat(piece.weights[n], len(tokens) // piece.rows)
            layers[n][0].append(_in_order(rows, piece, tokens, seq, 0.0))
            # Queries that see everything have one part, and are it: any number will do as its own.
            if piece.block is not None:
                missing = -math.inf if n else torch.finfo(lse.dtype).min
                one_number = lse.unsqueeze(-1)
                layers[n][1].append(_in_order(one_number, piece, tokens, seq, missing).squeeze(-1))
    # Every token is in one of the pieces.
    return [
        (reduce(torch.add, rows), _weighted(lse, of_tokens))
        for (rows, lse), of_tokens in zip(layers, weights, strict=True)
    ]


def _weighted(lse: list[Tensor], of_tokens: np.ndarray[Any, Any]) -> Tensor:
    if not lse:  # no sparse rows, nothing to merge
        return torch.zeros(())
    return reduce(torch.maximum, lse) + torch.tensor(of_tokens, dtype=lse[0].dtype)[:, None]


def _in_order(
    x: Tensor, piece: Piece, tokens: np.ndarray[Any, Any], seq: int, missing: float
) -> Tensor:
    """A part in the order of the tokens.

    Elements are numbered as they lie in memory, because a stride is a size, and sizes depend on the
    rule: what is left of them in the kernel is the table of numbers.

    Args:
        x: ``[rows | batch, heads, queries, dim]``.
        piece: whose part it is.
        tokens: its queries.
        seq: tokens of the sequence.
        missing: what tokens get that the piece does not have.

    Returns:
        ``[batch, seq, heads, dim]``.
    """
    query = np.full((1, seq, 1), -1)
    query[0, tokens, 0] = np.arange(len(tokens))
    there, row = query >= 0, np.arange(x.shape[0])[:, None, None]
    if piece.rows > 1:
        row, query = np.divmod(query, x.shape[2])
    # Each [batch, seq, heads].
    places = [*np.broadcast_arrays(row, np.arange(x.shape[1]), query)]
    order = sorted(range(3), key=lambda dim: -x.stride()[dim])
    if order[2] == 1 and x.shape[3] == 1:  # a token's heads side by side, a single number each
        order, places, there = order[:2], [place[..., 0] for place in places], there[..., 0]
    numbers = np.ravel_multi_index(
        [places[dim] for dim in order], [x.shape[dim] for dim in order], mode="wrap"
    )
    index = torch.tensor(np.where(there, numbers, -1))
    heads = [1] if index.ndim == 2 else []
    elements = x.permute(*order, *heads, 3).flatten(0, len(order) - 1)
    size = (*index.shape[:2], x.shape[1], x.shape[3])
    known = (index >= 0).reshape(index.shape + (1,) * (4 - index.ndim)).expand(size)
    taken: Tensor = torch.ops.aten._unsafe_masked_index(elements, known, [index], missing)
    return taken


def take_reordered(wanted: Sequence[Ranges], seq: int) -> Take:
    """:func:`evdit_opt.kernels.geometry.take`, from a copy in the order of all that is wanted.

    Joined slices would each be a loop of their own, in a kernel of its own for every rule. A copy
    that has every token once also serves as the whole sequence, its tokens in that order: what
    computes the tensor then writes nothing but the copy.

    Args:
        wanted: everything that will be taken.
        seq: tokens of the sequence.
    """
    everything: Ranges = [(0, seq)]
    parts = list(dict.fromkeys(tuple(ranges) for ranges in wanted if ranges != everything))
    scattered = [ranges for ranges in parts if len(ranges) > 1]
    places: dict[tuple[tuple[int, int], ...], int] = {}
    if scattered and sorted(_tokens(parts)) == list(range(seq)):
        scattered, places = parts, {tuple(everything): 0}
    order: list[int] = []
    for ranges in scattered:
        places[ranges] = len(order)
        order += _tokens([ranges])
    copies: list[tuple[Tensor, Tensor]] = []

    def take_from_copy(x: Tensor, ranges: Ranges) -> Tensor:
        if tuple(ranges) not in places:
            return take(x, ranges)
        copy = next((copy for source, copy in copies if source is x), None)
        if copy is None:
            copy = x.index_select(2, torch.tensor(order))
            copies.append((x, copy))
        size = (*x.shape[:2], sum(stop - start for start, stop in ranges), x.shape[3])
        # Of a slice Inductor would compute that slice only, in a kernel of its own.
        return copy.as_strided(size, copy.stride(), places[tuple(ranges)] * copy.stride(2))

    return take_from_copy


def _tokens(parts: Iterable[Iterable[tuple[int, int]]]) -> list[int]:
    return [token for ranges in parts for bounds in ranges for token in range(*bounds)]
