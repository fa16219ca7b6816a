"""What the compiler makes of every video transformer in the tests, for docs/models.md.

python -m benchmarks.models.measure_models [names ...]
python benchmarks/models/table.py
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Rows, environment
from evdit_opt.apply import apply_plan, report
from evdit_opt.calibrate.survey import survey_attention
from evdit_opt.errors import EvditError, LayoutError, NoVideoAttentionError
from evdit_opt.models import as_denoiser
from tests.models.case import Case, Shape
from tests.models.comparison import Reference, compare_gradients, far, plan_of
from tests.models.detection import SHAPES, detection
from tests.models.small_models import BY_NAME

RESULTS = Path(__file__).parents[1] / "results" / "cpu" / "models.json"

Part = Callable[[Case], dict[str, Any]]


def detect(case: Case) -> dict[str, Any]:
    """Sites found in the usual configuration and in three random ones."""
    found = {}
    for name, shape in SHAPES.items():
        denoiser = as_denoiser(case.model(shape), [case.inputs(shape)])
        grid = shape.grid if case.source is None and not case.refused else None
        try:
            survey: Any = survey_attention(denoiser, grid)
        except (NoVideoAttentionError, LayoutError) as error:
            survey = error
        found[name] = detection(case, shape, survey)
        torch._dynamo.reset()
    return found


@torch.no_grad()
def run(case: Case) -> dict[str, Any]:
    """How far a model with a plan is from the masked one, and in how many graphs it runs."""
    shape = Shape()
    model, call = case.model(shape), case.inputs(shape)
    reference = Reference(case, model, call, shape)
    apply_plan(model, plan_of(case, model, shape), inner="eager")
    error = far(model(**call)[0], reference.out)
    return {
        "error": error,
        "bound": reference.bound,
        "gap": reference.gap,
        "graphs": report(model).graphs,
        "rewritten": len(report(model).rewritten),
    }


def backward(case: Case) -> dict[str, Any]:
    """The same for the gradients of all parameters."""
    return compare_gradients(case, Shape())


PARTS: dict[str, Part] = {"detection": detect, "forward": run, "backward": backward}
"""Column groups of the page. Another one is a function here and a cell in table.py."""


def measure(case: Case) -> dict[str, Any]:
    """The record of one case."""
    row: dict[str, Any] = {"class": case.kind, "tokens": case.tokens}
    for name, part in PARTS.items():
        if name != "detection" and case.refused:
            continue
        try:
            row[name] = part(case)
        except EvditError as error:
            row[name] = {"refused": str(error)}
        torch._dynamo.reset()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="configurations; default: those without a record")
    names = parser.parse_args().names
    rows = Rows(RESULTS, environment("cpu"))
    for name in names or [name for name in BY_NAME if name not in rows]:
        start = time.process_time()
        rows.add(name, measure(BY_NAME[name]))
        print(f"{name}: {time.process_time() - start:.0f} s of CPU time", flush=True)


if __name__ == "__main__":
    main()
