"""The pieces of a mask are the mask: nothing lost, nothing twice."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evdit_opt.errors import MaskError
from evdit_opt.kernels.decomposition import Decomposition, Run, Shared, decompose
from evdit_opt.masks import DROPPED, Rule, TileMask
from tests.kernels.oracle import masks


def rebuild(plan: Decomposition) -> list[list[float]]:
    rows = [[DROPPED] * plan.frames for _ in range(plan.frames)]

    def keep(i: int, j: int, weight: float) -> None:
        assert rows[i][j] == DROPPED, f"tile {(i, j)} is computed twice"
        rows[i][j] = weight

    for start, stop in plan.dense:
        for i in range(start, stop):
            for j in range(plan.frames):
                keep(i, j, 0.0)
    for run in plan.runs:
        for n in range(run.count):
            i = run.first + n
            for shared in plan.shared:
                for start, stop in shared.keys:
                    for j in range(start, stop):
                        keep(i, j, shared.weights[run.position + n])
            for start, stop, weight in run.own:
                for j in range(i + start, i + stop):
                    keep(i, j, weight)
    return rows


@given(st.integers(1, 9).flatmap(masks))
def test_pieces_rebuild_the_mask(mask: TileMask) -> None:
    plan = decompose(*mask.segments(), mask.frames)
    assert tuple(map(tuple, rebuild(plan))) == mask.rows
    assert sum(run.count for span in plan.spans for run in span) == plan.sparse_rows


@pytest.mark.parametrize("frames", range(1, 13))
def test_every_rule_up_to_twelve_frames(frames: int) -> None:
    """Every tile once: what two calls wrote, or none, would show."""
    for references, window, weighting, spacing in itertools.product(
        range(frames + 1), range(frames), ("none", "balanced"), ("paper", "centred")
    ):
        mask = Rule(references, window, weighting, spacing).mask(frames)
        plan = decompose(*mask.segments(), frames)
        assert tuple(map(tuple, rebuild(plan))) == mask.rows
        for rows in (1, 2, frames):
            written = [range(*part) for part in plan.dense]
            written += [range(*part) for block in plan.blocks(rows) for part in block.frames]
            assert sorted(i for part in written for i in part) == [*range(frames)]


@given(st.integers(1, 9).flatmap(masks), st.integers(1, 5))
def test_blocks_are_the_sparse_rows(mask: TileMask, rows: int) -> None:
    plan = decompose(*mask.segments(), mask.frames)
    blocks = plan.blocks(rows)
    frames = [i for block in blocks for start, stop in block.frames for i in range(start, stop)]
    assert frames == [run.first + n for run in plan.runs for n in range(run.count)]
    own = {run.first + n: run.own for run in plan.runs for n in range(run.count)}
    position = 0
    for block in blocks:
        assert 1 <= block.count <= rows
        assert block.position == position
        position += block.count
        for start, stop in block.frames:
            assert all(own[i] == block.own for i in range(start, stop))
        if len(block.frames) > 1:
            assert all(stop - start == 1 for start, stop, _ in block.own)


def test_blocks_of_the_papers_mask_pass_over_its_dense_rows() -> None:
    plan = decompose(*Rule(2).mask(8).segments(), 8)
    assert [block.frames for block in plan.blocks(8)] == [((1, 4), (5, 8))]
    assert [block.frames for block in plan.blocks(4)] == [((1, 4),), ((5, 8),)]
    assert [block.frames for block in plan.blocks(2)] == [((1, 3),), ((3, 4), (5, 6)), ((6, 8),)]


def test_the_papers_mask() -> None:
    plan = decompose(*Rule(2).mask(8).segments(), 8)
    assert plan.dense == ((0, 1), (4, 5))
    assert plan.shared == (Shared(keys=((0, 1), (4, 5)), weights=(0.0,) * 6),)
    assert plan.runs == (
        Run(first=1, count=3, position=0, own=((0, 1, 0.0),)),
        Run(first=5, count=3, position=3, own=((0, 1, 0.0),)),
    )


def test_a_weight_stays_with_the_shared_keys() -> None:
    plan = decompose(*Rule(1, 0, "balanced").mask(4).segments(), 4)
    (shared,) = plan.shared
    assert shared.keys == ((0, 1),)
    assert shared.weights == pytest.approx((math.log(3.0),) * 3)


def test_the_full_mask_is_one_piece() -> None:
    plan = decompose(*TileMask.full(5).segments(), 5)
    assert plan.dense == ((0, 5),)
    assert plan.runs == ()


def test_segments_outside_the_mask_are_an_error() -> None:
    with pytest.raises(MaskError, match="within 2 frames"):
        decompose((0, 0, 3), (0.0,), 2)
