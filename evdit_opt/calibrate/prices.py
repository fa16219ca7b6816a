"""What a search pays for what a site does in one step: kept token pairs, or measured time.

The unit is what the mean site takes dense, so that budgets read as shares of dense attention.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from evdit_opt.calibrate.site_record import CandidateError, ReuseError
from evdit_opt.masks import Rule

__all__ = ["Prices", "RulePrice", "kept_pairs"]


class RulePrice(NamedTuple):
    """Of one rule at one site, per step.

    Attributes:
        sparse: applied on its own, in every step.
        reused: between refreshes, beside a residual.
        refresh: in a step that renews the residual.
    """

    sparse: float
    reused: float
    refresh: float


@dataclass(frozen=True)
class Prices:
    """Of everything the sites of a model may do.

    Attributes:
        dense: per site; 1 in the mean.
        rules: per site and rule.
    """

    dense: Mapping[str, float]
    rules: Mapping[str, Mapping[Rule, RulePrice]]

    def sparse(self, site: str, rule: Rule | None) -> float:
        """Of a rule that is applied in every step; None: of dense attention."""
        return self.dense[site] if rule is None else self.rules[site][rule].sparse


def kept_pairs(
    errors: Mapping[str, Sequence[CandidateError]],
    reuse: Mapping[str, Sequence[ReuseError]] | None = None,
) -> Prices:
    """Prices by kept token pairs: what a device pays whose time goes into multiplications."""
    found: dict[str, dict[Rule, float]] = {site: {} for site in errors}
    measured: tuple[Mapping[str, Sequence[CandidateError | ReuseError]], ...]
    measured = (errors, reuse or {})
    for known in measured:
        for site, candidates in known.items():
            found[site].update({own.rule: own.density for own in candidates})
    return Prices(
        dense=dict.fromkeys(found, 1.0),
        rules={
            site: {rule: RulePrice(kept, kept, 1.0 + kept) for rule, kept in own.items()}
            for site, own in found.items()
        },
    )
