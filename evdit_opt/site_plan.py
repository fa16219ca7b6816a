"""What a plan says about one site. Records refuse values outside their range with ``PlanError``."""

from dataclasses import dataclass, field
from typing import get_args

from evdit_opt.errors import PlanError
from evdit_opt.masks import Rule
from evdit_opt.passes.site_mark import SiteSpec, Way
from evdit_opt.plan_records import MAX_TOKENS, require_int, require_number, require_text
from evdit_opt.second_rule import SecondRule
from evdit_opt.strict_json import OPTIONAL

__all__ = ["RuleEvidence", "SiteLayout", "SitePlan", "site_spec"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteLayout:
    """Text tokens around the video tokens of one site, as calibrated.

    Attributes:
        prefix: text tokens before the video.
        suffix: text tokens after the video.
    """

    prefix: int = 0
    suffix: int = 0

    def __post_init__(self) -> None:
        require_int("prefix", self.prefix, 0, MAX_TOKENS)
        require_int("suffix", self.suffix, 0, MAX_TOKENS)


@dataclass(frozen=True, kw_only=True, slots=True)
class RuleEvidence:
    """What one rule would cost at one site, measured in calibration.

    Attributes:
        rule: ``Rule.describe`` at the calibrated grid.
        density: kept / all token pairs at the calibrated layout, text included.
        output: relative error of the attention output.
        temporal: the same for its change from frame to frame.
    """

    rule: str
    density: float
    output: float
    temporal: float

    def __post_init__(self) -> None:
        require_text("rule", self.rule, 100)
        require_number("density", self.density, 0.0, 1.0)
        require_number("output", self.output, 0.0)
        require_number("temporal", self.temporal, 0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class SitePlan:
    """The decision for one site.

    Attributes:
        name: module path of the attention, such as ``blocks.3.attn1``.
        rule: the rule applied; None: the site stays dense.
        reason: why this rule, or why dense.
        layout: text tokens around the video.
        density: kept / all token pairs at the calibrated layout; 1 for a dense site.
        errors: what every candidate would cost here.
        way: how its attention is reached: by a mark in its graph, or, where Dynamo puts mark and
            attention into different graphs, in a scope of its own.
        error: relative error of its output where it is not dense, as calibrated: root mean square
            over the steps of a run (between refreshes, if it reuses). None if not known.
        second: the rule of some of its heads, where they do not all take ``rule``.
    """

    name: str
    rule: Rule | None
    reason: str
    layout: SiteLayout
    density: float
    errors: tuple[RuleEvidence, ...] = ()
    way: Way = field(default="mark", metadata={OPTIONAL: True})
    error: float | None = field(default=None, metadata={OPTIONAL: True})
    second: SecondRule | None = field(default=None, metadata={OPTIONAL: True})

    def __post_init__(self) -> None:
        require_text("name", self.name, 256)
        require_text("reason", self.reason, 1000)
        require_number("density", self.density, 0.0, 1.0)
        if self.way not in get_args(Way):
            raise PlanError(f"expected way to be one of {get_args(Way)}, got {self.way!r}")
        if self.rule is None and self.density != 1.0:
            raise PlanError(f"expected density 1 at a dense site, got {self.density}")
        if self.error is not None:
            require_number("error", self.error, 0.0)
        if self.second is not None:
            if self.rule is None or self.rule.keeps_nothing:
                raise PlanError(
                    "expected a second rule at a site whose first one keeps something, got one at "
                    "a site that is dense or only reuses"
                )
            if self.second.rule == self.rule:
                raise PlanError("expected a second rule that differs from the first one")

    def describe(self, frames: int) -> str:
        """What the site does, in a few words, at ``frames`` latent frames."""
        if self.rule is None:
            return "dense"
        first = self.rule.describe(frames)
        return first if self.second is None else f"{first}; {self.second.describe(frames)}"


def site_spec(site: SitePlan, min_tokens: int) -> SiteSpec:
    """What the mark of a sparse site says; ``min_tokens``: of its plan."""
    assert site.rule is not None, f"{site.name} is dense"
    layout = site.layout
    return SiteSpec(site.rule, layout.prefix, layout.suffix, min_tokens, site.second)
