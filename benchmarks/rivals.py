"""Static masks and caching that others use, as plans for the same sites, each at most as dense."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from evdit_opt.masks import CACHED, DROPPED, Rule, TileMask
from evdit_opt.plan import Plan, TrendPoint
from evdit_opt.reuse import with_reuse

__all__ = ["RadialRule", "output_caching", "output_forecasting", "static_rivals", "uniform"]


@dataclass(frozen=True)
class RadialRule(Rule):
    """Radial Attention (arXiv 2506.19852) at the level of whole frames.

    The band around the diagonal is kept; each doubling of the distance keeps every second diagonal
    of the one before. The first frame is a sink: every frame sees it. ``window`` is half the band.
    """

    def mask(self, frames: int) -> TileMask:
        """The tile mask for ``frames`` latent frames."""
        return TileMask(
            tuple(
                tuple(0.0 if self._keeps(abs(i - j)) or j == 0 else DROPPED for j in range(frames))
                for i in range(frames)
            )
        )

    def _keeps(self, distance: int) -> bool:
        band = max(1, self.window)
        every = 1
        while distance > band:
            band, every = 2 * band, 2 * every
        return distance <= self.window or (self.window > 0 and distance % every == 0)


FAMILIES: dict[str, list[Rule]] = {
    "uniform references (paper)": [Rule(n) for n in range(1, 40)],
    "uniform window": [Rule(0, n) for n in range(1, 40)],
    "first frame + window": [Rule(1, n) for n in range(1, 40)],
    "radial decay": [RadialRule(0, n) for n in range(1, 40)],
}


def static_rivals(plan: Plan, density: float) -> Iterator[tuple[str, Plan]]:
    """The densest plan of every family that does not exceed the density."""
    for name, rules in FAMILIES.items():
        plans = [uniform(plan, rule) for rule in rules]
        fitting = [one for one in plans if one.density <= density + 1e-9]
        if fitting:
            yield name, max(fitting, key=lambda one: one.density)


def output_caching(plan: Plan, levels: tuple[float, ...], density: float) -> Plan | None:
    """Every attention output cached, refreshed evenly as often as the density allows."""
    steps, count = len(levels), int(density * len(levels) + 1e-9)
    if not count:
        return None
    chosen = [levels[n * steps // count] for n in range(count)]
    return with_reuse(uniform(plan, Rule(1)), chosen, rule=CACHED, levels=levels)


def output_forecasting(plan: Plan) -> Plan:
    """The same, with outputs carried on along a straight line, as TaylorSeer's first order does."""
    assert plan.reuse is not None
    line = (TrendPoint(level=plan.reuse.levels[0], damping=1.0),)
    return replace(plan, reuse=replace(plan.reuse, trend=line))


def uniform(plan: Plan, rule: Rule) -> Plan:
    """The same rule at every site."""
    density = rule.mask(plan.grid.frames).density
    sites = tuple(replace(s, rule=rule, density=density, reason="uniform") for s in plan.sites)
    return replace(plan, sites=sites, reuse=None)
