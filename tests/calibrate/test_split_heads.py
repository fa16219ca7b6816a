"""Two rules at a site: the choice, against all choices there are."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evdit_opt.calibrate.damage import damage_of
from evdit_opt.calibrate.knapsack import BINS
from evdit_opt.calibrate.site_record import CandidateError, HeadErrors
from evdit_opt.calibrate.split_heads import SiteSplits, Split, choose_splits
from evdit_opt.masks import Rule

RULES = (Rule(0, 0), Rule(0, 1), Rule(1), Rule(2))
DENSITIES = (0.125, 0.25, 0.25, 0.5)
HEADS = 4


def site(squares: torch.Tensor, rules: int = len(RULES)) -> SiteSplits:
    """A site of which ``[heads, rules, 2]`` squared errors are known; rule 0 is for heads only."""
    sums = squares.sum(0).sqrt().tolist()
    candidates = [
        CandidateError(RULES[n], DENSITIES[n], *sums[n]) for n in range(1, squares.shape[1])
    ]
    return SiteSplits(candidates, HeadErrors(RULES[:rules], DENSITIES[:rules], squares))


def assignments(heads: int) -> list[tuple[int | None, ...]]:
    """All rules of all heads of at most two kinds: dense throughout, or rules; not rule 0 alone."""
    found = [
        own
        for own in itertools.product(range(len(RULES)), repeat=heads)
        if len(set(own)) <= 2 and set(own) != {0}
    ]
    return [(None,) * heads, *found]


def of(squares: torch.Tensor, own: tuple[int | None, ...]) -> tuple[float, float]:
    """Cost and damage of an assignment."""
    if own[0] is None:
        return 1.0, 0.0
    output, temporal = sum(squares[head, rule] for head, rule in enumerate(own)).tolist()
    return sum(DENSITIES[rule] for rule in own) / len(own), damage_of(output, temporal)


def taken(split: Split) -> tuple[int | None, ...]:
    """The rule of every head."""
    if split.rule is None:
        return (None,) * HEADS
    heads = () if split.second is None else split.second.heads
    other = None if split.second is None else RULES.index(split.second.rule)
    return tuple(other if head in heads else RULES.index(split.rule) for head in range(HEADS))


numbers = st.integers(0, 2**16).map(
    lambda seed: torch.rand(
        2, HEADS, len(RULES), 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
)


@settings(max_examples=30, deadline=None)
@given(numbers, st.floats(0.15, 1.0))
def test_no_other_choice_does_less_damage_within_the_budget(
    squares: torch.Tensor, budget: float
) -> None:
    found = choose_splits({"a": site(squares[0]), "b": site(squares[1])}, budget, 6)
    every = [[of(own, one) for one in assignments(HEADS)] for own in squares]

    def best(limit: float) -> float:
        return min(
            (a[1] + b[1] for a in every[0] for b in every[1] if a[0] + b[0] <= limit),
            default=math.inf,
        )

    if found is None:
        assert best(2 * budget * (1 - 2 / BINS)) == math.inf
        return
    assert sum(own.cost for own in found.values()) <= 2 * budget * (1 + 1e-9)
    for name, own in zip("ab", squares, strict=True):
        expected = of(own, taken(found[name]))
        assert (found[name].cost, found[name].damage) == pytest.approx(expected, rel=1e-9)
    damage = sum(own.damage for own in found.values())
    # The knapsack rounds the cost of either site up to a bin.
    assert best(2 * budget * (1 + 1e-9)) - 1e-9 <= damage
    assert damage <= best(2 * budget * (1 - 2 / BINS)) + 1e-9


def test_heads_that_look_elsewhere_get_the_other_rule() -> None:
    squares = torch.full((HEADS, len(RULES), 2), 0.1, dtype=torch.float64)
    squares[[0, 2], 1] = 0.0  # two heads see their neighbours only
    squares[[1, 3], 2] = 0.0  # the others one frame only
    found = choose_splits({"a": site(squares)}, 0.25, 6)
    assert found is not None
    assert found["a"].damage == 0.0
    assert taken(found["a"]) == (1, 2, 1, 2)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 4), st.floats(0.2, 0.6))
def test_a_plan_holds_no_more_ways_than_it_may(seed: int, limit: int, budget: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (8, HEADS, len(RULES), 2)
    squares = torch.rand(shape, generator=generator, dtype=torch.float64)
    sites = {str(n): site(own) for n, own in enumerate(squares)}
    free = choose_splits(sites, budget, 99)
    found = choose_splits(sites, budget, limit)
    assert free is not None
    assert found is not None
    ways = {own.signature for own in found.values()} - {None}
    assert len(ways) <= limit
    assert ways <= {own.signature for own in free.values()}
    assert sum(own.cost for own in found.values()) <= len(sites) * budget * (1 + 1e-9)
    for name, own in found.items():
        expected = of(squares[int(name)], taken(own))
        assert (own.cost, own.damage) == pytest.approx(expected, rel=1e-9)


def test_the_way_that_is_given_up_is_the_one_whose_sites_lose_least() -> None:
    right, wrong = 0.0, 1.0

    def wants(heads: tuple[int, ...], otherwise: float) -> torch.Tensor:
        own = torch.full((HEADS, len(RULES), 2), wrong, dtype=torch.float64)
        for head in range(HEADS):
            own[head, 1], own[head, 2] = (right, otherwise) if head in heads else (otherwise, right)
        return own

    sites = {"a": site(wants((0,), 0.9)), "b": site(wants((1,), 0.01)), "c": site(wants((2,), 0.9))}
    found = choose_splits(sites, 0.25, 2)
    assert found is not None
    assert [found[name].damage for name in "ac"] == [0.0, 0.0]
    assert 0.0 < found["b"].damage < 0.2


def test_sites_that_cannot_be_split_take_one_rule() -> None:
    squares = torch.rand(HEADS, len(RULES), 2, generator=torch.Generator().manual_seed(1)).double()
    whole = SiteSplits(site(squares).candidates, None)
    found = choose_splits({"a": site(squares), "b": whole}, 0.3, 6)
    assert found is not None
    assert found["b"].second is None
    assert choose_splits({"b": whole}, 0.2, 6) is None
    dense = choose_splits({"b": SiteSplits((), None)}, 1.0, 6)
    assert dense is not None
    assert dense["b"].rule is None
