"""Which rules a calibration tries."""

from collections.abc import Iterable

from evdit_opt.calibrate.strengths import STRENGTHS
from evdit_opt.config import Config
from evdit_opt.masks import CACHED, Rule, TileMask, Weighting

__all__ = ["candidate_rules", "head_rules", "reused_rules"]


def candidate_rules(config: Config, frames: int) -> tuple[Rule, ...]:
    """All rules the config spans whose mask, at ``frames`` latent frames, could pay.

    Rules that give a mask another rule already gives, the dense mask, or a density above
    ``config.max_density`` are left out. Ordered from sparse to dense.
    """
    # Simple ones first: of rules that make the same mask the first one stays.
    weights: list[tuple[Weighting, float]] = [
        (weighting, 1.0) for weighting in config.weightings if weighting != "fitted"
    ]
    if "fitted" in config.weightings:
        ends: dict[float, Weighting] = {0.0: "none", 1.0: "balanced"}
        weights += [(ends[s], 1.0) if s in ends else ("fitted", s) for s in STRENGTHS]
    spanned = (
        Rule(references, window, weighting, spacing, strength)
        for references in config.references
        for window in config.windows
        for spacing in config.spacings
        for weighting, strength in weights
        if references or window  # frames that never see each other cannot make a video
    )
    return _distinct(spanned, frames, config.max_density)


def head_rules(config: Config, frames: int) -> tuple[Rule, ...]:
    """Rules for some heads of a site besides the :func:`candidate_rules`, for steps without reuse.

    The own frame only: the other heads may look at the others.
    """
    return _distinct([Rule(0, 0)], frames, config.max_density)


def reused_rules(config: Config, frames: int) -> tuple[Rule, ...]:
    """Rules for the steps between refreshes, from sparse to dense.

    Unweighted ones only: a residual already carries what weighting imitates. What frames do not see
    of each other is in it as well, so each may be alone, or the whole output may be the residual.
    """
    spanned = (
        Rule(references, window, "none", spacing)
        for references in (0, *config.references)
        for window in (0, *config.windows)
        for spacing in config.spacings
    )
    return CACHED, *_distinct(spanned, frames, min(config.max_density, MAX_REUSED_DENSITY))


MAX_REUSED_DENSITY = 0.5
"""Denser rules leave less to gain between refreshes than another refresh costs."""


def _distinct(rules: Iterable[Rule], frames: int, max_density: float) -> tuple[Rule, ...]:
    found: dict[TileMask, Rule] = {}
    for rule in rules:
        mask = rule.mask(frames)
        if not mask.is_dense and mask.density <= max_density:
            found.setdefault(mask, rule)
    return tuple(found[mask] for mask in sorted(found, key=lambda mask: mask.density))
