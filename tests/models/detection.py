"""What is found in a model, next to what should be."""

from typing import Any

from evdit_opt.calibrate.survey import Survey
from tests.models.case import Case, Shape, random_shape

SHAPES = {"usual": Shape(), **{f"random{seed}": random_shape(seed) for seed in (1, 2, 3)}}


def detection(case: Case, shape: Shape, found: Survey | Exception) -> dict[str, Any]:
    """The result of a survey, or the error it ended with, for the documentation."""
    expected = case.layouts(shape)
    if isinstance(found, Exception):
        return {"expected": len(expected), "found": 0, "false": 0, "error": str(found)}
    layouts = {
        (layout.prefix, layout.grid.tokens, layout.suffix): None
        for layout in found.layouts.values()
    }
    reasons: dict[str, int] = {}
    for attention in found.attentions:
        if not attention.is_site:
            reasons[attention.reason] = reasons.get(attention.reason, 0) + 1
    return {
        "expected": len(expected),
        "found": len(set(expected) & set(found.layouts)),
        "false": len(set(found.layouts) - set(expected)),
        "layouts": [list(layout) for layout in layouts],
        "evidence": sorted(set(found.evidence.values())),
        "grid": found.grid_source.kind,
        "fullgraph": found.fullgraph,
        "scoped": len(found.scoped),
        "refused": reasons,
    }
