"""The points of a teacher's schedule, cut into the segments of a multistep consistency model.

Source: Heek et al., Multistep Consistency Models (arXiv 2403.06807), Algorithm 1. Index 0 is pure
noise here, as in `evdit_opt.sampling`; training visits exactly the points that `FewStepScheduler`
samples with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from evdit_opt.errors import DistillationError
from evdit_opt.sampling.levels import clean_and_noise, convention_of, prediction_type_of
from evdit_opt.sampling.settings import FewStepSettings

__all__ = ["Draw", "Segments", "annealed_steps", "cut", "segments_of"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """Where each sample of a batch is trained: from point ``start`` by way of ``next`` to ``edge``.

    All are int64 ``[batch]``, with start < next <= edge.
    """

    start: torch.Tensor
    next: torch.Tensor
    edge: torch.Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Segments:
    """A schedule of n points and the terminal one, and which of them are edges.

    Attributes:
        timesteps: what the model is told at each point, float32 ``[n]``.
        alpha: what the clean sample is multiplied with, float64 ``[n + 1]``.
        sigma: standard deviation of the noise, float64 ``[n + 1]``.
        edges: indices, from 0 to n, one more than there are segments.
        prediction: what the model predicts, one of `evdit_opt.sampling.levels.PREDICTIONS`.
        convention: of the noise levels, see `evdit_opt.sampling.levels.convention_of`.
    """

    timesteps: torch.Tensor
    alpha: torch.Tensor
    sigma: torch.Tensor
    edges: tuple[int, ...]
    prediction: str
    convention: str

    def __len__(self) -> int:
        """Number of segments: the calls of the model that a clip takes."""
        return len(self.edges) - 1

    def points(self, segment: int, steps: int) -> list[int]:
        """Points of one segment when a teacher takes ``steps`` steps in it, both edges included."""
        first, last = self.edges[segment : segment + 2]
        count = min(steps, last - first)
        return [first + round(k * (last - first) / count) for k in range(count + 1)]

    def draw(self, seeds: list[tuple[int, ...]], steps: int) -> Draw:
        """A segment and a teacher's step in it for each sample, both uniform.

        Args:
            seeds: one tuple of integers for each sample, which decides its draw.
            steps: teacher steps a segment; at most all there are.
        """
        rows = []
        for seed in seeds:
            random = np.random.default_rng(seed)
            points = self.points(int(random.integers(len(self))), steps)
            k = int(random.integers(len(points) - 1))
            rows.append((points[k], points[k + 1], points[-1]))
        start, following, edge = (torch.tensor(column) for column in zip(*rows, strict=True))
        return Draw(start=start, next=following, edge=edge)

    def level(self, points: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha and sigma at ``points`` [batch], shaped and typed to multiply ``like``."""
        shape = (-1,) + (1,) * (like.ndim - 1)
        alpha, sigma = (
            values[points.to(values.device)].to(like).reshape(shape)
            for values in (self.alpha, self.sigma)
        )
        return alpha, sigma

    def noised(self, clean: torch.Tensor, noise: torch.Tensor, points: torch.Tensor) -> Any:
        """``alpha clean + sigma noise`` at ``points`` [batch]; like ``clean``."""
        alpha, sigma = self.level(points, clean)
        return alpha * clean + sigma * noise

    def model_input(
        self, sample: torch.Tensor, points: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the model is given at ``points`` [batch]: the scaled sample, and timesteps [batch].

        A sample's scale differs from the model's input where noise levels explode (EulerDiscrete).
        """
        timesteps = self.timesteps.to(sample.device)[points.to(sample.device)]
        if self.convention == "exploding":
            alpha, sigma = self.level(points, sample)
            sample = sample / torch.hypot(alpha, sigma)
        return sample, timesteps

    def predict(
        self, output: torch.Tensor, sample: torch.Tensor, points: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Clean sample and noise that a model's output says are in ``sample`` at ``points``."""
        if self.convention == "inverted flow":
            output = -output
        alpha, sigma = self.level(points, sample)
        return clean_and_noise(self.prediction, output.to(sample.dtype), sample, alpha, sigma)

    def weight(self, points: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """What turns a squared error of the clean sample into one of the velocity, like ``like``.

        SNR + 1 of Heek et al., that is the loss of v-prediction; for flow matching 1 / sigma^2, the
        loss of its own velocity.
        """
        alpha, sigma = self.level(points, like)
        if self.convention.endswith("flow"):
            return sigma**-2
        return (alpha**2 + sigma**2) / sigma**2


def segments_of(
    scheduler: Any,
    *,
    segments: int,
    full_steps: int = 50,
    time_shift: float = 1.0,
    placement: str | tuple[float, ...] = "even",
    mu: float | None = None,
) -> Segments:
    """Segments of a diffusers scheduler, the ones ``FewStepScheduler`` samples in.

    Args:
        scheduler: the teacher's, see ``FewStepScheduler``; it is not changed.
        segments: how many.
        full_steps: of the teacher's schedule; its smallest steps are those of training.
        time_shift: see ``FewStepScheduler``.
        placement: see ``FewStepScheduler``.
        mu: of schedulers with dynamic shifting.

    Raises:
        UnsupportedInputError: a scheduler that cannot be wrapped.
        SchedulerError: a setting out of range, or epsilon prediction at pure noise.
    """
    from evdit_opt.scheduler import FewStepScheduler

    whole = FewStepScheduler(scheduler, steps=full_steps, segments=1, full_steps=full_steps)
    whole.set_timesteps(full_steps, mu=mu)
    return cut(whole, segments=segments, time_shift=time_shift, placement=placement)


def cut(
    whole: Any,
    *,
    segments: int,
    time_shift: float = 1.0,
    placement: str | tuple[float, ...] = "even",
) -> Segments:
    """Segments of a schedule that is laid out, by `segments_of` or by a pipeline.

    Args:
        whole: a ``FewStepScheduler`` with a step for each point, after ``set_timesteps``.
        segments: how many.
        time_shift: see ``FewStepScheduler``.
        placement: see ``FewStepScheduler``.
    """
    levels, points = whole.levels, len(whole.timesteps)
    settings = FewStepSettings(
        steps=segments,
        segments=segments,
        full_steps=points,
        placement=placement,
        time_shift=time_shift,
    )
    indices, _ = settings.indices(levels)
    return Segments(
        timesteps=whole.timesteps.float().cpu(),
        alpha=torch.tensor(levels.alpha, dtype=torch.float64),
        sigma=torch.tensor(levels.sigma, dtype=torch.float64),
        edges=(*indices, points),
        prediction=prediction_type_of(whole.wrapped),
        convention=convention_of(whole.wrapped),
    )


def annealed_steps(progress: float, first: int, last: int) -> int:
    """Teacher steps a segment, growing log-linearly with ``progress`` from 0 to 1.

    Few large steps carry information fast, many small ones are exact (Heek et al., section 3.2).

    Raises:
        DistillationError: if ``first`` is not in 1 to ``last``.
    """
    if not 1 <= first <= last:
        raise DistillationError(
            f"expected 1 <= first <= last teacher steps a segment, got {first} and {last}"
        )
    share = min(max(progress, 0.0), 1.0)
    return round(math.exp(math.log(first) * (1 - share) + math.log(last) * share))
