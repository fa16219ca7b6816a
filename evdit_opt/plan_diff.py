"""What two plans do differently: rules, densities and reuse by site, and what holds for all sites.

Evidence (errors, trials, quality, versions) does not count: it changes nothing the model computes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from evdit_opt.masks import Rule
from evdit_opt.plan import Plan, SecondRule, SitePlan

__all__ = ["Difference", "plan_differences"]

ABSENT = "no such site"


@dataclass(frozen=True)
class Difference:
    """One thing that differs.

    Attributes:
        where: name of the site; None for what concerns the whole plan.
        what: which property.
        old: its value in the first plan, in words.
        new: in the second.
    """

    where: str | None
    what: str
    old: str
    new: str

    def describe(self) -> str:
        """One line for people."""
        return f"{self.where or 'plan'}: {self.what}: {self.old} -> {self.new}"


def plan_differences(old: Plan, new: Plan) -> tuple[Difference, ...]:
    """Everything that two plans do differently, whole plans first, then sites in model order."""
    pairs = zip(_whole(old), _whole(new), strict=True)
    found = [Difference(None, what, was, now) for (what, was), (_, now) in pairs if was != now]
    before, after = ({site.name: site for site in plan.sites} for plan in (old, new))
    for name in dict.fromkeys([*before, *after]):
        if name not in before or name not in after:
            there = [ABSENT if name not in plan else "there" for plan in (before, after)]
            found.append(Difference(name, "site", *there))
            continue
        both = zip(_site(old, before[name]), _site(new, after[name]), strict=True)
        found += [Difference(name, what, was, now) for (what, was), (_, now) in both if was != now]
    return tuple(found)


def _whole(plan: Plan) -> Iterator[tuple[str, str]]:
    grid, reuse = plan.grid, plan.reuse
    yield "model", plan.model_class
    yield "model configuration", plan.model_config_hash
    yield "grid", f"{grid.frames} x {grid.height} x {grid.width} tokens"
    yield "grid source", str(plan.grid_source)
    yield "min_tokens", str(plan.min_tokens)
    yield "timestep", "none" if reuse is None else reuse.timestep
    levels = [] if reuse is None else [f"{level!r}" for level in reuse.refresh_at]
    yield "refresh levels", ", ".join(levels) or "none"
    trend = [] if reuse is None else [f"{p.damping!r} at {p.level!r}" for p in reuse.trend]
    yield "trend", ", ".join(trend) or "none"
    tuned = plan.finetune and replace(plan.finetune, changed=())  # its hash says as much
    yield "fine-tuning", "none" if tuned is None else str(tuned)
    yield "precision of residuals", "none" if reuse is None else reuse.precision


def _site(plan: Plan, site: SitePlan) -> Iterator[tuple[str, str]]:
    rule, reuse, second = site.rule, plan.reuse, site.second
    yield "rule", "dense" if rule is None else _rule(plan, rule)
    yield "second rule", "none" if second is None else _rule(plan, second.rule)
    yield "its heads", "none" if second is None else _heads(second)
    yield "density", f"{site.density:.6g}"
    yield "reuse", "yes" if reuse is not None and site.name in reuse.sites else "no"
    yield "text tokens", f"{site.layout.prefix} before, {site.layout.suffix} after"
    yield "way", site.way


def _rule(plan: Plan, rule: Rule) -> str:
    """Never the same words for different rules, as 2:6 of 2 and of 3 references would be."""
    if rule.keeps_nothing:
        return rule.describe()
    window = f" + window {rule.window}" if rule.window else ""
    strength = f" {rule.strength!r}" if rule.weighting == "fitted" else ""
    return (
        f"{rule.describe(plan.grid.frames)} ({rule.references} references{window}, "
        f"{rule.weighting}{strength}, {rule.spacing})"
    )


def _heads(second: SecondRule) -> str:
    return f"{', '.join(map(str, second.heads))} of {second.total}"
