"""What the search of plans that reuse knows, and what a site may do: costs and damages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from evdit_opt.calibrate.damage import damage_of
from evdit_opt.calibrate.prices import Prices
from evdit_opt.calibrate.site_record import CandidateError, ReuseError
from evdit_opt.calibrate.trend import Drift, drift_of, fit_ahead
from evdit_opt.kernels.residual import Precision
from evdit_opt.masks import Rule
from evdit_opt.plan_records import MAX_DAMPING, TrendPoint

__all__ = ["Found", "Option", "Problem", "reusing_places", "site_options", "trend_of"]


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
        max_reusing: sites whose residuals fit the memory budget.
        max_rules: different rules a plan may hold.
        trend: whether residuals are carried on the way they were going (see ``trend.py``).
        precision: in which residuals are kept.
    """

    errors: Mapping[str, Sequence[CandidateError]]
    reuse: Mapping[str, Sequence[ReuseError]]
    levels: Sequence[float]
    prices: Prices
    max_reusing: int
    max_rules: int = 6
    trend: bool = False
    precision: Precision = "model"

    @cached_property
    def drift(self) -> Mapping[str, Drift]:
        """How the residuals of the sites that may reuse move, under all of their rules."""
        return {site: drift_of(own) for site, own in self.reuse.items() if own}

    @cached_property
    def ahead(self) -> Tensor:
        """``[steps, steps, steps]``: how far ahead step t looks, for all sites and rules at once.

        At [b, s, t], with refreshes at b and s; 0 without a trend.
        """
        if not self.trend:
            return torch.zeros((len(self.levels),) * 3, dtype=torch.float64)
        mean = [Drift(own.squares.mean(1, keepdim=True), own.scales) for own in self.drift.values()]
        return fit_ahead(mean, *_every(len(self.levels)))

    def errors_at(self, site: str, schedule: Sequence[int]) -> Tensor:
        """Squared relative errors ``[2, rules, reusing steps]`` at a site under a schedule."""
        before, since, at = _pairs(schedule, len(self.levels))
        return self.drift[site].error(before, since, at, self.ahead[before, since, at])

    @cached_property
    def _damages(self) -> dict[tuple[str, int | None], Tensor]:
        """What :meth:`damage_under` has worked out."""
        return {}

    def damage_under(self, site: str, place: int | None) -> Tensor:
        """Damage ``[steps, steps, steps]`` at a site under one of its rules; None: under all."""
        known = self._damages
        if (site, place) not in known:
            own = self.drift[site]
            some = Drift(own.squares.mean(1, keepdim=True), own.scales)
            some = some if place is None else own.only([place])
            error = some.error(*_every(len(self.levels)), self.ahead)
            known[site, place] = damage_of(error[0], error[1])[0].float()
        return known[site, place]


def _every(steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """All triples of steps, to be broadcast."""
    step = torch.arange(steps)
    return step[:, None, None], step[None, :, None], step[None, None, :]


def _pairs(schedule: Sequence[int], steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """The refresh before the last, the last refresh, and the step, of all reusing steps."""
    befores = (schedule[0], *schedule[:-1])
    ends = (*schedule[1:], steps)
    found = [
        (before, since, at)
        for before, since, end in zip(befores, schedule, ends, strict=True)
        for at in range(since + 1, end)
    ]
    before, since, at = torch.tensor(found, dtype=torch.long).reshape(-1, 3).unbind(1)
    return before, since, at


def site_options(problem: Problem, site: str, schedule: tuple[int, ...]) -> list[Option]:
    """Everything a site may do under a schedule; to stay dense comes first."""
    steps, lead = len(problem.levels), schedule[0]
    span = steps - lead
    dense, prices = problem.prices.dense[site], problem.prices.rules[site]
    options = [Option(None, False, 0.0, dense * span, 0.0)]
    for own in problem.errors[site]:
        damage = span * damage_of(own.output**2, own.temporal**2)
        options.append(Option(own.rule, False, damage, prices[own.rule].sparse * span, own.output))
    if problem.reuse[site]:
        found = problem.errors_at(site, schedule)
        damages = damage_of(found[0], found[1]).sum(1).tolist()
        errors = (found[0].sum(1) / steps).sqrt().tolist()
        for reused, damage, error in zip(problem.reuse[site], damages, errors, strict=True):
            price = prices[reused.rule]
            cost = price.reused * found.shape[2] + price.refresh * len(schedule)
            options.append(Option(reused.rule, True, damage, cost, error))
    return options


def trend_of(problem: Problem, found: Found) -> tuple[TrendPoint, ...]:
    """How far residuals are carried on, fitted to a plan's sites, rules and schedule.

    Returns:
        A point for every step that reuses and has two refreshes before it; none if the problem has
        no trend.
    """
    if not problem.trend:
        return ()
    before, since, at = _pairs(found.refreshes, len(problem.levels))
    drifts = [problem.drift[site].only([place]) for site, place in reusing_places(problem, found)]
    fitted = fit_ahead(drifts, before, since, at).tolist()
    points = []
    for b, s, t, ahead in zip(before.tolist(), since.tolist(), at.tolist(), fitted, strict=True):
        if b < s:
            then, last, now = (problem.levels[step] for step in (b, s, t))
            damping = min(ahead * (then - last) / (last - now), MAX_DAMPING)
            points.append(TrendPoint(level=now, damping=damping))
    return tuple(points)


def reusing_places(problem: Problem, found: Found) -> list[tuple[str, int]]:
    """The sites that reuse, with the places of their rules among those recorded."""
    return [
        (site, [own.rule for own in problem.reuse[site]].index(option.rule))
        for site, option in found.options.items()
        if option.reuses and option.rule is not None
    ]
