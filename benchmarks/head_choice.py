"""Choose a rule per site, per group of heads or per head: the least damage at a density."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from benchmarks.head_record import HeadErrors
from evdit_opt.calibrate.damage import damage_of
from evdit_opt.calibrate.knapsack import within_budget

__all__ = [
    "HeadChoice",
    "choose",
    "choose_uniform",
    "damages",
    "reusing_costs",
    "site_choices",
    "squares",
]


@dataclass(frozen=True)
class HeadChoice:
    """A rule for every head of a site.

    Attributes:
        rules: index of each head's rule; the last one is dense attention.
        cost: kept share of token pairs.
        damage: predicted, see ``calibrate/damage.py``.
    """

    rules: tuple[int, ...]
    cost: float
    damage: float


def squares(errors: HeadErrors) -> Tensor:
    """Squared relative errors of a site, ``[2, steps, rules of head 0, rules of head 1, ...]``.

    One more rule than was recorded: the last is dense attention, without error.
    """
    found = torch.nn.functional.pad(errors.products, (0, 1, 0, 0, 0, 1))
    heads, rules = found.shape[2:4]
    total = found.new_zeros(*found.shape[:2], *[rules] * heads)
    for one in range(heads):
        total += _along(found[:, :, one, :, one].diagonal(dim1=-2, dim2=-1), heads, one)
        for other in range(one + 1, heads):
            total += 2.0 * _along(found[:, :, one, :, other], heads, one, other)
    # Where errors cancel, rounding may leave less than nothing.
    return total.clamp_min(0.0) / errors.scale.reshape(*errors.scale.shape, *[1] * heads)


def _along(values: Tensor, heads: int, *own: int) -> Tensor:
    """``[2, steps, rules of some heads]``, to be broadcast over the rules of all heads."""
    places = [values.shape[2] if head in own else 1 for head in range(heads)]
    return values.reshape(*values.shape[:2], *places)


def damages(errors: HeadErrors) -> Tensor:
    """``[rules of head 0, rules of head 1, ...]``: mean damage of a step."""
    output, temporal = squares(errors)
    return damage_of(output, temporal).mean(0)


def site_choices(damage: Tensor, costs: Sequence[float], most: int | None) -> list[HeadChoice]:
    """Choices of a site that no cheaper one beats, with at most so many different rules.

    Args:
        damage: ``[rules, rules, ...]``, by the rule of every head.
        costs: of a head under every rule.
        most: different rules; None: as many as there are heads.
    """
    found: list[HeadChoice] = []
    heads = damage.ndim
    every = product(range(len(costs)), repeat=heads)
    for rules, own in zip(every, damage.flatten().tolist(), strict=True):
        if most is None or len(set(rules)) <= most:
            found.append(HeadChoice(rules, sum(costs[rule] for rule in rules) / heads, own))
    kept: list[HeadChoice] = []
    for one in sorted(found, key=lambda own: (own.cost, own.damage)):
        if not kept or one.damage < kept[-1].damage:
            kept.append(one)
    return kept


def choose(
    options: Mapping[str, Sequence[HeadChoice]], density: float
) -> dict[str, HeadChoice] | None:
    """The least damage, summed over sites, at a mean cost of at most ``density``."""
    return within_budget(options, density * len(options))


def choose_uniform(
    damage: Mapping[str, Tensor], costs: Sequence[float], density: float
) -> dict[str, HeadChoice] | None:
    """The one rule for all heads of all sites that does the least damage; arguments as above."""
    found: list[dict[str, HeadChoice]] = []
    for rule, cost in enumerate(costs):
        if cost <= density:
            rules = {name: (rule,) * own.ndim for name, own in damage.items()}
            found.append(
                {
                    name: HeadChoice(own, cost, damage[name][own].item())
                    for name, own in rules.items()
                }
            )
    return min(found, key=lambda own: sum(one.damage for one in own.values()), default=None)


def reusing_costs(kept: Sequence[float], every: int, steps: int) -> list[float]:
    """Of a head under rules that reuse, and dense: what refreshes compute twice counts twice."""
    refreshes = len(range(0, steps, every)) / steps
    return [*(refreshes + each for each in kept), 1.0]
