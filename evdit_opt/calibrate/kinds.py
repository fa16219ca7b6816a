"""The kinds of plan that calibration chooses between, each at any density.

Static masks, per weighting searched site by site or uniform, and reuse of residuals across steps.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from evdit_opt.calibrate.draft import Drafter
from evdit_opt.calibrate.record import Recording
from evdit_opt.calibrate.reuse_search import (
    EARLY,
    STEADY,
    Found,
    Judge,
    Problem,
    cheapest_within,
    search,
    site_options,
)
from evdit_opt.calibrate.search import (
    Choice,
    Errors,
    choose_rules,
    choose_uniform,
    mean_density,
    threshold_for_density,
)
from evdit_opt.config import Config
from evdit_opt.masks import Weighting
from evdit_opt.plan import Plan

__all__ = ["Drafted", "Kind", "Planner"]

CLEARLY_WORSE = 4.0
"""A kind whose predicted damage is this many times the best one's is not run."""

JUDGES = {"early steps first": EARLY, "all steps, steady": STEADY}
"""Views of damage: the best plan that reuses is run for each. The first tells random plans apart
best; among good ones either may win (docs/notes/damage.md)."""


@dataclass(frozen=True)
class Drafted:
    """A plan, and the damage predicted for it."""

    plan: Plan
    damage: float


@dataclass(frozen=True)
class Kind:
    """A way to make a plan of any density.

    Attributes:
        name: for people.
        at: the best plan of this kind with at most a density; None if there is none.
    """

    name: str
    at: Callable[[float], Drafted | None]


@dataclass(frozen=True)
class Planner:
    """Makes plans from what was recorded.

    Attributes:
        drafter: writes them.
        recording: of the dense runs.
        problem: the same, for the search of plans that reuse.
    """

    drafter: Drafter
    recording: Recording
    problem: Problem

    @property
    def config(self) -> Config:
        """Of the calibration."""
        return self.drafter.config

    def density(self) -> float:
        """The density to search at: the config's, or the lowest whose sites keep the threshold."""
        config = self.config
        first = _only(self.recording.errors, config.weightings[0])
        if config.density is not None:
            return config.density
        static = mean_density(choose_rules(first, config.threshold, config.max_distinct_rules))
        found = cheapest_within(self.problem, config.threshold) if self.reuses else None
        return static if found is None else min(static, found.density)

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
            for uniform in (False, True)
        ]
        reusing = [
            Kind(f"reuse, {name}", partial(self._reusing, judge=judge))
            for name, judge in JUDGES.items()
            if self.reuses
        ]
        return [*static, *reusing]

    def worth_trying(self, density: float) -> list[tuple[Kind, Plan]]:
        """A plan per kind, without those that equal another, or are predicted to be far worse."""
        if density >= 1.0:
            return []  # no rule keeps the threshold anywhere
        drafted = [(kind, kind.at(density)) for kind in self.kinds()]
        found = [(kind, own) for kind, own in drafted if own is not None and own.plan.rules]
        least = min((own.damage for _, own in found), default=0.0)
        distinct: dict[str, tuple[Kind, Plan]] = {}
        for kind, own in found:
            if own.damage <= CLEARLY_WORSE * least:
                distinct.setdefault(own.plan.fingerprint(), (kind, own.plan))
        return list(distinct.values())

    def all_dense(self) -> Plan:
        """The plan where no rule is good enough, with what every rule would cost."""
        errors = self.recording.errors
        return self.drafter.draft(dict.fromkeys(errors), errors, self.config.threshold)

    def _static(self, density: float, weighting: Weighting, uniform: bool) -> Drafted:
        limit = self.config.max_distinct_rules
        own = _only(self.recording.errors, weighting)
        threshold = threshold_for_density(own, density, limit)
        choice = choose_uniform(own, density) if uniform else choose_rules(own, threshold, limit)
        return Drafted(self.drafter.draft(choice, own, threshold), self._damage(choice))

    def _reusing(self, density: float, judge: Judge) -> Drafted | None:
        found = search(replace(self.problem, judge=judge), density)
        if not found:
            return None
        plan = self.drafter.draft_reuse(found[0], self.recording.errors, self.recording.levels)
        return Drafted(plan, self._total(found[0]))

    def _total(self, found: Found) -> float:
        """Damage as the problem's own judge sees it, so that kinds can be compared."""
        return sum(
            next(o for o in site_options(self.problem, site, found.refreshes)
                 if (o.rule, o.reuses) == (option.rule, option.reuses)).damage
            for site, option in found.options.items()
        )  # fmt: skip

    def _damage(self, choice: Choice) -> float:
        return sum(
            self.problem.judge.damage(own.output**2, own.temporal**2)
            for own in choice.values()
            if own is not None
        )


def _only(errors: Errors, weighting: Weighting) -> Errors:
    """The candidates of one weighting. Those without references have none to weight, and stay."""
    return {
        site: tuple(c for c in own if c.rule.weighting == weighting or c.rule.references == 0)
        for site, own in errors.items()
    }
