"""The pictures of a plan's page, as SVG: tile masks, and what every step of a run computes."""

import math
from collections.abc import Mapping, Sequence

from evdit_opt.masks import Rule, TileMask
from evdit_opt.page.html import Html, join, tag
from evdit_opt.plan import Plan

__all__ = ["MAX_DRAWN_FRAMES", "MAX_MASKS", "draw_mask", "draw_steps", "mask_symbols"]

MAX_DRAWN_FRAMES = 128
"""More tiles than this a side nobody can see; a plan from a stranger may ask for 4096."""

MAX_MASKS = 64
"""Different masks that are drawn; plans of this package have at most 8."""

FULL_WEIGHT = math.log(16)
"""Log-weight of a tile that is drawn in full colour; weight 1 is drawn in half of it."""


def mask_symbols(plan: Plan) -> tuple[Html, Mapping[Rule | None, str]]:
    """Every different mask once, to be shown by reference.

    Returns:
        The hidden drawing that holds them, and the id of each rule's (None: dense).
    """
    frames = min(plan.grid.frames, MAX_DRAWN_FRAMES)
    others = (second.rule for second in plan.second_rules.values())
    distinct = list(dict.fromkeys((*(site.rule for site in plan.sites), *others)))[:MAX_MASKS]
    ids = {rule: f"mask-{n}" for n, rule in enumerate(distinct)}
    box = f"0 0 {frames} {frames}"
    symbols = [tag("symbol", _tiles(rule, frames), id=ids[rule], viewBox=box) for rule in distinct]
    return tag("svg", *symbols, class_="hidden", aria_hidden="true"), ids


def draw_mask(identity: str, label: str) -> Html:
    """One of the symbols; ``label`` is read out in its place."""
    picture = tag("use", href=f"#{identity}")
    return tag("svg", tag("title", label), picture, class_="mask", role="img")


def draw_steps(modes: Sequence[str], levels: Sequence[float]) -> Html:
    """What every step asks of the sites that reuse: a box a step, high where attention is dense."""
    boxes = [
        tag(
            "rect",
            tag("title", f"step {n + 1}, noise level {level:.5g}: {mode}"),
            x=n,
            y=6 if mode == "reuse" else 0,
            width=0.9,
            height=4 if mode == "reuse" else 10,
            class_=f"step-{mode}",
        )
        for n, (mode, level) in enumerate(zip(modes, levels, strict=True))
    ]
    return tag(
        "svg",
        *boxes,
        viewBox=f"0 0 {len(boxes)} 10",
        preserveAspectRatio="none",
        class_="steps",
        role="img",
        aria_label="what each step computes",
    )


def _tiles(rule: Rule | None, frames: int) -> Html:
    ground = tag("rect", width=frames, height=frames, class_="dropped")
    if rule is not None and rule.keeps_nothing:
        return ground
    mask = TileMask.full(frames) if rule is None else rule.mask(frames)
    intervals, weights = mask.segments()
    paths: dict[float, list[str]] = {}
    for n, weight in enumerate(weights):
        row, start, stop = intervals[3 * n : 3 * n + 3]
        paths.setdefault(weight, []).append(f"M{start} {row}h{stop - start}v1h{start - stop}z")
    kept = [
        tag("path", d="".join(path), class_="kept", fill_opacity=f"{_strength(weight):.2f}")
        for weight, path in paths.items()
    ]
    return join(ground, *kept)


def _strength(log_weight: float) -> float:
    return min(1.0, 0.5 + 0.5 * max(log_weight, 0.0) / FULL_WEIGHT)
