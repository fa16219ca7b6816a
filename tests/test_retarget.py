"""A plan at another size: its densities are those of the new grid, and nothing measured is kept."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evdit_opt.errors import PlanError, PlanMismatchError
from evdit_opt.grid import TokenLayout, VideoGrid
from evdit_opt.masks import MAX_FRAMES
from evdit_opt.plan import Plan, SiteLayout
from evdit_opt.retarget import retarget
from tests.plans import PLAN, plans

GRID = VideoGrid(12, 4, 5)


def test_densities_are_those_of_the_new_grid_and_nothing_measured_is_kept() -> None:
    found = retarget(PLAN, GRID)
    sparse, dense = found.plan.sites
    assert sparse.rule is not None
    assert sparse.density == sparse.rule.density(TokenLayout(GRID)) != PLAN.sites[0].density
    assert sparse.reason == f"{PLAN.sites[0].reason}; measured at 8 x 4 x 5 tokens"
    assert dense == replace(PLAN.sites[1], errors=())
    assert (found.plan.grid, found.plan.calibrated_at) == (GRID, PLAN.grid)
    assert (found.plan.quality, found.plan.speed, found.plan.predicted) == (None, None, None)
    assert found.plan.calibration.trials == ()
    assert found.plan.calibration.held_out_error is None
    assert found.plan.fingerprint() == PLAN.fingerprint()  # it computes the same as before
    assert "extrapolated to 12 x 4 x 5 tokens, where nothing was measured" in found.plan.describe()
    assert "calibrated at 8 x 4 x 5 tokens" in found.plan.describe()


def test_what_is_extrapolated_is_said() -> None:
    told = "\n".join(retarget(PLAN, VideoGrid(16, 4, 5)).extrapolated)
    assert "were measured at 8 x 4 x 5 tokens; at 16 x 4 x 5 they are not known" in told
    assert "8 -> 16 latent frames is far: calibrate there" in told
    assert "mask 2:6 balanced -> 2:14 balanced" in told
    assert "as much text around the video" in told
    assert "renewed at the same noise levels" in told
    assert "tokens a frame" not in told
    told = "\n".join(retarget(PLAN, VideoGrid(2, 4, 5)).extrapolated)
    assert "2:0 balanced, which keeps everything" in told
    assert "1 sites run dense: fewer than 64 tokens" in told
    plain = replace(PLAN, reuse=None, sites=(replace(PLAN.sites[0], layout=SiteLayout()),))
    told = "\n".join(retarget(plain, VideoGrid(8, 8, 5)).extrapolated)
    assert "20 -> 40 tokens a frame is far" in told
    for absent in ("mask", "text", "renewed"):
        assert absent not in told


def test_the_same_grid_changes_nothing() -> None:
    assert retarget(PLAN, PLAN.grid).plan is PLAN
    assert retarget(PLAN, PLAN.grid).extrapolated == ()


def test_there_and_back_is_where_it_was_calibrated() -> None:
    back = retarget(retarget(PLAN, GRID).plan, PLAN.grid)
    assert back.extrapolated == ()
    assert back.plan.calibrated_at is None
    assert [s.density for s in back.plan.sites] == [s.density for s in PLAN.sites]
    assert [s.reason for s in back.plan.sites] == [s.reason for s in PLAN.sites]


def test_twice_is_still_measured_where_it_was_calibrated() -> None:
    once, twice = retarget(PLAN, GRID).plan, VideoGrid(9, 4, 5)
    assert retarget(once, twice).plan == retarget(PLAN, twice).plan


@given(plans, st.builds(VideoGrid, *[st.integers(1, 40)] * 3))
def test_any_plan_can_be_moved_and_saved(plan: Plan, grid: VideoGrid) -> None:
    plan = replace(plan, sites=(replace(plan.sites[0], reason="x" * 1000), *plan.sites[1:]))
    moved = retarget(plan, grid).plan
    assert Plan.from_json(moved.to_json()) == moved
    assert moved.fingerprint() == plan.fingerprint()


def test_a_plan_for_one_size_only_stays_there() -> None:
    given_grid = replace(PLAN.grid_source, kind="given", patch=(8, 4, 5))
    with pytest.raises(PlanMismatchError, match="for clips of 8 x 4 x 5 tokens only"):
        retarget(replace(PLAN, grid_source=given_grid), GRID)


def test_a_grid_too_large_is_refused() -> None:
    with pytest.raises(PlanError, match=r"grid\.frames"):
        retarget(replace(PLAN, sites=PLAN.sites[1:], reuse=None), VideoGrid(MAX_FRAMES + 1, 1, 1))
