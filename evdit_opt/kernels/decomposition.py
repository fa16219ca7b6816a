"""A tile mask cut into dense pieces: a pure function of the mask, no tensors.

The rows of a mask fall in two kinds. A *dense* row keeps every tile with weight 1. Every other row
is *sparse*: it keeps some key frames that all sparse rows keep (in the paper's family, arXiv
2502.06155: the reference frames), plus frames of its own (its own frame, or a window around it).

    rows    shared   own
    0       everything          <- dense row (a reference)
    1       0  4     1
    2       0  4     2          <- one run: own frames at the same offset from the row
    3       0  4     3
    4       everything          <- dense row
    5       0  4     5          <- the next run
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from evdit_opt.errors import MaskError
from evdit_opt.masks import DROPPED, TileMask

__all__ = ["Block", "Decomposition", "Run", "Shared", "decompose"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shared:
    """Key frames that every sparse row keeps; within a row they all have one weight.

    Attributes:
        keys: half-open intervals of key frames, ascending.
        weights: log-weight per sparse row, in the order of ``Decomposition.sparse_rows``.
    """

    keys: tuple[tuple[int, int], ...]
    weights: tuple[float, ...]

    @property
    def frames(self) -> int:
        """Number of key frames."""
        return sum(stop - start for start, stop in self.keys)


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Consecutive sparse rows whose own key frames lie at the same offsets from the row.

    Attributes:
        first: first query frame.
        count: number of query frames.
        position: index of ``first`` among the sparse rows.
        own: ``(start, stop, log weight)`` per interval of own key frames, relative to the row.
    """

    first: int
    count: int
    position: int
    own: tuple[tuple[int, int, float], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Neighbouring sparse rows whose own key frames lie at the same offsets from the row.

    Attributes:
        frames: half-open intervals of query frames, ascending. More than one only where every
            interval of ``own`` is a single frame, so that the keys move with the queries.
        position: index of the first row among the sparse rows.
        own: as in :class:`Run`.
    """

    frames: tuple[tuple[int, int], ...]
    position: int
    own: tuple[tuple[int, int, float], ...]

    @property
    def count(self) -> int:
        """Number of rows."""
        return sum(stop - start for start, stop in self.frames)


@dataclass(frozen=True, kw_only=True, slots=True)
class Decomposition:
    """Everything the mask keeps: ``dense`` rows, and ``runs`` of rows with ``shared`` + own keys.

    Attributes:
        frames: number of frames of the mask.
        dense: half-open intervals of query frames that keep everything with weight 1.
        shared: disjoint groups of key frames kept by all sparse rows.
        runs: the sparse rows, ascending.
    """

    frames: int
    dense: tuple[tuple[int, int], ...]
    shared: tuple[Shared, ...]
    runs: tuple[Run, ...]

    @property
    def sparse_rows(self) -> int:
        """Number of sparse rows."""
        return sum(run.count for run in self.runs)

    def blocks(self, rows: int) -> tuple[Block, ...]:
        """The sparse rows in blocks of about equal size, at most ``rows`` rows each."""
        alike: list[list[Run]] = []
        for run in self.runs:
            single = all(stop - start == 1 for start, stop, _ in run.own)
            if alike and single and alike[-1][0].own == run.own:
                alike[-1].append(run)
            else:
                alike.append([run])
        return tuple(block for runs in alike for block in _cut(runs, rows))

    @property
    def spans(self) -> tuple[tuple[Run, ...], ...]:
        """Runs grouped where their query frames are consecutive."""
        spans: list[list[Run]] = []
        for run in self.runs:
            if spans and spans[-1][-1].first + spans[-1][-1].count == run.first:
                spans[-1].append(run)
            else:
                spans.append([run])
        return tuple(tuple(span) for span in spans)


@lru_cache(maxsize=256)
def decompose(
    intervals: tuple[int, ...], log_weights: tuple[float, ...], frames: int
) -> Decomposition:
    """Cut a mask, given as ``TileMask.segments()``, into dense pieces.

    Raises:
        MaskError: if the segments are not a valid mask of ``frames`` frames.
    """
    rows = TileMask.from_segments(frames, intervals, log_weights).rows
    sparse = [i for i, row in enumerate(rows) if any(value != 0.0 for value in row)]
    if 3 * len(log_weights) != len(intervals):
        raise MaskError(f"expected 3 integers per weight, got {len(intervals)}, {len(log_weights)}")

    columns: dict[tuple[float, ...], list[int]] = {}
    if len(sparse) > 1:
        for j in range(frames):
            column = tuple(rows[i][j] for i in sparse)
            if DROPPED not in column:
                columns.setdefault(column, []).append(j)
    shared_keys = {j for keys in columns.values() for j in keys}
    return Decomposition(
        frames=frames,
        dense=_intervals([i for i in range(frames) if i not in set(sparse)]),
        shared=tuple(
            Shared(keys=_intervals(keys), weights=column) for column, keys in columns.items()
        ),
        runs=_runs(rows, sparse, shared_keys),
    )


def _runs(
    rows: Sequence[Sequence[float]], sparse: Sequence[int], shared: set[int]
) -> tuple[Run, ...]:
    runs: list[Run] = []
    for position, i in enumerate(sparse):
        own = _own_intervals(rows[i], i, shared)
        if runs:
            last = runs[-1]
            if last.own == own and last.first + last.count == i:
                runs[-1] = Run(
                    first=last.first, count=last.count + 1, position=last.position, own=own
                )
                continue
        runs.append(Run(first=i, count=1, position=position, own=own))
    return tuple(runs)


def _cut(runs: Sequence[Run], rows: int) -> list[Block]:
    """Runs with the same own frames, cut into blocks."""
    frames = [run.first + n for run in runs for n in range(run.count)]
    pieces = -(-len(frames) // rows)
    cuts = [n * len(frames) // pieces for n in range(pieces + 1)]
    return [
        Block(
            frames=_intervals(frames[start:stop]),
            position=runs[0].position + start,
            own=runs[0].own,
        )
        for start, stop in itertools.pairwise(cuts)
    ]


def _own_intervals(
    row: Sequence[float], i: int, shared: set[int]
) -> tuple[tuple[int, int, float], ...]:
    own: list[tuple[int, int, float]] = []
    for j, weight in enumerate(row):
        if weight == DROPPED or j in shared:
            continue
        if own and own[-1][1] == j - i and own[-1][2] == weight:
            own[-1] = (own[-1][0], j - i + 1, weight)
        else:
            own.append((j - i, j - i + 1, weight))
    return tuple(own)


def _intervals(frames: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Ascending frame numbers as half-open intervals."""
    intervals: list[tuple[int, int]] = []
    for frame in frames:
        if intervals and intervals[-1][1] == frame:
            intervals[-1] = (intervals[-1][0], frame + 1)
        else:
            intervals.append((frame, frame + 1))
    return tuple(intervals)
