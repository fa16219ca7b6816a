"""A tile mask as small integer tables for the fused kernels: tiles of tokens and what they meet.

The forward kernel and the gradient of q own tiles of queries and walk ranges of keys; the gradient
of k and v owns tiles of keys and walks ranges of queries: the same tables of the transposed mask.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import groupby

import torch
from torch import Tensor

from evdit_opt.kernels.constants import on_device
from evdit_opt.kernels.geometry import Geometry
from evdit_opt.masks import DROPPED, TileMask

__all__ = ["TILE_COLUMNS", "Tables", "make_tables"]

TILE_COLUMNS = 6

Ranges = tuple[tuple[int, int, float], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tables:
    """What one launch reads, on the device of the tensors.

    Attributes:
        tiles: int32 ``[tiles, 6]``: first and past-the-end token of a tile; the first and
            past-the-end row of ``ranges`` it meets; the first tile and the number of tiles of its
            class. A class is all tiles that meet equally many tokens; the most expensive class
            comes first. No tile crosses from tokens that meet one set to tokens that meet another.
        ranges: int32 ``[ranges, 2]``: first and past-the-end token on the other side.
        weights: float32 ``[ranges]``: log-weight of a range.
        is_weighted: True if any weight is not 0.
    """

    tiles: Tensor
    ranges: Tensor
    weights: Tensor
    is_weighted: bool


# Never evicted: a captured CUDA graph keeps the addresses. One entry is a few kilobytes.
@cache
def make_tables(
    intervals: tuple[int, ...],
    log_weights: tuple[float, ...],
    geometry: Geometry,
    block: int,
    device: torch.device,
    transposed: bool = False,
) -> Tables:
    """Build (once per mask, layout, block size and device) the tables of a mask.

    Args:
        intervals: ``TileMask.segments()[0]``.
        log_weights: ``TileMask.segments()[1]``.
        geometry: frames and text of the sequence.
        block: most tokens of a tile.
        device: where the tables go.
        transposed: tiles of keys and ranges of queries, instead of tiles of queries and ranges of
            keys. A key that no query sees has no range.
    """
    rows = TileMask.from_segments(geometry.frames, intervals, log_weights).rows
    if transposed:
        rows = tuple(zip(*rows, strict=True))
    positions: dict[Ranges, int] = {}
    ranges: list[tuple[int, int, float]] = []
    tiles: list[tuple[int, int, int, int]] = []
    for met, start, stop in _groups(rows, geometry):
        if met not in positions:
            positions[met] = len(ranges)
            ranges += met
        first = positions[met]
        tiles += [
            (token, min(token + block, stop), first, first + len(met))
            for token in range(start, stop, block)
        ]
    table: list[tuple[int, ...]] = []
    cost = {first: sum(stop - start for start, stop, _ in met) for met, first in positions.items()}
    for _, members in groupby(
        sorted(tiles, key=lambda tile: -cost[tile[2]]), key=lambda tile: cost[tile[2]]
    ):
        same = list(members)
        table += [(*tile, len(table), len(same)) for tile in same]
    weights = [weight for *_, weight in ranges]
    return Tables(
        tiles=on_device(torch.tensor(table, dtype=torch.int32), device),
        ranges=on_device(
            torch.tensor([r[:2] for r in ranges], dtype=torch.int32).view(-1, 2), device
        ),
        weights=on_device(torch.tensor(weights, dtype=torch.float32), device),
        is_weighted=any(weights),
    )


def _groups(
    rows: tuple[tuple[float, ...], ...], geometry: Geometry
) -> Iterator[tuple[Ranges, int, int]]:
    """Neighbouring tokens that meet the same ranges: ``(ranges, first token, past the end)``."""
    everything: Ranges = ((0, geometry.seq_len, 0.0),)
    groups = [(everything, 0, geometry.prefix)]
    for i, row in enumerate(rows):
        groups.append((_met(row, geometry), geometry.token(i), geometry.token(i + 1)))
    groups.append((everything, geometry.token(geometry.frames), geometry.seq_len))
    nonempty = [group for group in groups if group[1] < group[2]]
    for met, members in groupby(nonempty, key=lambda group: group[0]):
        same = list(members)
        yield met, same[0][1], same[-1][2]


def _met(row: tuple[float, ...], geometry: Geometry) -> Ranges:
    """What a frame meets, text included, touching ranges of one weight joined."""
    pieces = [(0, geometry.prefix, 0.0)]
    for j, weight in enumerate(row):
        if weight != DROPPED:
            pieces.append((geometry.token(j), geometry.token(j + 1), weight))
    pieces.append((geometry.token(geometry.frames), geometry.seq_len, 0.0))
    joined: list[tuple[int, int, float]] = []
    for start, stop, weight in pieces:
        if start == stop:
            continue
        if joined and joined[-1][1] == start and joined[-1][2] == weight:
            joined[-1] = (joined[-1][0], stop, weight)
        else:
            joined.append((start, stop, weight))
    return tuple(joined)
