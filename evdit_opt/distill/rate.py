"""The learning rate of knowledge distillation: by how far the plan is off before training.

On TinyWan 3e-4 is right where a plan is far off, and loses what a plan that is nearly right has;
there a tenth of it gains, or changes nothing certain (docs/notes/ablations.md). The error that
tells the two apart is known after one walk. No other model was measured.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from evdit_opt.distill.loop import Losses, Numbers, TrainingConfig
from evdit_opt.distill.processes import first_process, processes
from evdit_opt.errors import DistillationError
from evdit_opt.whole_file import whole_file

__all__ = ["FAR_OFF", "knowledge_rate"]

logger = logging.getLogger(__name__)

RATE = "rate.json"
FAR_OFF = 0.02
"""Relative squared error of the output: TinyWan's plans had 0.035 and more, or 0.012 and less."""

FAST, GENTLE = 3e-4, 3e-5


def knowledge_rate(
    model: nn.Module, losses: Losses, config: TrainingConfig, edges: int, folder: Path
) -> float:
    """The highest rate of a stage whose ``learning_rate`` is "auto".

    It is decided once: a run that goes on reads it from its folder.

    Args:
        model: the student under its plan, as training finds it.
        losses: of `knowledge_stage`, with "relative".
        config: of the stage.
        edges: steps of a walk.
        folder: of the stage; gets ``rate.json``.

    Raises:
        DistillationError: the file cannot be written or read.
    """
    path = folder / RATE
    with first_process() as mine:
        if mine and not path.exists():
            error = _error(model, losses, config, edges)
            decided = {"relative_error": error, "rate": FAST if error > FAR_OFF else GENTLE}
            _write(path, decided)
            logger.info("the plan is off by %.3g at first: rate %g", error, decided["rate"])
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))["rate"])
    except (OSError, ValueError, KeyError, TypeError) as wrong:
        raise DistillationError(
            f"expected the rate of a stage in {path}, cannot read it: {wrong}; set learning_rate, "
            "or begin in another folder"
        ) from wrong


def _error(model: nn.Module, losses: Losses, config: TrainingConfig, edges: int) -> float:
    """Mean over the first walk; with gradients, so that training runs the same graphs."""
    total = config.batch * config.accumulate * processes().num_processes
    found = 0.0
    for step in range(edges):
        samples = tuple(range(step * total, step * total + config.batch))
        numbers = Numbers(step=step, samples=samples, total=total)
        with config.autocast(next(model.parameters()).device.type):
            found += float(losses(model, numbers)["relative"]) / edges
    return found


def _write(path: Path, decided: Mapping[str, Any]) -> None:
    try:
        with whole_file(path) as partial:
            partial.write_text(json.dumps(decided) + "\n", encoding="utf-8")
    except OSError as error:
        raise DistillationError(
            f"expected to write {path}: {error}; make room and start again"
        ) from error
