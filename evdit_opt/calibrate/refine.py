"""Improve a plan that reuses by true runs: predicted damage does not see how sites interact.

What one site misses, others may make up for or double: with TinyWan, leaving a single site with the
wrong rule costs as much as a fourth of all refreshes, and no error measured at single sites tells
which (docs/notes/damage.md). So the search begins with one rule everywhere, which predictions do
rank well, and tries other rules on groups of neighbouring sites.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

from evdit_opt.calibrate.problem import Found, Problem
from evdit_opt.calibrate.reuse_search import evenly, with_rule

__all__ = ["MOST_RUNS", "refined"]

GROUPS = 6
"""Groups of neighbouring sites whose rules are tried together."""

SWEEPS = 2
"""Times that all groups are gone through: a change may help only after another."""

BETTER = 0.98
"""A change is kept that brings the score to this share of it, or below."""

MOST_RUNS = 2 * (1 + 2 * GROUPS * SWEEPS)
"""Plans that are run at most, in practice less than half as many."""

Score = Callable[[Found], float]


def refined(problem: Problem, budget: float, score: Score) -> tuple[Found, float] | None:
    """The best plan found by changing the rules of groups of sites, and its score.

    It begins with as many even refreshes as the budget allows, and with one fewer, where there is
    more to spend between them.

    Args:
        problem: what is known.
        budget: bound on ``Found.price``.
        score: runs a plan; the less the better. Called at most ``MOST_RUNS`` times.

    Returns:
        None if the budget or the memory allows no such plan.
    """
    most = evenly(problem, budget)
    if most is None:
        return None
    rule = next(iter(most.options.values())).rule
    fewer = evenly(problem, budget, rule, len(most.refreshes) - 1)
    climbed = [_climb(problem, one, budget, score) for one in (most, fewer) if one is not None]
    return min(climbed, key=lambda own: own[1])


def _climb(problem: Problem, start: Found, budget: float, score: Score) -> tuple[Found, float]:
    best, least = start, score(start)
    for _ in range(SWEEPS):
        before = least
        for group in _groups(list(problem.errors)):
            for changed in _changes(problem, best, group, budget):
                value = score(changed)
                if value > BETTER * least:
                    break  # what is dearer is tried only where something cheaper has helped
                best, least = changed, value
        if least == before:
            break
    return best, least


def _changes(problem: Problem, found: Found, group: Sequence[str], budget: float) -> list[Found]:
    """Plans with another rule in a group: the cheapest rule, and the one of least damage."""
    own = found.options[group[0]].rule
    rules = {reused.rule for reused in problem.reuse[group[0]]} - {own}
    plans = [with_rule(problem, found, group, rule) for rule in rules]
    dearer = [
        one
        for one in plans
        if found.price < one.price <= budget + 1e-9
        and len({option.rule for option in one.options.values()}) <= problem.max_rules
    ]
    if not dearer:
        return []
    cheapest = min(dearer, key=lambda one: (one.price, one.damage))
    least = min(dearer, key=lambda one: (one.damage, one.price))
    return [cheapest] if cheapest == least else [cheapest, least]


def _groups(sites: Sequence[str]) -> list[Sequence[str]]:
    """The sites in order, in at most ``GROUPS`` parts of about equal size."""
    count = min(GROUPS, len(sites))
    cuts = [part * len(sites) // count for part in range(count + 1)]
    return [sites[a:b] for a, b in pairwise(cuts)]
