"""Refining by true runs: what predictions cannot see is found, and every limit holds."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evdit_opt.calibrate.problem import Found
from evdit_opt.calibrate.refine import GROUPS, SWEEPS, refined
from evdit_opt.calibrate.reuse_search import evenly
from evdit_opt.masks import CACHED
from tests.calibrate.test_reuse_search import OWN, problem


def truth(found: Found) -> float:
    """As predicted, but the fourth site matters far more than its errors tell."""
    own = found.options["blocks.3.attn1"]
    return found.damage + (100.0 if own.rule == CACHED else 0.0)


def test_the_site_that_matters_is_found() -> None:
    given_ = problem(8, 10, 0)
    found = refined(given_, 0.19, truth)
    assert found is not None
    best, score = found
    assert best.options["blocks.3.attn1"].rule == OWN
    assert score == truth(best) < 100.0
    start = evenly(given_, 0.19)
    assert start is not None
    assert truth(start) > 100.0


@given(
    st.integers(1, 9), st.integers(3, 12), st.integers(0, 99), st.floats(0.1, 0.9),
    st.integers(1, 3),
)  # fmt: skip
@settings(max_examples=30)
def test_it_keeps_the_limits_and_is_never_worse_than_where_it_began(
    sites: int, steps: int, seed: int, budget: float, max_rules: int
) -> None:
    given_, scores = problem(sites, steps, seed, max_rules=max_rules), []

    def score(found: Found) -> float:
        assert found.price <= budget + 1e-9
        assert len({option.rule for option in found.options.values()}) <= max_rules
        scores.append(found.damage)
        return found.damage

    found = refined(given_, budget, score)
    assert len(scores) <= 2 * (1 + 2 * GROUPS * SWEEPS)
    if found is not None:
        start = evenly(given_, budget)
        assert start is not None
        assert found[1] <= start.damage
        assert found[1] == min(scores) or found[1] <= min(scores) / 0.98


def test_without_memory_for_all_sites_there_is_nothing_to_refine() -> None:
    assert refined(problem(4, 8, 1, max_reusing=3), 0.5, truth) is None


def test_a_change_must_help_clearly() -> None:
    found = refined(problem(6, 10, 0), 0.5, lambda _: 1.0)
    assert found is not None
    assert len({option.rule for option in found[0].options.values()}) == 1
    assert found[1] == pytest.approx(1.0)
