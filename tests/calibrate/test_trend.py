"""Carrying residuals on: errors from distances alone, equal to those of the vectors themselves."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evdit_opt.calibrate.damage import TEMPORAL
from evdit_opt.calibrate.site_record import ReuseError
from evdit_opt.calibrate.trend import drift_of, fit_ahead
from evdit_opt.masks import CACHED, Rule

RULES = (CACHED, Rule(1))


def recorded(residuals: torch.Tensor, changes: torch.Tensor, scales: torch.Tensor):
    """What calibration keeps of residuals ``[rules, steps, numbers]`` and of their changes."""
    far = [
        torch.cdist(x, x).square() / scale
        for x, scale in ((residuals, scales[0]), (changes, scales[1]))
    ]
    return [ReuseError(rule, 0.0, far[0][n], far[1][n], scales) for n, rule in enumerate(RULES)]


@given(st.integers(2, 7), st.integers(1, 9), st.integers(0, 10**6))
def test_errors_are_those_of_the_vectors(steps, numbers, seed):
    random = torch.Generator().manual_seed(seed)
    signals = torch.randn(2, len(RULES), steps, numbers, generator=random).double()
    scales = torch.rand(2, steps, generator=random).double() + 0.1
    ahead = torch.randn(steps, steps, steps, generator=random).double()
    step = torch.arange(steps)
    every = step[:, None, None], step[None, :, None], step[None, None, :]
    found = drift_of(recorded(*signals, scales)).error(*every, ahead)
    for b, s, t in torch.cartesian_prod(step, step, step).tolist():
        guess = signals[:, :, s] + ahead[b, s, t] * (signals[:, :, s] - signals[:, :, b])
        true = (signals[:, :, t] - guess).square().sum(-1) / scales[:, t, None]
        # Errors of 1e-15 of squares that are subtracted from one another.
        torch.testing.assert_close(found[:, :, b, s, t], true, rtol=1e-9, atol=1e-9)


@given(st.integers(0, 10**6))
def test_the_fit_is_the_best_for_all_sites_at_once(seed):
    random = torch.Generator().manual_seed(seed)
    drifts = []
    for _ in range(3):
        path = (
            torch.randn(2, len(RULES), 1, 5, generator=random).double() * torch.arange(6)[:, None]
        )
        path = path + 0.5 * torch.randn(path.shape, generator=random).double()
        drifts.append(drift_of(recorded(*path, torch.ones(2, 6).double())))
    b, s, t = torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([4, 5])
    best = fit_ahead(drifts, b, s, t)

    def total(ahead: torch.Tensor) -> torch.Tensor:
        errors = torch.stack([drift.error(b, s, t, ahead) for drift in drifts]).mean(2).sum(0)
        return errors[0] + TEMPORAL * errors[1]

    for other in (best - 0.01, best + 0.01):
        worse = total(other) >= total(best) - 1e-12
        assert torch.all(worse | (other < 0))
    assert torch.all(best >= 0)


def test_a_straight_line_is_carried_on_exactly():
    path = torch.arange(6.0).double()[:, None] * torch.tensor([1.0, -2.0]).double()
    drift = drift_of(
        recorded(path.expand(2, 6, 2), path.expand(2, 6, 2), torch.ones(2, 6).double())
    )
    b, s, t = torch.tensor([1]), torch.tensor([3]), torch.tensor([5])
    ahead = fit_ahead([drift], b, s, t)
    assert ahead.item() == pytest.approx(1.0)
    assert drift.error(b, s, t, ahead).max() < 1e-9
    assert fit_ahead([drift], s, s, t).item() == 0.0  # one refresh only: nothing to carry on
