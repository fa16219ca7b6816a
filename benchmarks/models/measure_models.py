"""What the compiler makes of every video transformer in the tests, for docs/models.md.

python -m benchmarks.models.measure_models [names ...] [--part export]
python benchmarks/models/table.py
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Rows, environment
from evdit_opt.apply import apply_plan, report
from evdit_opt.calibrate.survey import survey_attention
from evdit_opt.errors import EvditError, LayoutError, NoVideoAttentionError
from evdit_opt.export import export_program
from evdit_opt.models import as_denoiser, config_hash
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


@torch.no_grad()
def export(case: Case, standard_ops: bool) -> dict[str, Any]:
    """How far the exported model is from the optimized one that runs eagerly."""
    shape = Shape()
    model, call = case.model(shape), case.inputs(shape)
    reference, plan = Reference(case, model, call, shape), plan_of(case, model, shape)
    plan = replace(plan, model_config_hash=config_hash(model))
    exported = export_program(model, call, plan, standard_ops=standard_ops).module()(**call)[0]
    optimized = apply_plan(model, plan, inner="eager")(**call)[0]
    return {
        "error": far(exported, optimized),
        "bound": reference.bound,
        "gap": far(reference.dense, optimized),
    }


PARTS: dict[str, Part] = {
    "detection": detect,
    "forward": run,
    "backward": backward,
    "export": partial(export, standard_ops=False),
    "export_aten": partial(export, standard_ops=True),
}
"""Column groups of the page. Another one is a function here and a cell in table.py."""


def measure(case: Case, parts: Sequence[str]) -> dict[str, Any]:
    """The record of one case."""
    row: dict[str, Any] = {"class": case.kind, "tokens": case.tokens}
    for name in parts:
        if name != "detection" and case.refused:
            continue
        try:
            row[name] = PARTS[name](case)
        except EvditError as error:
            row[name] = {"refused": str(error)}
        torch._dynamo.reset()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="configurations; default: those without a record")
    parser.add_argument("--part", choices=PARTS, help="measure this only, and keep the rest")
    asked = parser.parse_args()
    rows = Rows(RESULTS, environment("cpu"))
    names = asked.names or [
        name for name, case in BY_NAME.items()
        if name not in rows or not (case.refused or asked.part in (None, *rows[name]))
    ]  # fmt: skip
    for name in names:
        start = time.process_time()
        if asked.part is None:
            rows.add(name, measure(BY_NAME[name], tuple(PARTS)))
        else:
            row = {**rows[name], **measure(BY_NAME[name], (asked.part,))}
            if asked.part in row:  # the other parts stay of the commit that the row is of
                row[asked.part]["commit"] = rows.content["environment"]["commit"]
            rows.add(name, row)
        print(f"{name}: {time.process_time() - start:.0f} s of CPU time", flush=True)


if __name__ == "__main__":
    main()
