"""What is left of a training on disk: a checkpoint that is always whole, and a line a step.

A checkpoint holds weights, their average, the optimizer, the loss's scale and the step: all that a
step depends on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn

from evdit_opt.distill.sharding import placed_like, placed_optimizer, whole
from evdit_opt.errors import DistillationError
from evdit_opt.whole_file import whole_file

__all__ = [
    "LOG",
    "STATE",
    "TrainingState",
    "append",
    "forget_after",
    "kept",
    "load_state",
    "save_atomically",
]

STATE, LOG = "state.pt", "log.jsonl"


def append(log: Path, record: Mapping[str, Any]) -> None:
    """Write a line."""
    try:
        with log.open("a") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise DistillationError(
            f"expected to write {log}: {error}; {kept(log.parent)} make room and start again"
        ) from error


def load_state(folder: Path) -> dict[str, Any] | None:
    """The last checkpoint in a folder; None if there is none.

    Raises:
        DistillationError: if it cannot be read.
    """
    path = folder / STATE
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, UnpicklingError) as error:
        raise DistillationError(
            f"expected a checkpoint in {path}, cannot read it: {error}"
        ) from error
    return state


def save_atomically(path: Path, state: Mapping[str, Any]) -> None:
    """Write a file so that ``path`` always holds a whole one, also after kill -9 or a full disk."""
    try:
        with whole_file(path) as partial, partial.open("wb") as file:
            torch.save(dict(state), file)
    except (OSError, RuntimeError) as error:
        raise DistillationError(
            f"expected to write {path}: {error}; {kept(path.parent)} make room and start again"
        ) from error


class TrainingState:
    """What a checkpoint holds.

    Args:
        trained: parameters by name.
        optimizer: theirs.
        scaler: of the loss; holds nothing unless float16 is computed in.
        settings: a checkpoint of others is refused.
        samples: a step, in all processes: they number what a step sees.
        decay: of the moving average; None: none.
    """

    def __init__(
        self,
        trained: dict[str, nn.Parameter],
        optimizer: Any,
        scaler: torch.amp.GradScaler,
        settings: Mapping[str, Any],
        samples: int,
        decay: float | None,
    ) -> None:
        self.samples, self.scaler = samples, scaler
        self.trained, self.optimizer, self.settings = trained, optimizer, dict(settings)
        self.decay, self.average = decay, None
        if decay is not None:
            self.average = {name: value.detach().clone() for name, value in trained.items()}
        self.step, self.seconds = 0, 0.0

    def content(self) -> dict[str, Any]:
        """Whole tensors; where they are sharded, all processes have to ask."""
        optimizer = self.optimizer.state_dict()
        optimizer["state"] = {
            number: {name: whole(value) for name, value in values.items()}
            for number, values in optimizer["state"].items()
        }
        average = self.average
        return {
            "step": self.step,
            "seconds": self.seconds,
            "config": self.settings,
            "samples": self.samples,
            "weights": {name: whole(value.detach()) for name, value in self.trained.items()},
            "average": average and {name: whole(value) for name, value in average.items()},
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, folder: Path) -> None:
        state = load_state(folder)
        if state is None:
            return
        if state["config"] != self.settings:
            raise DistillationError(
                f"expected the settings that {folder / STATE} was begun with, {state['config']}, "
                f"got {self.settings}; go on with those, or choose another folder"
            )
        if state.get("samples", self.samples) != self.samples:
            raise DistillationError(
                f"expected {state['samples']} samples a step, as {folder / STATE} was begun with, "
                f"got {self.samples}; launch as many processes as then, or choose another folder"
            )
        if state["weights"].keys() != self.trained.keys():
            raise DistillationError(
                f"expected a checkpoint of the {len(self.trained)} tensors trained here in "
                f"{folder / STATE}, it holds {len(state['weights'])} others; choose another folder"
            )
        with torch.no_grad():
            for name, value in self.trained.items():
                value.copy_(placed_like(state["weights"][name], value))
        parameters = self.trained.values()
        self.optimizer.load_state_dict(placed_optimizer(state["optimizer"], parameters))
        self.scaler.load_state_dict(state.get("scaler", {}))
        if state["average"] is not None:
            average = state["average"]
            self.average = {n: placed_like(average[n], v) for n, v in self.trained.items()}
        self.step, self.seconds = state["step"], state["seconds"]

    @torch.no_grad()
    def update_average(self) -> None:
        if self.average is None or self.decay is None:
            return
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        for name, value in self.trained.items():
            average = self.average[name]
            average.lerp_(value.detach().to(average.device, average.dtype), 1 - decay)

    @torch.no_grad()
    def use_average(self) -> None:
        """Put the average, if there is one, in the place of the weights."""
        for name, value in (self.average or {}).items():
            self.trained[name].copy_(value)


def forget_after(log: Path, step: int) -> None:
    """Drop what a killed run logged after its last checkpoint: those steps are done again."""
    if not log.exists():
        return
    lines = []
    for line in log.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                lines.append(line + "\n")
        except json.JSONDecodeError:
            break  # the line a kill cut off; nothing follows it
    try:
        with whole_file(log) as partial:
            partial.write_text("".join(lines))
    except OSError as error:
        raise DistillationError(
            f"expected to write {log}: {error}; {kept(log.parent)} make room and start again"
        ) from error


def kept(folder: Path) -> str:
    """What an error says about the last checkpoint."""
    state = load_state(folder)
    if state is None:
        return "no checkpoint was written yet;"
    return f"the checkpoint of step {state['step']} is kept in {folder / STATE};"
