"""Searching plans that reuse: budgets hold, and small problems equal trying everything."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evdit_opt.calibrate.damage import damage_of
from evdit_opt.calibrate.prices import kept_pairs
from evdit_opt.calibrate.problem import Problem
from evdit_opt.calibrate.reuse_search import (
    cheapest_within,
    evenly,
    search,
)
from evdit_opt.calibrate.site_record import CandidateError, ReuseError
from evdit_opt.masks import CACHED, Rule

OWN, ONE, TWO = Rule(0), Rule(1), Rule(2)


def problem(sites: int, steps: int, seed: int, **limits: int) -> Problem:
    """Residuals that drift apart at different speeds, densities as at 10 frames."""
    random = torch.Generator().manual_seed(seed)
    errors, reuse = {}, {}
    for n in range(sites):
        name = f"blocks.{n}.attn1"
        speed = torch.rand(steps, generator=random).double() * 0.1
        position = speed.cumsum(0)
        drift = (position[None] - position[:, None]).square()
        own = float(torch.rand((), generator=random))
        errors[name] = (
            CandidateError(ONE, 0.19, 0.5 * own, own),
            CandidateError(TWO, 0.36, 0.3 * own, 0.6 * own),
        )
        ones = torch.ones(2, steps, dtype=torch.float64)
        reuse[name] = (
            ReuseError(CACHED, 0.0, drift, 2 * drift, ones),
            ReuseError(OWN, 0.1, 0.4 * drift, 0.7 * drift, ones),
        )
    levels = tuple(float(level) for level in torch.linspace(1000, 100, steps))
    defaults = {"max_reusing": sites, "max_rules": 6}
    prices = kept_pairs(errors, reuse)
    return Problem(errors, reuse, levels, prices, **{**defaults, **limits})


@given(
    st.integers(1, 6), st.integers(2, 9), st.integers(0, 999),
    st.floats(0.05, 0.9), st.integers(0, 6), st.integers(1, 3),
)  # fmt: skip
@settings(max_examples=50)
def test_every_limit_holds(sites, steps, seed, density, max_reusing, max_rules):
    given_ = problem(sites, steps, seed, max_reusing=max_reusing, max_rules=max_rules)
    found = search(given_, density)
    assert found == sorted(found, key=lambda one: one.damage)
    for one in found:
        reusing = [option for option in one.options.values() if option.reuses]
        rules = {option.rule for option in one.options.values()} - {None}
        assert 1 <= len(reusing) <= max_reusing
        assert len(rules) <= max_rules
        assert one.price <= density + 1e-9
        lead, refreshes = one.refreshes[0], len(one.refreshes)
        cost = sum(
            (0.0 if option.rule is None else option.cost) for option in one.options.values()
        ) + (steps - lead) * sum(option.rule is None for option in one.options.values())
        assert one.price == pytest.approx((cost + lead * sites) / steps / sites)
        assert all(option.cost >= refreshes for option in reusing)


@given(st.integers(0, 300))
@settings(max_examples=25)
def test_two_sites_and_a_few_steps_come_close_to_trying_everything(seed):
    given_, density = problem(2, 5, seed), 0.45
    best = float("inf")
    for first in range(3):
        for later in product([False, True], repeat=5 - first - 1):
            schedule = [first, *(first + 1 + n for n, one in enumerate(later) if one)]
            latest, at, now = [], [], first
            for step in range(first + 1, 5):
                now = step if step in schedule else now
                if step not in schedule:
                    latest.append(now)
                    at.append(step)
            own = []
            for site in given_.errors:
                span = 5 - first
                options = [(0.0, float(span), False)]
                for c in given_.errors[site]:
                    done = span * damage_of(c.output**2, c.temporal**2)
                    options.append((done, c.density * span, False))
                for c in given_.reuse[site]:
                    done = float(damage_of(c.output, c.temporal)[latest, at].sum())
                    options.append((done, c.density * span + len(schedule), True))
                own.append(options)
            for pair in product(*own):
                if not any(reuses for *_, reuses in pair):
                    continue
                if sum(cost for _, cost, _ in pair) + 2 * first <= density * 5 * 2 + 1e-9:
                    best = min(best, sum(done for done, *_ in pair))
    found = search(given_, density)
    # Alternating finds the best rules of a schedule and the best schedule of rules, seldom less
    # than the best of both.
    assert found[0].damage >= best * (1 - 1e-9)
    assert found[0].damage <= 1.5 * best


def test_a_threshold_bounds_every_site_and_takes_the_cheapest():
    given_ = problem(4, 8, 3)
    tight, loose = (cheapest_within(given_, threshold) for threshold in (0.02, 0.2))
    assert tight is not None
    assert loose is not None
    for one, threshold in ((tight, 0.02), (loose, 0.2)):
        assert all(option.error <= threshold for option in one.options.values())
    assert loose.price < tight.price


@given(st.integers(1, 5), st.integers(2, 12), st.integers(0, 99), st.floats(0.05, 0.95))
@settings(max_examples=30)
def test_even_refreshes_use_one_rule_and_keep_the_budget(sites, steps, seed, budget):
    given_ = problem(sites, steps, seed)
    found = evenly(given_, budget)
    if found is None:
        assert budget * steps < 1  # not even one refresh
        return
    assert found.price <= budget + 1e-9
    assert len({option.rule for option in found.options.values()}) == 1
    gaps = {b - a for a, b in zip(found.refreshes, (*found.refreshes[1:], steps), strict=True)}
    assert max(gaps) - min(gaps) <= 1
    assert found.refreshes[0] == 0


def test_even_refreshes_need_memory_at_every_site():
    assert evenly(problem(4, 8, 3, max_reusing=3), 0.5) is None
