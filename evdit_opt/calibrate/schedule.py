"""When to renew residuals: the steps that keep the damage smallest, exactly.

A run is cut into dense steps at first, then segments, each a refresh and the steps that reuse its
residual. The damage of a segment is the sum over its steps, and depends on where it and the segment
before began, so the best cut for every number of refreshes follows by dynamic programming over the
last two refreshes.
"""

import torch
from torch import Tensor

__all__ = ["best_refreshes"]


def best_refreshes(damage: Tensor, refreshes: int, lead: int = 0) -> tuple[tuple[int, ...], float]:
    """The best steps to refresh at.

    Args:
        damage: ``[steps, steps, steps]``: at [b, s, t], of step t with the residuals of step s and
            of the refresh b before it, b < s < t; at [s, s, t], if s is the first refresh.
        refreshes: how many, 1 to ``steps - lead``.
        lead: dense steps before the first refresh, which do no damage.

    Returns:
        The steps, ascending, ``lead`` first, and the damage of the run.
    """
    steps = damage.shape[0]
    # segment[b, s, e]: a refresh at s whose residual serves all steps before e.
    summed = damage.double().triu(1).cumsum(2)
    segment = torch.cat([torch.zeros(steps, steps, 1, dtype=torch.float64), summed], 2)
    never = torch.ones(steps, steps + 1, dtype=torch.bool).tril()  # no segment ends where it begins
    segment = segment.masked_fill(never, torch.inf)
    # best[b, s]: the least damage before s, where the last two refreshes are b and s.
    best = torch.full((steps, steps), torch.inf, dtype=torch.float64)
    best[lead, lead] = 0.0
    came = []
    for _ in range(refreshes - 1):
        totals, before = (best.unsqueeze(2) + segment[:, :, :steps]).min(0)
        came.append(before)
        best = totals
    totals = best + segment[:, :, steps]
    last = int(totals.argmin())
    b, s = divmod(last, steps)
    chosen = [s]
    for before in reversed(came):
        chosen.append(b)
        b, s = int(before[b, s]), b
    return tuple(reversed(chosen)), float(totals.min())
