"""What ours is compared with: masks as their papers draw them, never denser than allowed."""

import pytest

from benchmarks.quote_frontier import PAGE, figure, paired, runs, written
from benchmarks.rivals import RadialRule, output_caching, static_rivals
from evdit_opt.masks import CACHED, DROPPED
from tests.plans import PLAN


def test_radial_decay_halves_the_diagonals_with_every_doubling_of_the_distance() -> None:
    rows = RadialRule(0, 2).mask(17).rows
    kept = [distance for distance in range(17) if rows[16][16 - distance] != DROPPED]
    assert kept == [0, 1, 2, 4, 8, 16]
    assert all(row[0] == 0.0 for row in rows)  # the first frame is a sink


@pytest.mark.parametrize("density", [0.45, 0.6, 0.9])
def test_no_rival_is_denser_than_allowed(density: float) -> None:
    found = dict(static_rivals(PLAN, density))
    assert "uniform references (paper)" in found
    for plan in found.values():
        assert plan.density <= density + 1e-9


def test_output_caching_refreshes_evenly_and_as_often_as_it_may() -> None:
    levels = tuple(float(1000 - 50 * n) for n in range(20))
    plan = output_caching(PLAN, levels, 0.26)
    assert plan is not None
    assert plan.reuse is not None
    assert [levels.index(level) for level in plan.reuse.refresh_at] == [0, 4, 8, 12, 16]
    assert set(plan.rules.values()) == {CACHED}
    assert plan.density == pytest.approx(0.25)
    assert output_caching(PLAN, levels, 0.04) is None


def test_differences_are_taken_clip_by_clip() -> None:
    ours, other = {"psnr_db": [31.0, 41.0, 21.0]}, {"psnr_db": [30.0, 40.0]}
    assert paired(ours, other) == "+1.0 ± 0.0 dB"


def test_the_page_and_its_figures_hold_the_recorded_numbers() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert written(page) == page
    for name, report in runs().items():
        assert PAGE.with_name(f"{name}.svg").read_text(encoding="utf-8") == figure(report)
