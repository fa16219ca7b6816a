"""A plan with residual reuse as ONNX models: a file per mode, and which step runs which of them.

What is kept from step to step belongs to whoever runs the files. How far it is carried on, and
which file is next, follow from the noise level alone, so a table of the steps is all that takes.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evdit_opt.errors import PlanError, PlanMismatchError
from evdit_opt.export.program import export_program
from evdit_opt.export.to_onnx import OPSET, require_packages, write_onnx
from evdit_opt.plan import Plan, ReuseRecord

__all__ = ["Step", "export_onnx_steps", "steps_of"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One step of a run.

    Attributes:
        level: its noise level, in units of the model's timestep argument.
        mode: "dense", "refresh" or "reuse".
        ahead: how much of the last change of the residuals is added to them before a "reuse":
            ``residual + ahead * (residual - residual of the refresh before)``. 0 until there are
            two refreshes, and where the plan has no trend.
    """

    level: float
    mode: str
    ahead: float


def steps_of(record: ReuseRecord, levels: Sequence[float]) -> tuple[Step, ...]:
    """What every step of a run does.

    Args:
        record: of the plan.
        levels: noise levels of all steps, descending; they need not be those of calibration.

    Raises:
        PlanError: if there are no levels, or they do not descend.
    """
    if not levels or any(a <= b for a, b in itertools.pairwise(levels)):
        raise PlanError(f"expected noise levels of a run, in descending order, got {list(levels)}")
    refreshed: tuple[float, ...] = ()
    steps = []
    for level, mode in zip(levels, record.modes(levels), strict=True):
        if mode == "refresh":
            refreshed = (*refreshed[-1:], level)
        ahead = record.ahead(level, refreshed) if mode == "reuse" else 0.0
        steps.append(Step(level=float(level), mode=mode, ahead=ahead))
    return tuple(steps)


def export_onnx_steps(
    target: object,
    kwargs: Mapping[str, Any],
    path: Path,
    plan: Plan,
    *,
    levels: Sequence[float] | None = None,
    opset: int = OPSET,
) -> tuple[Path, ...]:
    """Write the ONNX models of a plan with residual reuse, and a table of its steps.

    For ``wan.onnx``: ``wan.refresh.onnx``, ``wan.reuse.onnx``, ``wan.dense.onnx`` if steps of the
    run are dense, each with all weights it needs, and ``wan.steps.json``. docs/export.md has the
    loop that runs them.

    Args:
        target: as in ``export_onnx``.
        kwargs: arguments of one forward of the denoiser, at whatever noise level.
        path: names the files; not written itself.
        plan: with residual reuse.
        levels: noise levels of all steps, descending; None: of the run the plan was made for.
        opset: as in ``export_onnx``.

    Returns:
        The files, the table first.

    Raises:
        PlanMismatchError: if the plan reuses nothing, or knows no levels and none are given.
        PlanError: as ``steps_of``.
        EvditError: as ``export_onnx``.
    """
    require_packages()
    record = plan.reuse
    if record is None:
        raise PlanMismatchError(
            "expected a plan with residual reuse, this one is the same in every step; use "
            "export_onnx"
        )
    levels = record.levels if levels is None else levels
    if not levels:
        raise PlanMismatchError(
            "expected a plan that knows the noise levels of its run, this one does not; pass "
            "levels to evdit_opt.export.export_onnx_steps, as the scheduler has them"
        )
    steps = steps_of(record, levels)
    # All of them before the first is written: what cannot be exported leaves no file behind.
    programs = {
        mode: export_program(target, kwargs, plan, mode=mode, standard_ops=True)
        for mode in sorted({step.mode for step in steps})
    }
    files = {mode: path.with_name(f"{path.stem}.{mode}.onnx") for mode in programs}
    for mode, program in programs.items():
        write_onnx(program, files[mode], mode=mode, opset=opset)
    table = {
        "timestep": record.timestep,
        "precision": record.precision,
        "steps": [{**asdict(step), "file": files[step.mode].name} for step in steps],
    }
    listed = path.with_name(f"{path.stem}.steps.json")
    listed.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return listed, *files.values()
