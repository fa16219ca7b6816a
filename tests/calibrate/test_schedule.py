"""The refresh schedule: equal to trying all of them."""

from itertools import combinations

import torch
from hypothesis import given
from hypothesis import strategies as st

from evdit_opt.calibrate.schedule import best_refreshes


def run_damage(damage: torch.Tensor, refreshes: tuple[int, ...]) -> float:
    total, before, latest = 0.0, None, None
    for step in range(damage.shape[0]):
        if step in refreshes:
            before, latest = (step if latest is None else latest), step
        elif latest is not None:
            total += float(damage[before, latest, step])
    return total


@given(st.integers(2, 8), st.integers(1, 4), st.integers(0, 2), st.integers(0, 10**6))
def test_it_is_the_best_of_all(steps, refreshes, lead, seed):
    lead = min(lead, steps - 1)
    refreshes = min(refreshes, steps - lead)
    damage = torch.rand(steps, steps, steps, generator=torch.Generator().manual_seed(seed)).double()
    chosen, total = best_refreshes(damage, refreshes, lead)
    every = [(lead, *rest) for rest in combinations(range(lead + 1, steps), refreshes - 1)]
    assert chosen in every
    best = min(run_damage(damage, one) for one in every)
    assert abs(run_damage(damage, chosen) - best) < 1e-12
    assert abs(total - best) < 1e-12


def test_refreshes_gather_where_residuals_turn_over_faster():
    position = torch.tensor([0.0, 3.0, 6.0, 9.0, 9.1, 9.2, 9.3, 9.4])
    damage = (position[None] - position[:, None]).square()
    assert best_refreshes(damage.expand(8, 8, 8), 4)[0] == (0, 1, 2, 3)
