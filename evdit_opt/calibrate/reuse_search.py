"""Search plans that reuse residuals: which sites, which rule at each, and when to refresh.

Damage is additive over sites, all alike, and over steps, which weigh as a :class:`Judge` says. How
well that ranks plans, and what did not help, is in docs/notes/damage.md. For a fixed schedule the
choice per site is then separable, and the best one within a budget is found by dynamic programming;
so is the best schedule for fixed rules (``schedule.py``). The two alternate, from two starts, for
every number of refreshes.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from evdit_opt.calibrate.knapsack import within_budget
from evdit_opt.calibrate.prices import Prices
from evdit_opt.calibrate.schedule import best_refreshes
from evdit_opt.calibrate.site_record import CandidateError, ReuseError
from evdit_opt.masks import Rule

__all__ = [
    "EARLY",
    "STEADY",
    "Found",
    "Judge",
    "Option",
    "Problem",
    "cheapest_within",
    "evenly",
    "search",
    "site_options",
]

ROUNDS = 4
"""Alternations of rules and schedule; the second already changes little."""

SMALLER = 1 - 1e-9
"""What damage must shrink by to count."""

REPAIRED = 3
"""Plans whose schedule is improved further."""


@dataclass(frozen=True)
class Judge:
    """How errors of sites and steps add up to damage.

    Attributes:
        steps: what an error in a step counts: "noise", as the square of its noise level, because
            what goes wrong early is carried on; "change", as far as the step moves that level.
        temporal: what the squared error from frame to frame counts beside that of the output. It is
            relative to changes that are small, so it is the larger number.
    """

    steps: Literal["noise", "change"]
    temporal: float

    def weights(self, levels: Sequence[float]) -> Tensor:
        """What an error in every step counts, as shares of the run: ``[steps]``, float64."""
        noise = torch.tensor([*levels, 0.0], dtype=torch.float64)
        counts = noise[:-1].square() if self.steps == "noise" else noise[:-1] - noise[1:]
        return counts / counts.sum()

    def damage(self, output: Any, temporal: Any) -> Any:
        """Damage by squared relative errors of a site's output, and of its change in time."""
        return output + self.temporal * temporal


EARLY = Judge("noise", 0.1)
"""Ranks plans of very different quality best."""

STEADY = Judge("change", 1.0)
"""Keeps refreshes for the late steps, which make detail, and minds flicker."""


@dataclass(frozen=True)
class Option:
    """What a site may do.

    Attributes:
        rule: its rule; None: it stays dense.
        reuses: whether it reuses its residual.
        damage: predicted, over a whole run.
        cost: price, summed over the steps of a run from the first refresh on.
        error: root mean square over the run of the relative error of the site's output.
    """

    rule: Rule | None
    reuses: bool
    damage: float
    cost: float
    error: float


@dataclass(frozen=True)
class Found:
    """A choice for every site.

    Attributes:
        options: per site.
        refreshes: steps that refresh, ascending; steps before the first are dense.
        damage: predicted.
        price: mean over sites and steps.
    """

    options: Mapping[str, Option]
    refreshes: tuple[int, ...]
    damage: float
    price: float


@dataclass(frozen=True)
class Problem:
    """What calibration knows when it searches.

    Attributes:
        errors: per site, of the rules that are applied in every step.
        reuse: per site, of the rules that reuse; empty where that is impossible.
        levels: noise levels of the steps, descending.
        prices: what everything costs.
        judge: what counts as damage.
        max_reusing: sites whose residuals fit the memory budget.
        max_rules: different rules a plan may hold.
    """

    errors: Mapping[str, Sequence[CandidateError]]
    reuse: Mapping[str, Sequence[ReuseError]]
    levels: Sequence[float]
    prices: Prices
    max_reusing: int
    max_rules: int = 6
    judge: Judge = EARLY


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


