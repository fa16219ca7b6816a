"""One rule or two at every site: which pair, and which heads take which.

Squared errors of heads add up, so the best split of a pair of rules is known for any number of
heads that take the dearer one: those that gain most by it. All pairs and all numbers are tried,
which leaves a knapsack over sites. docs/notes/head_groups.md has what that gains.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from evdit_opt.calibrate.damage import damage_of
from evdit_opt.calibrate.knapsack import within_budget
from evdit_opt.calibrate.site_record import CandidateError, HeadErrors
from evdit_opt.masks import Rule
from evdit_opt.second_rule import SecondRule

__all__ = ["SiteSplits", "Split", "choose_splits"]

Signature = tuple[Rule, SecondRule | None]


@dataclass(frozen=True)
class Split:
    """What a site may do.

    Attributes:
        rule: of all heads, or of those that are not in ``second``; None: dense.
        second: the rule of the other heads.
        cost: kept share of token pairs, mean over heads.
        output: relative error of the site's output.
        temporal: the same for its change from frame to frame.
    """

    rule: Rule | None
    second: SecondRule | None
    cost: float
    output: float
    temporal: float

    @property
    def damage(self) -> float:
        """Predicted, of one step."""
        return float(damage_of(self.output**2, self.temporal**2))

    @property
    def signature(self) -> Signature | None:
        """What a compiled graph is made for; None: dense."""
        return None if self.rule is None else (self.rule, self.second)


@dataclass(frozen=True)
class SiteSplits:
    """All that one site may do.

    Attributes:
        candidates: rules for all of its heads.
        heads: what rules cost at single heads; None: its heads cannot be split.
    """

    candidates: Sequence[CandidateError]
    heads: HeadErrors | None

    @cached_property
    def options(self) -> list[Split]:
        """To stay dense, every rule for all heads, and the splits that no other split beats."""
        dense = Split(None, None, 1.0, 0.0, 0.0)
        alike = [Split(c.rule, None, c.density, c.output, c.temporal) for c in self.candidates]
        return [dense, *alike, *([] if self.heads is None else _best_splits(self.heads))]

    def under(self, signature: Signature) -> Split | None:
        """What it costs to do as another site does; None if that is impossible here."""
        rule, second = signature
        if second is None:
            return next((own for own in self.options if own.signature == signature), None)
        errors = self.heads
        if errors is None or len(errors.squares) != second.total:
            return None
        if rule not in errors.rules or second.rule not in errors.rules:
            return None
        first, other = errors.rules.index(rule), errors.rules.index(second.rule)
        return _split(errors, first, other, second.heads)


def _best_splits(errors: HeadErrors) -> list[Split]:
    """The splits of two rules that no other one beats in cost and damage, from cheap to dear."""
    heads, count = errors.squares.shape[:2]
    squares = errors.squares.numpy()
    weights = damage_of(squares[..., 0], squares[..., 1]) ** 2
    order = sorted(range(count), key=lambda n: errors.densities[n])
    found: list[tuple[float, float, int, int, np.ndarray]] = []
    for place, cheap in enumerate(order):
        for dear in order[place + 1 :]:
            gains = weights[:, cheap] - weights[:, dear]
            moved = np.argsort(-gains, kind="stable")
            damages = weights[:, cheap].sum() - np.cumsum(gains[moved])
            for n in range(1, heads):
                cost = _mean(errors, cheap, dear, n / heads)
                found.append((cost, float(damages[n - 1]), cheap, dear, moved[:n]))
    found.sort(key=lambda one: one[:4])
    least, kept = math.inf, []
    for _, damage, cheap, dear, moved in found:
        if damage < least:
            least = damage
            kept.append(_split(errors, cheap, dear, sorted(moved.tolist())))
    return kept


def _split(errors: HeadErrors, first: int, other: int, heads: Sequence[int]) -> Split:
    """Some heads take the rule at place ``other``, the rest the one at ``first``."""
    total = len(errors.squares)
    places = [other if head in heads else first for head in range(total)]
    output, temporal = errors.squares[range(total), places].sum(0).sqrt().tolist()
    second = SecondRule(rule=errors.rules[other], heads=tuple(heads), total=total)
    cost = _mean(errors, first, other, second.share)
    return Split(errors.rules[first], second, cost, output, temporal)


def _mean(errors: HeadErrors, first: int, other: int, share: float) -> float:
    return errors.densities[first] + share * (errors.densities[other] - errors.densities[first])


def choose_splits(
    sites: Mapping[str, SiteSplits], budget: float, max_distinct: int
) -> dict[str, Split] | None:
    """The least damage, summed over sites, at a mean cost of at most ``budget``.

    Sites whose heads are split in different ways need graphs of their own. Where there would be
    more than may be, sites do as others do: the way whose sites lose least by that is given up,
    again and again, and the budget is then spent anew on the ways that are left.

    Args:
        sites: what each may do.
        budget: mean cost over sites.
        max_distinct: different rules, or pairs of rules with their heads, that a plan may hold.

    Returns:
        The choice per site; None if nothing is cheap enough.
    """
    total = budget * len(sites)
    choice = within_budget({site: own.options for site, own in sites.items()}, total)
    if choice is None:
        return None
    used = list(dict.fromkeys(own.signature for own in choice.values() if own.signature))
    if len(used) <= max_distinct:
        return choice
    under = {site: {one: own.under(one) for one in used} for site, own in sites.items()}
    while len(used) > max_distinct:
        moves = {one: _moved(choice, under, used, one) for one in used}
        given_up = min(moves, key=lambda one: moves[one][0])
        choice = moves[given_up][1]
        used.remove(given_up)
    left = {
        site: [own.options[0], *(found for one in used if (found := under[site][one]))]
        for site, own in sites.items()
    }
    return within_budget(left, total)


def _moved(
    choice: dict[str, Split],
    under: Mapping[str, Mapping[Signature, Split | None]],
    used: Sequence[Signature],
    given_up: Signature,
) -> tuple[float, dict[str, Split]]:
    """The damage that giving up a way of splitting adds, and what its sites do instead.

    They do the best that costs no more; infinity if there is no such thing.
    """
    added, found = 0.0, dict(choice)
    for site, own in choice.items():
        if own.signature != given_up:
            continue
        others = [under[site][one] for one in used if one != given_up]
        cheap = [one for one in others if one is not None and one.cost <= own.cost + 1e-12]
        best = min(cheap, key=lambda one: one.damage, default=None)
        if best is None:
            return math.inf, choice
        added += best.damage - own.damage
        found[site] = best
    return added, found
