"""A second rule at a site: what a plan that has one is, says, and refuses."""

from dataclasses import replace

import numpy as np
import pytest

from evdit_opt.demo.render import _weight
from evdit_opt.errors import PlanError
from evdit_opt.grid import TokenLayout, VideoGrid
from evdit_opt.guard import expected_errors
from evdit_opt.masks import CACHED, Rule
from evdit_opt.page import plan_page
from evdit_opt.plan import Plan, SecondRule
from evdit_opt.plan_diff import plan_differences
from evdit_opt.retarget import retarget
from evdit_opt.reuse import with_reuse
from evdit_opt.second_rule import mean_density
from tests.plans import PLAN, SPLIT, TEXT

FIRST, OTHER = Rule(2, weighting="balanced"), Rule(0, window=1)
SECOND = SecondRule(rule=OTHER, heads=(0, 2, 3), total=12)


def changed(second: SecondRule | None) -> Plan:
    return replace(SPLIT, sites=(replace(SPLIT.sites[0], second=second), SPLIT.sites[1]))


def test_it_is_written_only_where_there_is_one() -> None:
    assert '"second"' not in TEXT  # so that plans of earlier versions and new ones read alike
    assert SPLIT.to_json().count('"second"') == 1
    assert Plan.from_json(SPLIT.to_json()) == SPLIT
    # Of the plan as it was written before there were second rules.
    assert PLAN.fingerprint() == (
        "eceedfc8d724eb97a43135ba9960d9d93c20296ffbc088c2c3047e1897f3768f"
    )


def test_all_that_it_says_changes_the_numbers() -> None:
    others = [
        changed(None),
        changed(replace(SECOND, heads=(0, 2))),
        changed(replace(SECOND, total=13)),
        changed(replace(SECOND, rule=Rule(0, window=2))),
    ]
    assert len({SPLIT.fingerprint(), *(plan.fingerprint() for plan in others)}) == 5


def test_density_is_the_mean_over_heads() -> None:
    layout = TokenLayout(SPLIT.grid)
    expected = (3 * OTHER.density(layout) + 9 * FIRST.density(layout)) / 12
    assert mean_density(FIRST, SECOND, layout) == pytest.approx(expected, rel=1e-12)
    assert mean_density(FIRST, None, layout) == FIRST.density(layout)


def test_everything_that_shows_a_plan_shows_it() -> None:
    assert SECOND.describe() == "0 references + window 1 for heads 0, 2-3 of 12"
    shown = "2:6 balanced; 0 references + window 1 for heads 0, 2-3 of 12"
    assert shown in SPLIT.describe()
    assert shown in plan_page(SPLIT)
    differences = {one.what: one for one in plan_differences(changed(None), SPLIT)}
    assert set(differences) == {"second rule", "its heads"}
    assert differences["its heads"].new == "0, 2, 3 of 12"
    assert "(0 references + window 1, none, paper)" in differences["second rule"].new
    assert plan_differences(SPLIT, SPLIT) == ()


def test_a_picture_shows_the_mean_over_heads() -> None:
    first, other, both = (
        _weight(site, 8)
        for site in (
            changed(None).sites[0],
            replace(changed(None).sites[0], rule=OTHER),
            SPLIT.sites[0],
        )
    )
    assert np.allclose(both, (9 * first + 3 * other) / 12)
    assert not np.allclose(first, other)


def test_it_goes_along_to_another_size() -> None:
    grid = VideoGrid(16, 4, 5)
    found = retarget(SPLIT, grid)
    assert found.plan.sites[0].second == SECOND
    wanted = mean_density(FIRST, SECOND, TokenLayout(grid))
    assert found.plan.sites[0].density == wanted
    assert any("window 1" in text for text in found.extrapolated)


def test_reuse_takes_one_rule() -> None:
    with pytest.raises(PlanError, match="one rule for all heads at every site that reuses"):
        with_reuse(SPLIT, (1000.0,))
    assert with_reuse(SPLIT, (1000.0,), rule=Rule(0)).second_rules == {}


def test_a_guard_does_not_expect_the_error_of_the_first_rule_alone() -> None:
    with pytest.raises(PlanError, match="knows the error of a site"):
        expected_errors(SPLIT)
    known = replace(SPLIT.sites[0], error=0.25)
    assert expected_errors(replace(SPLIT, sites=(known,))) == {"blocks.0.attn1": 0.25}


@pytest.mark.parametrize(
    ("rule", "second", "message"),
    [
        (None, SECOND, "dense or only reuses"),
        (CACHED, SECOND, "dense or only reuses"),
        (OTHER, SECOND, "differs from the first"),
    ],
    ids=["dense", "cached", "same"],
)
def test_a_site_without_a_first_rule_has_no_second(rule, second, message) -> None:
    with pytest.raises(PlanError, match=message):
        replace(SPLIT.sites[0], rule=rule, second=second, density=1.0)
