"""Where residuals go after a refresh: on the way they were going, damped.

From step to step a residual moves on nearly the same line. So what a reusing step adds is not the
residual r of the last refresh s alone, but ``r_s + ahead * (r_s - r_b)``, with the refresh b
before it. The best ``ahead`` is a least-squares fit, and like what is left over it follows from
the distances between residuals alone. (Caches of whole blocks forecast them by Taylor series: Liu
et al., TaylorSeer, arXiv 2503.06923; there the coefficients are given, not fitted.)
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evdit_opt.calibrate.damage import TEMPORAL
from evdit_opt.calibrate.site_record import ReuseError

__all__ = ["Drift", "drift_of", "fit_ahead"]


@dataclass(frozen=True)
class Drift:
    """How residuals move between steps, at one site, under some rules.

    Attributes:
        squares: ``[2, rules, steps, steps]``: squared distance of the residuals of steps s (row)
            and t (column), of outputs and of their change from frame to frame, relative to the
            squared norm of dense attention in step t.
        scales: ``[2, steps]``: that squared norm.
    """

    squares: Tensor
    scales: Tensor

    def moments(self, before: Tensor, since: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the error in steps ``at`` consists of, with refreshes at ``before`` and ``since``.

        All three are integer tensors that broadcast to one shape ``[*]``, with before <= since <
        at. Where ``before`` equals ``since`` there was no refresh before, and nothing to carry on.

        Returns:
            Three tensors ``[2, rules, *]``, relative to dense attention in step t: the squared
            distance from ``since`` to ``at``, its product with the change from ``before`` to
            ``since``, and the square of that change.
        """
        before, since, at = torch.broadcast_tensors(before, since, at)
        base = self.squares[:, :, since, at]
        ratio = (self.scales[:, since] / self.scales[:, at].clamp_min(1e-300)).unsqueeze(1)
        change = self.squares[:, :, before, since] * ratio
        cross = (self.squares[:, :, before, at] - base - change) / 2
        return base, cross, change

    def error(self, before: Tensor, since: Tensor, at: Tensor, ahead: Tensor) -> Tensor:
        """Squared relative errors ``[2, rules, *]``, with ``ahead`` ``[*]`` of the change added."""
        base, cross, change = self.moments(before, since, at)
        return (base - 2 * ahead * cross + ahead.square() * change).clamp_min(0.0)

    def only(self, places: Sequence[int]) -> "Drift":
        """Under some of the rules."""
        return Drift(self.squares[:, list(places)], self.scales)


def drift_of(reused: Sequence[ReuseError]) -> Drift:
    """The drift at a site under all rules recorded there."""
    squares = [torch.stack([own.output for own in reused]),
               torch.stack([own.temporal for own in reused])]  # fmt: skip
    return Drift(torch.stack(squares), reused[0].scales)


def fit_ahead(drifts: Iterable[Drift], before: Tensor, since: Tensor, at: Tensor) -> Tensor:
    """The ``ahead`` of the least squared error over sites and rules, ``[*]``; at least 0.

    Args:
        drifts: of the sites.
        before: as in :meth:`Drift.moments`.
        since: likewise.
        at: likewise.
    """
    crossed, changed = torch.zeros(()), torch.zeros(())
    weights = torch.tensor([1.0, TEMPORAL], dtype=torch.float64)
    for drift in drifts:
        _, cross, change = drift.moments(before, since, at)
        crossed = crossed + torch.tensordot(weights, cross.mean(1), 1)
        changed = changed + torch.tensordot(weights, change.mean(1), 1)
    return (crossed / changed.clamp_min(1e-30)).clamp_min(0.0)
