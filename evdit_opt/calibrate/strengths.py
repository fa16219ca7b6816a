"""What a fitted weighting costs at any strength, from the outputs at two: unweighted and balanced.

A weight moves a share of every row from what the row sees itself to the references. The output
stays on the line through those two outputs, and where on it depends on the strength s alone:

    out(s) = out(0) + t(s) (out(1) - out(0)),   t(s) = r(s) / r(1) * (1 + p r(1)) / (1 + p r(s))

with p the share of the references in the unweighted row, and 1 + r(1) = 1 + dropped / references
the balanced weight, 1 + r(s) its s-th power. So a few inner products of every row give the errors
of all strengths, and no further output is made.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from evdit_opt.masks import Rule

__all__ = ["STRENGTHS", "FittedRules", "strength_errors", "unfitted"]

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
"""Of the balanced log-weight; the first is "none", 1 is "balanced". Few, as every strength makes a
rule of its own, and a plan may hold 8 at most."""


def unfitted(rule: Rule, weighting: str = "none") -> Rule:
    """The rule with a weighting that has no strength."""
    return replace(rule, weighting=weighting, strength=1.0)  # type: ignore[arg-type]


class FittedRules:
    """The rules with a strength among some.

    They are looked at in few queries: one number is fitted. What that says about a strength is
    relative to its bases, whose errors are known better.

    Attributes:
        rules: those.
        bases: the unweighted rule of each, once; then, as many, the same ones balanced.
    """

    def __init__(self, rules: Sequence[Rule], frames: int) -> None:
        self.rules = tuple(rule for rule in rules if rule.weighting == "fitted")
        self._plain = tuple(dict.fromkeys(map(unfitted, self.rules)))
        self.bases = (*self._plain, *(unfitted(rule, "balanced") for rule in self._plain))
        self._strengths = (0.0, 1.0, *sorted({rule.strength for rule in self.rules}))
        self._references = torch.zeros(len(self._plain), frames)
        self._log_weights = torch.zeros(len(self._plain), frames)
        for row, rule in enumerate(self._plain):
            self._references[row, list(rule.reference_frames(frames))] = 1.0
            # Its dropped tiles are -inf, its own one is 0: the largest number is the weight.
            self._log_weights[row] = unfitted(rule, "balanced").mask(frames).bias.amax(-1)

    def squares(self, dense: Tensor, outputs: Tensor, shares: Tensor) -> Tensor:
        """What :meth:`errors` needs of some calls, to be added up: ``[bases / 2, numbers, 2]``.

        Args:
            dense: ``[batch, heads, frames, positions, head_dim]``.
            outputs: the same under every one of ``bases``, stacked.
            shares: what the parts of the keys get in the unweighted ones: ``[bases / 2, batch,
                heads, frames, positions, parts]``, the frames of the video first.
        """
        plain, balanced = outputs.chunk(2)
        references = self._references.to(shares)[:, None, None, None, None]
        share = (shares[..., : references.shape[-1]] * references).sum(-1)
        weights = self._log_weights.to(share)
        return strength_errors(dense, plain, balanced, share, weights, self._strengths)

    def errors(self, squares: Tensor, bases: Tensor) -> Tensor:
        """Squared errors of ``rules``, ``[rules, 2]``.

        Args:
            squares: sum of what :meth:`squares` returned.
            bases: ``[bases, 2]``, squared errors of the bases.
        """
        known = torch.stack(bases.chunk(2)).sum(0)
        found = squares * (known / squares[:, :2].sum(1).clamp_min(1e-300)).unsqueeze(1)
        rows = {rule: row for row, rule in enumerate(self._plain)}
        places = {strength: place for place, strength in enumerate(self._strengths)}
        return torch.stack([found[rows[unfitted(r)], places[r.strength]] for r in self.rules])


def strength_errors(
    dense: Tensor,
    plain: Tensor,
    balanced: Tensor,
    share: Tensor,
    log_weights: Tensor,
    strengths: Sequence[float],
) -> Tensor:
    """Squared errors at every strength, summed over all rows.

    Args:
        dense: ``[batch, heads, frames, positions, head_dim]``, attention as it is.
        plain: ``[rules, *dense.shape]``, under unweighted masks.
        balanced: the same, balanced.
        share: ``[rules, batch, heads, frames, positions]``, of the references in the unweighted
            rows.
        log_weights: ``[rules, frames]``, what balancing adds to the logits of the references.
        strengths: times that.

    Returns:
        ``[rules, strengths, 2]``, fp64 on the CPU: of the output, and of its change from each frame
        to the next at the same position.
    """
    error, step = plain - dense, balanced - plain
    ee, es, ss = _dot(error, error), _dot(error, step), _dot(step, step)
    before, after = slice(None, -1), slice(1, None)
    later = error[:, :, :, after], step[:, :, :, after]
    ee_next, es_next = (_dot(error[:, :, :, before], own) for own in later)
    se_next, ss_next = (_dot(step[:, :, :, before], own) for own in later)
    weights = log_weights[:, None, None, :, None]
    full = weights.expm1()
    found = []
    for strength in strengths:
        extra = (strength * weights).expm1()
        # A row that lost nothing has no weight, and no step either.
        ratio = torch.where(full > 0.0, extra / full.clamp_min(1e-30), 0.0)
        along = ratio * (1.0 + share * full) / (1.0 + share * extra)
        square = ee + 2.0 * along * es + along.square() * ss
        first, then = along[:, :, :, before], along[:, :, :, after]
        crossed = ee_next + then * es_next + first * se_next + first * then * ss_next
        change = square[:, :, :, before] + square[:, :, :, after] - 2.0 * crossed
        found.append(torch.stack([one.flatten(1).sum(1) for one in (square, change)], -1))
    return torch.stack(found, 1).to("cpu", torch.float64).clamp_min(0.0)  # a rounding below 0 is 0


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Inner products over the last dimension."""
    return torch.linalg.vecdot(left, right)
