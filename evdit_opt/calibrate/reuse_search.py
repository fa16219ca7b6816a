"""Search plans that reuse residuals: which sites, which rule at each, and when to refresh.

Damage is additive over sites and steps (``damage.py``). For a fixed schedule the choice per site is
then separable, and the best one within a budget is found by dynamic programming (``knapsack.py``);
so is the best schedule for fixed rules (``schedule.py``). The two alternate, from two starts, for
every number of refreshes.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from evdit_opt.calibrate.knapsack import within_budget
from evdit_opt.calibrate.problem import Found, Option, Problem, reusing_places, site_options
from evdit_opt.calibrate.schedule import best_refreshes
from evdit_opt.masks import Rule

__all__ = [
    "cheapest_within",
    "evenly",
    "search",
    "with_rule",
]

ROUNDS = 4
"""Alternations of rules and schedule; the second already changes little."""

SMALLER = 1 - 1e-9
"""What damage must shrink by to count."""

REPAIRED = 3
"""Plans whose schedule is improved further."""


Pick = Callable[[Mapping[str, Sequence[Option]]], dict[str, Option] | None]


def search(problem: Problem, budget: float) -> list[Found]:
    """The best plan within a budget for every number of refreshes that leaves room for it.

    Args:
        problem: what is known.
        budget: bound on ``Found.price``.

    Returns:
        Plans with at least one site that reuses, the least damage first.
    """
    steps, sites = len(problem.levels), len(problem.errors)

    def pick(lead: int) -> Pick:
        left = (budget * steps - lead) * sites
        return lambda options: within_budget(options, left)

    found = [
        one
        for lead in range(min(3, steps))
        for refreshes in range(1, steps - lead + 1)
        if refreshes + lead <= budget * steps
        for one in [_alternate(problem, refreshes, lead, pick(lead))]
        if one is not None
    ]
    found.sort(key=lambda one: one.damage)
    found[:REPAIRED] = [_repair(problem, one, pick) for one in found[:REPAIRED]]
    distinct = {(one.refreshes, one.damage): one for one in found}
    return sorted(distinct.values(), key=lambda one: one.damage)


def cheapest_within(problem: Problem, threshold: float) -> Found | None:
    """The cheapest plan all of whose sites err by at most ``threshold`` (``Option.error``)."""
    found = [
        one
        for refreshes in range(1, len(problem.levels) + 1)
        for one in [_alternate(problem, refreshes, 0, lambda o: _within_threshold(o, threshold))]
        if one is not None
    ]
    return min(found, key=lambda one: (one.price, one.damage), default=None)


def evenly(
    problem: Problem, budget: float, only: Rule | None = None, refreshes: int | None = None
) -> Found | None:
    """One rule at every site and evenly spaced refreshes.

    What one would set by hand, output caching (``CACHED``) included: a search has to beat it.

    Args:
        problem: what is known.
        budget: bound on ``Found.price``.
        only: the rule; None: the one of the least damage.
        refreshes: how many; None: as many as the budget allows.

    Returns:
        None if the budget or the memory allows no such plan.
    """
    steps, sites = len(problem.levels), list(problem.errors)
    if len(sites) > problem.max_reusing or not all(problem.reuse[site] for site in sites):
        return None
    found = []
    for rule in {own.rule: None for own in problem.reuse[sites[0]]} if only is None else (only,):
        prices = [problem.prices.rules[site].get(rule) for site in sites]
        reused = sum(price.reused for price in prices if price) / len(sites)
        refresh = sum(price.refresh for price in prices if price) / len(sites)
        most = math.floor((budget - reused) * steps / max(refresh - reused, 1e-9) + 1e-9)
        count = min(most, steps) if refreshes is None else refreshes
        if None not in prices and 1 <= count <= most:
            schedule = tuple(sorted({n * steps // count for n in range(count)}))
            found.append(_found(problem, schedule, dict.fromkeys(sites, rule)))
    return min(found, key=lambda one: one.damage, default=None)


def with_rule(problem: Problem, found: Found, sites: Sequence[str], rule: Rule) -> Found:
    """The plan with another rule, between refreshes, at some sites that reuse."""
    rules = {site: option.rule for site, option in found.options.items() if option.rule}
    return _found(problem, found.refreshes, rules | dict.fromkeys(sites, rule))


def _found(problem: Problem, schedule: tuple[int, ...], rules: Mapping[str, Rule]) -> Found:
    """A plan in which every site reuses, with a given rule."""
    choice = {
        site: next(
            option
            for option in site_options(problem, site, schedule)
            if option.reuses and option.rule == rule
        )
        for site, rule in rules.items()
    }
    return _sum(problem, schedule, choice)


def _sum(problem: Problem, schedule: tuple[int, ...], choice: Mapping[str, Option]) -> Found:
    lead, steps = schedule[0], len(problem.levels)
    total = sum(option.damage for option in choice.values())
    cost = sum(option.cost + lead * problem.prices.dense[s] for s, option in choice.items())
    return Found(choice, schedule, total, cost / steps / len(choice))


def _alternate(problem: Problem, refreshes: int, lead: int, pick: Pick) -> Found | None:
    """Rules for a schedule, the best schedule for the rules, and again."""
    steps = len(problem.levels)
    span = steps - lead
    uniform = tuple(sorted({lead + n * span // refreshes for n in range(refreshes)}))
    drifting, _ = best_refreshes(_mean_drift(problem), refreshes, lead)
    best: Found | None = None
    for start in sorted({uniform, drifting}):
        schedule, latest = start, None
        for _ in range(ROUNDS):
            found = _at_schedule(problem, schedule, pick)
            if found is None or (latest is not None and found.damage >= latest.damage * SMALLER):
                break
            latest = found
            schedule, _ = best_refreshes(_total(problem, found), refreshes, lead)
        if latest is not None and (best is None or latest.damage < best.damage):
            best = latest
    return best


def _repair(problem: Problem, found: Found, pick: Callable[[int], Pick]) -> Found:
    """Move, add or leave out single refreshes as long as that helps; the rules are chosen anew."""
    while True:
        near = [
            _at_schedule(problem, schedule, pick(schedule[0]))
            for schedule in _neighbours(found.refreshes, len(problem.levels))
        ]
        better = min((one for one in near if one is not None), key=lambda one: one.damage)
        if better.damage >= found.damage * SMALLER:
            return found
        found = better


def _neighbours(schedule: tuple[int, ...], steps: int) -> list[tuple[int, ...]]:
    """Schedules that differ in one refresh, and the schedule itself."""
    near = {schedule}
    for place, step in enumerate(schedule):
        others = schedule[:place] + schedule[place + 1 :]
        near |= {tuple(sorted({*others, moved})) for moved in (step - 1, step + 1)}
        near |= {others}
    near |= {tuple(sorted({*schedule, step})) for step in range(steps)}
    return sorted(one for one in near if one and one[0] >= 0 and one[-1] < steps)


def _at_schedule(problem: Problem, schedule: tuple[int, ...], pick: Pick) -> Found | None:
    """The best rules for a schedule; None if none fits, or none reuses."""
    choice = _choose(problem, schedule, pick)
    if choice is None or not any(option.reuses for option in choice.values()):
        return None
    return _sum(problem, schedule, choice)


def _choose(problem: Problem, schedule: tuple[int, ...], pick: Pick) -> dict[str, Option] | None:
    """An option per site for a schedule, with few enough rules and residuals."""
    options = {site: site_options(problem, site, schedule) for site in problem.errors}
    choice = pick(options)
    while choice is not None:
        narrowed = _few_rules(options, choice, problem.max_rules) or _few_residuals(
            options, choice, problem.max_reusing
        )
        if narrowed is None:
            break
        options = narrowed
        choice = pick(options)
    return choice


def _mean_drift(problem: Problem) -> Tensor:
    """Damage of step t with the residuals of steps b and s, all rules alike, summed over sites."""
    return torch.stack([problem.damage_under(site, None) for site in problem.drift]).sum(0)


def _total(problem: Problem, found: Found) -> Tensor:
    """Damage of step t with the residuals of steps b and s, summed over all sites that reuse."""
    under = [problem.damage_under(site, place) for site, place in reusing_places(problem, found)]
    return torch.stack(under).sum(0)


def _within_threshold(
    options: Mapping[str, Sequence[Option]], threshold: float
) -> dict[str, Option] | None:
    return {
        site: min((o for o in own if o.error <= threshold), key=lambda o: (o.cost, o.damage))
        for site, own in options.items()
    }


def _few_rules(
    options: Mapping[str, Sequence[Option]], choice: Mapping[str, Option], limit: int
) -> dict[str, list[Option]] | None:
    """Without the least used rule, where there are too many; None if there are not."""
    used = Counter(option.rule for option in choice.values() if option.rule is not None)
    if len(used) <= limit:
        return None
    keep = {rule for rule, _ in used.most_common(limit)}
    return {
        site: [option for option in own if option.rule is None or option.rule in keep]
        for site, own in options.items()
    }


def _few_residuals(
    options: Mapping[str, Sequence[Option]], choice: Mapping[str, Option], limit: int
) -> dict[str, list[Option]] | None:
    """Without reuse at the sites that gain least by it, where too many reuse."""
    reusing = [site for site, option in choice.items() if option.reuses]
    if len(reusing) <= limit:
        return None

    def gained(site: str) -> float:
        others = [option for option in options[site] if not option.reuses]
        like = [option for option in others if option.cost <= choice[site].cost + 1e-9]
        return min(option.damage for option in like or others) - choice[site].damage

    keep = set(sorted(reusing, key=gained, reverse=True)[:limit])
    return {
        site: [option for option in own if not option.reuses or site in keep]
        for site, own in options.items()
    }
