"""Algorithm 1 on hand-made errors: sparsest under the threshold, density target, few rules."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evdit_opt.calibrate.prices import Prices, RulePrice, kept_pairs
from evdit_opt.calibrate.search import (
    choose_rules,
    choose_uniform,
    mean_price,
    threshold_for_budget,
)
from evdit_opt.calibrate.site_record import CandidateError
from evdit_opt.masks import Rule

FRAMES = 12
RULES = tuple(Rule(references) for references in range(1, 7))


def candidates(errors: list[float]) -> tuple[CandidateError, ...]:
    """One candidate per rule, from sparse to dense."""
    return tuple(
        CandidateError(rule, rule.mask(FRAMES).density, error, error)
        for rule, error in zip(RULES, errors, strict=True)
    )


def mean_density(errors, choice) -> float:
    return mean_price(choice, kept_pairs(errors))


site_errors = st.lists(st.floats(0.0, 1.0), min_size=6, max_size=6).map(candidates)
models = st.dictionaries(
    st.sampled_from([f"blocks.{n}.attn1" for n in range(9)]), site_errors, min_size=1
)


def test_the_sparsest_rule_under_the_threshold_wins():
    errors = {"a": candidates([0.5, 0.3, 0.2, 0.1, 0.05, 0.01])}
    assert choose_rules(errors, kept_pairs(errors), 0.3)["a"].rule == RULES[1]
    assert choose_rules(errors, kept_pairs(errors), 0.29)["a"].rule == RULES[2]


def test_a_site_without_a_good_rule_stays_dense():
    errors = {"a": candidates([0.5] * 6)}
    assert choose_rules(errors, kept_pairs(errors), 0.3) == {"a": None}


@given(models, st.floats(0.0, 1.0), st.integers(1, 6))
def test_every_choice_keeps_the_threshold_and_the_number_of_rules(errors, threshold, limit):
    choice = choose_rules(errors, kept_pairs(errors), threshold, limit)
    chosen = [c for c in choice.values() if c is not None]
    assert list(choice) == list(errors)
    assert all(c.output <= threshold for c in chosen)
    assert len({c.rule for c in chosen}) <= limit


@given(models, st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_a_looser_threshold_is_never_denser(errors, first, second):
    tight, loose = sorted((first, second))
    assert mean_density(errors, choose_rules(errors, kept_pairs(errors), loose)) <= mean_density(
        errors, choose_rules(errors, kept_pairs(errors), tight)
    )


@given(models, st.floats(0.2, 1.0))
def test_threshold_for_budget_reaches_the_budget_with_the_least_error(errors, density):
    threshold = threshold_for_budget(errors, kept_pairs(errors), density)
    reached = mean_density(errors, choose_rules(errors, kept_pairs(errors), threshold))
    sparsest = mean_density(errors, choose_rules(errors, kept_pairs(errors), 1.0))
    assert reached <= density or reached == pytest.approx(sparsest)
    levels = {c.output for site in errors.values() for c in site}
    assert all(
        mean_density(errors, choose_rules(errors, kept_pairs(errors), level)) > density
        for level in levels
        if level < threshold
    )


@given(models, st.floats(0.1, 1.0))
def test_uniform_is_one_rule_within_the_density(errors, density):
    choice = choose_uniform(errors, kept_pairs(errors), density)
    rules = {c.rule if c else None for c in choice.values()}
    assert len(rules) == 1
    assert rules == {None} or mean_density(errors, choice) <= density + 1e-9


def test_prices_decide_not_densities_and_what_is_dearer_than_dense_is_never_taken():
    errors = {"a": candidates([0.3] * 6), "b": candidates([0.3] * 6)}
    slow, fast = RulePrice(1.2, 1.2, 2.2), RulePrice(0.5, 0.5, 1.5)
    rules = {rule: fast if rule == RULES[4] else slow for rule in RULES}
    prices = Prices(dense={"a": 1.0, "b": 1.0}, rules={"a": rules, "b": dict.fromkeys(RULES, slow)})
    choice = choose_rules(errors, prices, 0.5)
    assert choice["a"] is not None
    assert choice["a"].rule == RULES[4]
    assert choice["b"] is None
    assert mean_price(choice, prices) == 0.75
