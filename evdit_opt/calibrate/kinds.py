"""The kinds of plan that calibration chooses between, each at any density.

Static masks, per weighting searched site by site or uniform, and reuse of residuals across steps.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial

from evdit_opt.calibrate.damage import damage_of
from evdit_opt.calibrate.draft import Drafter
from evdit_opt.calibrate.fit_strengths import fit_strengths, one_strength
from evdit_opt.calibrate.prices import Prices
from evdit_opt.calibrate.problem import Found, Problem, trend_of
from evdit_opt.calibrate.record import Recording
from evdit_opt.calibrate.residual_memory import residual_bytes
from evdit_opt.calibrate.reuse_search import (
    cheapest_within,
    evenly,
    search,
)
from evdit_opt.calibrate.search import (
    Choice,
    Errors,
    choose_rules,
    choose_uniform,
    mean_price,
    threshold_for_budget,
)
from evdit_opt.calibrate.site_record import HeadErrors
from evdit_opt.calibrate.split_heads import SiteSplits, choose_splits
from evdit_opt.config import Config
from evdit_opt.masks import Weighting
from evdit_opt.plan import Plan

__all__ = ["Drafted", "Kind", "Planner", "unfitted_errors"]

CLEARLY_WORSE = 2.0
"""A kind whose predicted damage is this many times the best one's is not run."""


@dataclass(frozen=True)
class Drafted:
    """A plan, the damage predicted for it, and its mean price per site and step."""

    plan: Plan
    damage: float
    price: float


@dataclass(frozen=True)
class Kind:
    """A way to make a plan for any budget.

    Attributes:
        name: for people.
        at: the best plan of this kind within a budget (mean price per site and step; see
            ``prices.py``); None if there is none.
        splits: whether its plans may give the heads of a site two rules.
    """

    name: str
    at: Callable[[float], Drafted | None]
    splits: bool = False


