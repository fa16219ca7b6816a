"""The decomposition as a compiler should see it: few kernels, and the same ones for many rules.

Compiling C++ is what an optimized model costs on a CPU (docs/notes/compile_cost.md). So tensors are
reordered by an index, which is data, and parts are not overwritten.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from evdit_opt.kernels.decomposed import Take, attend_pieces
from evdit_opt.kernels.decomposition import decompose
from evdit_opt.kernels.geometry import Geometry, Ranges, take
from evdit_opt.kernels.merge import merge
from evdit_opt.kernels.pieces import pieces_of, put

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
    pieces = pieces_of(plan, geometry, q, k.shape[1])
    parts = attend_pieces(pieces, plan, q, k, v, attn_mask, geometry, scale, take_of=take_reordered)
    out = torch.empty_like(q)
    for piece, (first, *others) in zip(pieces, parts, strict=True):
        rows, lse = first
        for part in others:
            rows, lse = merge(rows, lse, *part, attn_mask is not None, in_place=False)
        put(rows, piece, out)
    return out


def take_reordered(wanted: Sequence[Ranges]) -> Take:
    """:func:`evdit_opt.kernels.geometry.take`, from a copy in the order of all that is wanted.

    Joined slices would each be a loop of their own, in a kernel of its own for every rule.

    Args:
        wanted: everything that will be taken.
    """
    places: dict[tuple[tuple[int, int], ...], int] = {}
    order: list[int] = []
    for ranges in wanted:
        if len(ranges) > 1 and tuple(ranges) not in places:
            places[tuple(ranges)] = len(order)
            order += [token for start, stop in ranges for token in range(start, stop)]
    copies: list[tuple[Tensor, Tensor]] = []

    def take_from_copy(x: Tensor, ranges: Ranges) -> Tensor:
        if len(ranges) == 1:
            return take(x, ranges)
        copy = next((copy for source, copy in copies if source is x), None)
        if copy is None:
            copy = x.index_select(2, torch.tensor(order))
            copies.append((x, copy))
        size = (*x.shape[:2], sum(stop - start for start, stop in ranges), x.shape[3])
        # Of a slice Inductor would compute that slice only, in a kernel of its own.
        return copy.as_strided(size, copy.stride(), places[tuple(ranges)] * copy.stride(2))

    return take_from_copy
