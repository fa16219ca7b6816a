"""Which rules a calibration tries."""

from evdit_opt.config import Config
from evdit_opt.masks import Rule, TileMask

__all__ = ["candidate_rules"]


def candidate_rules(config: Config, frames: int) -> tuple[Rule, ...]:
    """All rules the config spans whose mask, at ``frames`` latent frames, could pay.

    Rules that give a mask another rule already gives, the dense mask, or a density above
    ``config.max_density`` are left out. Ordered from sparse to dense.
    """
    seen: set[TileMask] = set()
    rules: list[Rule] = []
    for references in config.references:
        for window in config.windows:
            for spacing in config.spacings:
                for weighting in config.weightings:
                    if references == 0 and window == 0:
                        continue  # frames that never see each other cannot make a video
                    rule = Rule(references, window, weighting, spacing)
                    mask = rule.mask(frames)
                    if mask in seen or mask.is_dense or mask.density > config.max_density:
                        continue
                    seen.add(mask)
                    rules.append(rule)
    return tuple(sorted(rules, key=lambda rule: rule.mask(frames).density))
