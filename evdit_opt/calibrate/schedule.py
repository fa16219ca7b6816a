"""When to renew residuals: the steps that keep the damage smallest, exactly.

A run is cut into dense steps at first, then segments, each a refresh and the steps that reuse its
residual. The damage of a segment is the sum over its steps, so the best cut for every number of
refreshes follows by dynamic programming.
"""

import torch
from torch import Tensor

__all__ = ["best_refreshes"]


def best_refreshes(damage: Tensor, refreshes: int, lead: int = 0) -> tuple[tuple[int, ...], float]:
    """The best steps to refresh at.

    Args:
        damage: ``[steps, steps]``: of step t (column) with the residual of step s (row), s < t.
        refreshes: how many, 1 to ``steps - lead``.
        lead: dense steps before the first refresh, which do no damage.

    Returns:
        The steps, ascending, ``lead`` first, and the damage of the run.
    """
    steps = damage.shape[0]
    # segment[s, e]: a refresh at s whose residual serves all steps before e.
    upper = damage.double().triu(1)
    segment = torch.cat([torch.zeros(steps, 1, dtype=torch.float64), upper.cumsum(1)], 1)
    best = torch.full((refreshes + 1, steps + 1), torch.inf, dtype=torch.float64)
    came = torch.zeros(refreshes + 1, steps + 1, dtype=torch.long)
    best[0, lead] = 0.0
    for count in range(1, refreshes + 1):
        for end in range(lead + count, steps + 1):
            totals = best[count - 1, :end] + segment[:end, end]
            came[count, end] = int(totals.argmin())
            best[count, end] = totals.min()
    chosen, end = [], steps
    for count in range(refreshes, 0, -1):
        end = int(came[count, end])
        chosen.append(end)
    return tuple(reversed(chosen)), float(best[refreshes, steps])
