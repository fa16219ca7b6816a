"""A tile mask as small integer tables for the fused kernel: query tiles and their key ranges."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import torch
from torch import Tensor

from evdit_opt.kernels.geometry import Geometry
from evdit_opt.masks import DROPPED, TileMask

__all__ = ["Tables", "make_tables"]

Ranges = tuple[tuple[int, int, float], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tables:
    """What one launch reads, on the device of the tensors.

    Attributes:
        tiles: int32 ``[tiles, 4]``: first and past-the-end query token of a tile, and the first and
            past-the-end row of ``ranges`` its keys are in. All queries of a tile see the same keys.
            The most expensive tiles come first.
        ranges: int32 ``[ranges, 2]``: first and past-the-end key token.
        weights: float32 ``[ranges]``: log-weight of a range.
        is_weighted: True if any weight is not 0.
    """

    tiles: Tensor
    ranges: Tensor
    weights: Tensor
    is_weighted: bool


@lru_cache(maxsize=64)
def make_tables(
    intervals: tuple[int, ...],
    log_weights: tuple[float, ...],
    geometry: Geometry,
    block_m: int,
    device: torch.device,
) -> Tables:
    """Build (once per mask, layout, block size and device) the tables of a mask.

    Args:
        intervals: ``TileMask.segments()[0]``.
        log_weights: ``TileMask.segments()[1]``.
        geometry: frames and text of the sequence.
        block_m: most queries of a tile.
        device: where the tables go.
    """
    mask = TileMask.from_segments(geometry.frames, intervals, log_weights)
    rows: dict[Ranges, int] = {}
    ranges: list[tuple[int, int, float]] = []
    tiles: list[tuple[int, int, int, int]] = []
    for keys, start, stop in _query_groups(mask, geometry):
        if keys not in rows:
            rows[keys] = len(ranges)
            ranges += keys
        first = rows[keys]
        tiles += [
            (query, min(query + block_m, stop), first, first + len(keys))
            for query in range(start, stop, block_m)
        ]
    cost = {first: sum(stop - start for start, stop, _ in keys) for keys, first in rows.items()}
    tiles.sort(key=lambda tile: -cost[tile[2]])
    return Tables(
        tiles=torch.tensor(tiles, dtype=torch.int32, device=device),
        ranges=torch.tensor([key[:2] for key in ranges], dtype=torch.int32, device=device),
        weights=torch.tensor([key[2] for key in ranges], dtype=torch.float32, device=device),
        is_weighted=any(key[2] for key in ranges),
    )


def _query_groups(mask: TileMask, geometry: Geometry) -> Iterator[tuple[Ranges, int, int]]:
    """Neighbouring queries that see the same keys: ``(key ranges, first query, past the end)``."""
    everything: Ranges = ((0, geometry.seq_len, 0.0),)
    groups = [(everything, 0, geometry.prefix)]
    for i, row in enumerate(mask.rows):
        groups.append((_key_ranges(row, geometry), geometry.token(i), geometry.token(i + 1)))
    groups.append((everything, geometry.token(geometry.frames), geometry.seq_len))
    nonempty = [group for group in groups if group[1] < group[2]]
    for keys, members in groupby(nonempty, key=lambda group: group[0]):
        same = list(members)
        yield keys, same[0][1], same[-1][2]


def _key_ranges(row: tuple[float, ...], geometry: Geometry) -> Ranges:
    """The kept keys of a video query, text included, touching ranges of one weight joined."""
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