@dataclass(frozen=True)
class Planner:
    """Makes plans from what was recorded.

    Attributes:
        drafter: writes them.
        recording: of the dense runs.
        problem: the same, for the search of plans that reuse.
        timed: whether prices are measured times. What two calls take in the place of one is not
            measured, so no site is given two rules then.
    """

    drafter: Drafter
    recording: Recording
    problem: Problem
    timed: bool = False

    @property
    def config(self) -> Config:
        """Of the calibration."""
        return self.drafter.config

    def budget_within_threshold(self) -> float:
        """What the cheapest plan costs whose sites all err by at most the config's threshold."""
        config = self.config
        weighting = config.weightings[0]
        # A fitted plan has the masks of a balanced one.
        weighting = "balanced" if weighting == "fitted" else weighting
        first = _only(self.recording.errors, weighting)
        choice = choose_rules(first, self.prices, config.threshold, config.max_distinct_rules)
        static = mean_price(choice, self.prices)
        found = cheapest_within(self.problem, config.threshold) if self.reuses else None
        return static if found is None else min(static, found.price)

    @property
    def prices(self) -> Prices:
        """What everything costs."""
        return self.problem.prices

    @property
    def reuses(self) -> bool:
        """Whether any site can reuse."""
        return self.problem.max_reusing > 0 and any(self.recording.reuse.values())

    def kinds(self) -> list[Kind]:
        """All kinds, the simplest first."""
        static = [
            Kind(
                f"{'uniform' if uniform else 'searched'}, weighting {weighting}",
                partial(self._static, weighting=weighting, uniform=uniform),
            )
            for weighting in self.config.weightings
            if weighting != "fitted"
            for uniform in (False, True)
        ]
        if "fitted" in self.config.weightings:
            static.append(Kind("searched, weighting fitted", self._fitted))
        if self.recording.heads and not self.timed:
            name = f"searched, weighting {self._split_weighting}, two rules"
            static.append(Kind(name, self._split, splits=True))
        even = Kind("reuse, one rule, even refreshes", self._even)
        searched = Kind("reuse, searched", self._reusing)
        return [*static, even, searched] if self.reuses else static

    def worth_trying(self, budget: float) -> list[tuple[Kind, Drafted]]:
        """A plan per kind, without those that equal another, or are predicted to be far worse.

        None is dearer than the budget, unless there is nothing that cheap: then the cheapest.
        """
        if budget >= 1.0:
            return []  # dense attention is affordable everywhere
        drafted = self._sparse(budget)
        found = _within(drafted, budget)
        if not found and self.reuses:
            least = 1.0 / len(self.recording.levels)  # one refresh, then nothing but its outputs
            found = _within(self._sparse(least), least)
        found = found or drafted
        # Damage at single heads is predicted less well: it must not keep other kinds from a run.
        alike = [own.damage for kind, own in found if not kind.splits]
        most = CLEARLY_WORSE * min(alike, default=math.inf)
        distinct: dict[str, tuple[Kind, Drafted]] = {}
        for kind, own in found:
            if own.damage <= most:
                distinct.setdefault(own.plan.fingerprint(), (kind, own))
        return list(distinct.values())

    def _sparse(self, budget: float) -> list[tuple[Kind, Drafted]]:
        """What every kind makes of a budget; static kinds may know nothing that cheap."""
        drafted = [(kind, kind.at(budget)) for kind in self.kinds()]
        return [(kind, own) for kind, own in drafted if own is not None and own.plan.rules]

    def likeliest(self, budget: float) -> Drafted | None:
        """The plan within a budget that is predicted to do the least damage."""
        drafted = [own for _, own in self.worth_trying(budget)]
        return min(drafted, key=lambda own: own.damage, default=None)

    def all_dense(self, budget: float = 0.0) -> Plan:
        """The plan where no rule is good enough, with what every rule would cost.

        Args:
            budget: what might have been spent. 1 and more: dense attention is all that was asked
                for, or that kept the floors.
        """
        errors = self.problem.errors
        plan = self.drafter.draft(dict.fromkeys(errors), errors, self.config.threshold)
        config = self.config
        if not any(errors.values()):
            return plan
        if config.density is not None or config.speedup is not None:
            cheap = budget < 1.0
            reason = "no rule is cheaper here" if cheap else "that is all that was asked for"
            reason = f"dense: {reason}"
        elif config.has_floors:
            reason = "dense: no cheaper plan kept the quality floor"
        else:
            return plan
        return replace(plan, sites=tuple(replace(site, reason=reason) for site in plan.sites))

    def _static(self, budget: float, weighting: Weighting, uniform: bool) -> Drafted:
        limit, prices = self.config.max_distinct_rules, self.prices
        own = _only(self.recording.errors, weighting)
        threshold = threshold_for_budget(own, prices, budget, limit)
        choice = (
            choose_uniform(own, prices, budget)
            if uniform
            else choose_rules(own, prices, threshold, limit)
        )
        plan = self.drafter.draft(choice, own, threshold)
        return Drafted(plan, self._damage(choice), mean_price(choice, prices))

    def _fitted(self, budget: float) -> Drafted:
        limit, errors = self.config.max_distinct_rules, self.recording.errors
        own = _only(errors, "balanced")
        threshold = threshold_for_budget(own, self.prices, budget, limit)
        choice = choose_rules(own, self.prices, threshold, limit)
        choice = fit_strengths(choice, errors, limit)
        plan = self.drafter.draft(choice, one_strength(errors, choice), threshold)
        return Drafted(plan, self._damage(choice), mean_price(choice, self.prices))

    @property
    def _split_weighting(self) -> Weighting:
        return "none" if self.config.weightings == ("none",) else "balanced"

    @cached_property
    def _splits(self) -> Mapping[str, SiteSplits]:
        """What every site may do with one rule or two."""
        weighting, heads = self._split_weighting, self.recording.heads
        return {
            site: SiteSplits(own, _only_heads(heads[site], weighting) if site in heads else None)
            for site, own in _only(self.recording.errors, weighting).items()
        }

    def _split(self, budget: float) -> Drafted | None:
        errors = _only(self.recording.errors, self._split_weighting)
        found = choose_splits(self._splits, budget, self.config.max_distinct_rules)
        if found is None:
            return None
        damage = max(1, len(self.recording.levels)) * sum(own.damage for own in found.values())
        price = sum(own.cost for own in found.values()) / len(found)
        return Drafted(self.drafter.draft_splits(found, errors), damage, price)

    def _reusing(self, budget: float) -> Drafted | None:
        found = search(self.problem, budget)
        return self.drafted(found[0]) if found else None

    def _even(self, budget: float) -> Drafted | None:
        found = evenly(self.problem, budget)
        return self.drafted(found) if found else None

    def drafted(self, found: Found) -> Drafted:
        """What the search of plans that reuse has found, as a plan."""
        recording, problem = self.recording, self.problem
        reusing = [name for name, option in found.options.items() if option.reuses]
        memory = residual_bytes(recording, reusing, problem.precision, problem.trend)
        plan = self.drafter.draft_reuse(
            found,
            problem.errors,
            recording.levels,
            trend_of(problem, found),
            problem.precision,
            memory,
        )
        return Drafted(plan, found.damage, found.price)

    def _damage(self, choice: Choice) -> float:
        steps = max(1, len(self.recording.levels))
        chosen = [own for own in choice.values() if own is not None]
        return steps * sum(damage_of(own.output**2, own.temporal**2) for own in chosen)


def _within(drafted: list[tuple[Kind, Drafted]], budget: float) -> list[tuple[Kind, Drafted]]:
    return [(kind, own) for kind, own in drafted if own.price <= budget * (1 + 1e-6)]


def unfitted_errors(errors: Errors) -> Errors:
    """Without the fitted candidates, which are for plans that never reuse."""
    return {
        site: tuple(c for c in own if c.rule.weighting != "fitted") for site, own in errors.items()
    }


def _only_heads(errors: HeadErrors, weighting: Weighting) -> HeadErrors:
    """As :func:`_only`."""
    kept = [
        n
        for n, rule in enumerate(errors.rules)
        if rule.weighting == weighting or rule.references == 0
    ]
    return HeadErrors(
        tuple(errors.rules[n] for n in kept),
        tuple(errors.densities[n] for n in kept),
        errors.squares[:, kept],
    )


def _only(errors: Errors, weighting: Weighting) -> Errors:
    """The candidates of one weighting. Those without references have none to weight, and stay."""
    return {
        site: tuple(c for c in own if c.rule.weighting == weighting or c.rule.references == 0)
        for site, own in errors.items()
    }
