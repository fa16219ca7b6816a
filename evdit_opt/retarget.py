"""A plan for clips of another size: the same rules, and what of its evidence no longer holds.

Rules know no resolution, so a plan runs at any size as it is. ``retarget`` writes down what it then
is: masks and densities of the new grid, and no figure that was measured at the old one.
"""

from dataclasses import dataclass, replace

from evdit_opt.errors import PlanMismatchError
from evdit_opt.grid import TokenLayout, VideoGrid
from evdit_opt.plan import Plan, SitePlan
from evdit_opt.second_rule import mean_density

__all__ = ["Retargeted", "retarget"]

MAX_REASON = 1000
MEASURED_AT = "; measured at "

FAR = 2.0
"""Times as many frames, or tokens a frame, from which the old evidence says little."""


@dataclass(frozen=True)
class Retargeted:
    """A plan for another size.

    Attributes:
        plan: it; ``calibrated_at`` is the grid it was calibrated at.
        extrapolated: what is no longer measured but assumed, a sentence each; empty at the same
            grid.
    """

    plan: Plan
    extrapolated: tuple[str, ...]


def retarget(plan: Plan, grid: VideoGrid) -> Retargeted:
    """The plan for clips of another latent grid.

    Args:
        plan: any plan whose grid is read from the call.
        grid: latent frames, rows and columns, in tokens.

    Raises:
        PlanMismatchError: if the plan was made for clips of one size, which its model is not told.
        PlanError: if the grid is too large.
    """
    if grid == plan.grid:
        return Retargeted(plan, ())
    if plan.grid_source.kind == "given":
        raise PlanMismatchError(
            f"expected a plan that reads the size of a clip from the call, this one was made for "
            f"clips of {_size(plan.grid)} tokens only; calibrate at {_size(grid)}"
        )
    origin = plan.calibrated_at or plan.grid
    told = [] if grid == origin else _extrapolated(plan, origin, grid)
    found = replace(
        plan,
        sites=tuple(_moved(site, origin, grid) for site in plan.sites),
        grid=grid,
        calibrated_at=None if grid == origin else origin,
        reuse=None if plan.reuse is None else replace(plan.reuse, memory=None),
        calibration=replace(plan.calibration, trials=(), explored=(), held_out_error=None),
        quality=None,
        speed=None,
        predicted=None,
    )
    return Retargeted(found, tuple(told))


def _moved(site: SitePlan, origin: VideoGrid, grid: VideoGrid) -> SitePlan:
    if site.rule is None:
        return replace(site, errors=())
    layout = TokenLayout(grid, site.layout.prefix, site.layout.suffix)
    reason, where = site.reason.split(MEASURED_AT)[0], ""
    if grid != origin:
        where = f"{MEASURED_AT}{_size(origin)} tokens"
    reason = reason[: MAX_REASON - len(where)] + where
    density = mean_density(site.rule, site.second, layout)
    return replace(site, density=density, reason=reason, errors=(), error=None)


def _extrapolated(plan: Plan, origin: VideoGrid, grid: VideoGrid) -> list[str]:
    found = [
        "errors, trials, quality and speed were measured at "
        f"{_size(origin)} tokens; at {_size(grid)} they are not known"
    ]
    for what, old, new in (
        ("latent frames", origin.frames, grid.frames),
        ("tokens a frame", origin.tokens_per_frame, grid.tokens_per_frame),
    ):
        if max(old, new) >= FAR * min(old, new):
            found.append(f"{old} -> {new} {what} is far: calibrate there")
    if grid.frames != origin.frames:
        masks: dict[str, None] = {}
        others = (second.rule for second in plan.second_rules.values())
        for rule in dict.fromkeys((*plan.rules.values(), *others)):
            if not rule.keeps_nothing:
                everything = ", which keeps everything" * rule.mask(grid.frames).is_dense
                was, now = (rule.describe(frames) for frames in (origin.frames, grid.frames))
                masks[f"mask {was} -> {now}{everything}"] = None
        found += masks
    dense = [
        site.name
        for site in plan.sites
        if site.rule is not None
        and TokenLayout(grid, site.layout.prefix, site.layout.suffix).seq_len < plan.min_tokens
    ]
    if dense:
        found.append(f"{len(dense)} sites run dense: fewer than {plan.min_tokens} tokens")
    if any(site.layout.prefix or site.layout.suffix for site in plan.sites):
        found.append("as much text around the video as in calibration")
    if plan.reuse is not None:
        found.append(
            "residuals are renewed at the same noise levels; a scheduler that shifts its levels by "
            "the size of the clip has other steps there"
        )
    return found


def _size(grid: VideoGrid) -> str:
    return f"{grid.frames} x {grid.height} x {grid.width}"
