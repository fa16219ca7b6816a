"""The kinds of choices that are compared: static masks by weighting, and reuse by schedule."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.head_choice import HeadChoice, reusing_costs
from benchmarks.head_record import HeadErrors, SiteHeads
from evdit_opt import Config
from evdit_opt.calibrate.candidates import candidate_rules
from evdit_opt.masks import Rule, Weighting

__all__ = ["EVERY", "WEIGHTINGS", "Kind", "make_kinds", "static_rules"]

EVERY = (2, 3, 4, 5, 7, 10)
"""Schedules of plans that reuse: a refresh in every so many steps."""

WEIGHTINGS: tuple[Weighting, ...] = ("balanced", "none")


def static_rules(weighting: Weighting, frames: int) -> tuple[Rule, ...]:
    """What a calibration tries, and the own frame only: other heads may look at the others."""
    config = Config(weightings=(weighting,))
    return Rule(0, 0), *candidate_rules(config, frames)


@dataclass(frozen=True)
class Kind:
    """Static rules of one weighting, or rules that reuse under one schedule.

    Attributes:
        rules: candidates; dense attention is one more.
        every: steps from refresh to refresh; None: static.
        costs: of a head under every rule.
        chosen_on: errors per site that rules are chosen by.
        judged_on: errors per site of other prompts.
    """

    rules: tuple[Rule, ...]
    every: int | None
    costs: list[float]
    chosen_on: Mapping[str, HeadErrors]
    judged_on: Mapping[str, HeadErrors]

    def rules_of(self, choice: HeadChoice) -> tuple[Rule | None, ...]:
        """Of every head; None is dense attention."""
        return tuple((*self.rules, None)[index] for index in choice.rules)


def make_kinds(
    reused: Sequence[Rule],
    chosen_on: Mapping[str, SiteHeads],
    judged_on: Mapping[str, SiteHeads],
    steps: int,
) -> dict[str, list[Kind]]:
    """By name; of those that reuse one per schedule."""
    layout = next(iter(chosen_on.values())).layout
    kinds: dict[str, list[Kind]] = {}
    first = 0
    for weighting in WEIGHTINGS:
        rules = static_rules(weighting, layout.grid.frames)
        place = slice(first, first + len(rules))
        first = place.stop
        costs = [*(rule.density(layout) for rule in rules), 1.0]
        chosen, judged = (
            {name: _only(site.static, place) for name, site in sites.items()}
            for sites in (chosen_on, judged_on)
        )
        kinds[f"static, {weighting}"] = [Kind(rules, None, costs, chosen, judged)]
    kept = [rule.density(layout) for rule in reused]
    kinds["reuse"] = [
        Kind(
            tuple(reused),
            every,
            reusing_costs(kept, every, steps),
            {name: site.reuse[every] for name, site in chosen_on.items()},
            {name: site.reuse[every] for name, site in judged_on.items()},
        )
        for every in EVERY
    ]
    return kinds


def _only(errors: HeadErrors, place: slice) -> HeadErrors:
    return HeadErrors(errors.products[:, :, :, place][..., place], errors.scale)
