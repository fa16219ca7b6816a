"""A dry run: shapes are tried, memory and time are estimated, nothing is kept."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from evdit_opt.distill.conditions import Conditions
from evdit_opt.distill.loop import Numbers
from evdit_opt.distill.pipeline import Finetuning

__all__ = ["Rehearsal", "rehearse"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rehearsal:
    """What one training stage would take.

    Attributes:
        stage: its name.
        trained: numbers trained.
        samples: that it would see, in one process.
        weights_gib: of student and teacher.
        training_gib: gradients and the optimizer's two averages, in the weights' precision.
        peak_gib: most memory of the device at once in a forward and backward; None on a CPU.
        seconds: of the whole stage, from one forward and backward after a first one.
    """

    stage: str
    trained: int
    samples: int
    weights_gib: float
    training_gib: float
    peak_gib: float | None
    seconds: float


class _MadeUp:
    """Noise in place of latents that the teacher has not made yet."""

    def __init__(self, conditions: Conditions, captions: tuple[str, ...]) -> None:
        self.conditions, self.captions = conditions, list(captions)
        self.texts: dict[str, dict[str, torch.Tensor]] = {}

    def take(self, numbers: list[int]) -> torch.Tensor:
        return torch.randn(len(numbers), *self.conditions.shape)

    def shuffled(self, number: int, seed: int) -> int:
        return number % len(self.captions)


def rehearse(run: Finetuning) -> list[Rehearsal]:
    """One forward and backward of every training stage; weights stay as they are.

    Before its plan is there, knowledge distillation is not tried: it has nothing to be sparse with.

    Raises:
        EvditError: whatever would stop the real run early.
    """
    found = []
    conditions = Conditions(run.pipe, run.prompts, run.search.pipe_kwargs)
    made_up: Any = _MadeUp(conditions, run.prompts)
    for index, name in enumerate(run.config.stages):
        if name == "search" or (name == "knowledge" and run.plan is None):
            continue
        with run.losses(index, made_up) as (losses, settings):
            total = settings.batch * settings.accumulate
            numbers = Numbers(step=0, samples=tuple(range(settings.batch)), total=total)
            on_gpu = next(run.model.parameters()).is_cuda
            for _ in range(2):
                begin = time.perf_counter()
                losses(run.model, numbers)["loss"].backward()
                if on_gpu:
                    torch.cuda.synchronize()
                seconds = time.perf_counter() - begin
            run.model.zero_grad()
            values = [value for value in run.model.parameters() if value.requires_grad]
            weights = sum(v.numel() * v.element_size() for v in run.model.parameters())
            found.append(
                Rehearsal(
                    stage=name,
                    trained=run.trained,
                    samples=settings.steps * total,
                    weights_gib=2 * weights / 2**30,
                    training_gib=3 * sum(v.numel() * v.element_size() for v in values) / 2**30,
                    peak_gib=torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
                    seconds=seconds * settings.accumulate * settings.steps,
                )
            )
    return found
