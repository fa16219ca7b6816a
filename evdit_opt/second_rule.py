"""Two rules at one site: some of its heads take another rule than the rest.

Heads of one layer look at different things (some at their neighbours in time, others at the whole
clip); one rule for all must keep both for each. docs/notes/head_groups.md has the measurements.
"""

import itertools
from dataclasses import dataclass

from evdit_opt.errors import PlanError
from evdit_opt.grid import TokenLayout
from evdit_opt.masks import Rule

__all__ = ["MAX_HEADS", "SecondRule", "mean_density"]

MAX_HEADS = 1024
"""More heads than any attention has; a bound for plans from strangers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SecondRule:
    """The rule of some heads of a site; the others take the site's own.

    Attributes:
        rule: what these heads keep.
        heads: which ones, ascending.
        total: how many heads the site has, without which no density is known.

    Raises:
        PlanError: if there is nothing to split: no head or every head takes the second rule, heads
            are out of order or range, or the rule keeps nothing.
    """

    rule: Rule
    heads: tuple[int, ...]
    total: int

    def __post_init__(self) -> None:
        if type(self.total) is not int or not 2 <= self.total <= MAX_HEADS:
            raise PlanError(
                f"expected total to be an integer in 2..{MAX_HEADS} heads, got {self.total!r}"
            )
        if not 1 <= len(self.heads) < self.total:
            raise PlanError(
                f"expected 1 to {self.total - 1} of {self.total} heads with a second rule, got "
                f"{len(self.heads)}"
            )
        for head in self.heads:
            if type(head) is not int or not 0 <= head < self.total:
                raise PlanError(
                    f"expected heads to be integers in 0..{self.total - 1}, got {head!r}"
                )
        if any(a >= b for a, b in itertools.pairwise(self.heads)):
            raise PlanError("expected heads in ascending order, each once")
        if self.rule.keeps_nothing:
            raise PlanError("expected a second rule that keeps something, this one only reuses")

    @property
    def share(self) -> float:
        """Share of the heads that take it."""
        return len(self.heads) / self.total

    def describe(self, frames: int | None = None) -> str:
        """A short text such as ``1:7 for heads 0-2, 5 of 12``."""
        runs: list[list[int]] = []
        for head in self.heads:
            if runs and runs[-1][-1] == head - 1:
                runs[-1] = [runs[-1][0], head]
            else:
                runs.append([head])
        named = ", ".join("-".join(map(str, run)) for run in runs)
        return f"{self.rule.describe(frames)} for heads {named} of {self.total}"


def mean_density(rule: Rule, second: SecondRule | None, layout: TokenLayout) -> float:
    """Kept / all token pairs of a site, text included, mean over its heads."""
    first = rule.density(layout)
    if second is None:
        return first
    return first + second.share * (second.rule.density(layout) - first)
