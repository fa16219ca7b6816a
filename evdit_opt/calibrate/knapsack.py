"""One option per site, the least damage within a budget: a knapsack, by dynamic programming."""

import math
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

import numpy as np

__all__ = ["within_budget"]

BINS = 2048
"""Steps in which a budget is spent."""


class Priced(Protocol):
    """What may be chosen."""

    @property
    def cost(self) -> float:
        """What choosing it takes of the budget."""

    @property
    def damage(self) -> float:
        """What choosing it does."""


Choice = TypeVar("Choice", bound=Priced)


def within_budget(
    options: Mapping[str, Sequence[Choice]], budget: float
) -> dict[str, Choice] | None:
    """The least damage at a total cost of at most ``budget``; None if nothing is cheap enough.

    Dynamic programming over sites and what is spent on them. Costs are rounded up to ``1 / BINS``
    of the budget; as much more as that may add is allowed first, and taken back until true costs
    fit, so the result is exact up to that rounding.
    """
    if budget <= 0.0:
        return None
    bins = BINS + len(options)
    spent = np.zeros(bins + 1)  # least damage by what may be spent
    taken: list[tuple[str, Sequence[Choice], np.ndarray, list[int]]] = []
    for site, own in options.items():
        useful = _undominated(own)
        costs = [math.ceil(option.cost / budget * BINS - 1e-9) for option in useful]
        totals = np.full((len(useful), bins + 1), np.inf)
        for row, (option, cost) in enumerate(zip(useful, costs, strict=True)):
            if cost <= bins:
                totals[row, cost:] = spent[: bins + 1 - cost] + option.damage
        choice = totals.argmin(0)
        spent = totals.min(0)
        taken.append((site, useful, choice, costs))
    for capacity in range(bins, -1, -1):
        if np.isinf(spent[capacity]):
            return None
        left, found = capacity, {}
        for site, offered, choice, costs in reversed(taken):
            row = int(choice[left])
            found[site] = offered[row]
            left -= costs[row]
        if sum(option.cost for option in found.values()) <= budget * (1 + 1e-12):
            return {site: found[site] for site in options}
    return None


def _undominated(options: Sequence[Choice]) -> list[Choice]:
    """Without those that another one beats in cost and damage, from cheap to dear."""
    kept: list[Choice] = []
    for option in sorted(options, key=lambda o: (o.cost, o.damage)):
        if not kept or option.damage < kept[-1].damage:
            kept.append(option)
    return kept
