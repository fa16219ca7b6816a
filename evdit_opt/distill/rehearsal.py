"""A dry run: shapes are tried, memory and time are estimated, nothing is kept."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from evdit_opt.distill.loop import Numbers, recomputing
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
        training_gib: gradients, the optimizer's two averages and, where there is one, that of the
            weights, in the weights' precision.
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

    def __init__(self, shape: tuple[int, ...], captions: tuple[str, ...]) -> None:
        self.shape, self.captions = shape, list(captions)
        self.texts: dict[str, dict[str, torch.Tensor]] = {}

    def take(self, numbers: list[int]) -> torch.Tensor:
        return torch.randn(len(numbers), *self.shape)

    def shuffled(self, number: int, seed: int) -> int:
        return number % len(self.captions)


def rehearse(run: Finetuning) -> list[Rehearsal]:
    """One forward and backward of every training stage; weights stay as they are.

    Before its plan is there, knowledge distillation is not tried: it has nothing to be sparse with.

    Raises:
        EvditError: whatever would stop the real run early.
    """
    found = []
    made_up: Any = _MadeUp(run.shape, run.prompts)
    for index, name in enumerate(run.config.stages):
        if name == "search" or (name == "knowledge" and run.plan is None):
            continue
        with (
            run.losses(index, made_up) as (losses, settings),
            recomputing(run.model, settings.checkpointing),
        ):
            total = settings.batch * settings.accumulate
            numbers = Numbers(step=0, samples=tuple(range(settings.batch)), total=total)
            device = next(run.model.parameters()).device.type
            on_gpu = device == "cuda"
            copies = 3 if settings.average is None else 4
            for _ in range(2):
                begin = time.perf_counter()
                with settings.autocast(device):
                    loss = losses(run.model, numbers)["loss"]
                loss.backward()
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
                    training_gib=copies * sum(v.numel() * v.element_size() for v in values) / 2**30,
                    peak_gib=torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
                    seconds=seconds * settings.accumulate * settings.steps,
                )
            )
    return found