def evenly(problem: Problem, budget: float) -> Found | None:
    """One rule at every site, as many evenly spaced refreshes as the budget allows.

    What one would set by hand, output caching (``CACHED``) included: a search has to beat it.
    """
    steps, sites = len(problem.levels), list(problem.errors)
    if len(sites) > problem.max_reusing or not all(problem.reuse[site] for site in sites):
        return None
    found = []
    for rule in {own.rule: None for own in problem.reuse[sites[0]]}:
        prices = [problem.prices.rules[site].get(rule) for site in sites]
        reused = sum(price.reused for price in prices if price) / len(sites)
        refresh = sum(price.refresh for price in prices if price) / len(sites)
        count = math.floor((budget - reused) * steps / max(refresh - reused, 1e-9) + 1e-9)
        if None in prices or not 1 <= count <= steps:
            continue
        schedule = tuple(sorted({n * steps // count for n in range(count)}))

        def pick(options: Mapping[str, Sequence[Option]], rule: Rule = rule) -> dict[str, Option]:
            return {
                site: next(o for o in own if o.rule == rule and o.reuses)
                for site, own in options.items()
            }

        one = _at_schedule(problem, schedule, pick)
        found += [one] if one is not None else []
    return min(found, key=lambda one: one.damage, default=None)


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
            schedule, _ = best_refreshes(_total(problem, found.options), refreshes, lead)
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
    lead, steps = schedule[0], len(problem.levels)
    choice = _choose(problem, schedule, pick)
    if choice is None or not any(option.reuses for option in choice.values()):
        return None
    total = sum(option.damage for option in choice.values())
    cost = sum(option.cost + lead * problem.prices.dense[s] for s, option in choice.items())
    return Found(choice, schedule, total, cost / steps / len(choice))


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


def site_options(problem: Problem, site: str, schedule: tuple[int, ...]) -> list[Option]:
    """Everything a site may do under a schedule; to stay dense comes first."""
    steps, lead = len(problem.levels), schedule[0]
    span = steps - lead
    weights = problem.judge.weights(problem.levels)
    dense, prices = problem.prices.dense[site], problem.prices.rules[site]
    options = [Option(None, False, 0.0, dense * span, 0.0)]
    for own in problem.errors[site]:
        moved = float(weights[lead:].sum())
        done = moved * problem.judge.damage(own.output**2, own.temporal**2)
        cost = prices[own.rule].sparse * span
        options.append(Option(own.rule, False, done, cost, own.output))
    latest, at = _reused(schedule, steps)
    for reused in problem.reuse[site]:
        output = float((weights[at] * reused.output[latest, at]).sum())
        temporal = float((weights[at] * reused.temporal[latest, at]).sum())
        price = prices[reused.rule]
        cost = price.reused * len(at) + price.refresh * len(schedule)
        options.append(
            Option(reused.rule, True, problem.judge.damage(output, temporal), cost, output**0.5)
        )
    return options


def _reused(schedule: tuple[int, ...], steps: int) -> tuple[list[int], list[int]]:
    """For every step that reuses: the step of its residual, and the step."""
    pairs = []
    for start, stop in zip(schedule, (*schedule[1:], steps), strict=True):
        pairs += [(start, step) for step in range(start + 1, stop)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _mean_drift(problem: Problem) -> Tensor:
    """Damage of step t with the residuals of step s, mean over rules, summed over sites."""
    weights = problem.judge.weights(problem.levels)
    total = torch.zeros(len(weights), len(weights), dtype=torch.float64)
    for reused in problem.reuse.values():
        for own in reused:
            total += problem.judge.damage(own.output, own.temporal) * weights / len(reused)
    return total


def _total(problem: Problem, choice: Mapping[str, Option]) -> Tensor:
    """Damage of step t with the residuals of step s, ``[steps, steps]``, over all sites."""
    weights = problem.judge.weights(problem.levels)
    total = torch.zeros(len(weights), len(weights), dtype=torch.float64)
    for site, option in choice.items():
        if option.reuses:
            own = next(one for one in problem.reuse[site] if one.rule == option.rule)
            total += problem.judge.damage(own.output, own.temporal) * weights
    return total


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
