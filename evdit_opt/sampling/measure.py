"""Measure where a pipeline's few steps should lie, on trajectories of its long schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from evdit_opt.errors import CalibrationError, NonFiniteOutputError
from evdit_opt.sampling.few_step import FewStepScheduler
from evdit_opt.sampling.placement import best_placement, jump_errors

__all__ = ["measure_jump_errors", "measure_placement"]


def measure_placement(
    pipe: Any,
    prompts: Sequence[str],
    *,
    steps: int,
    full_steps: int = 50,
    seed: int = 0,
    pipe_kwargs: Mapping[str, Any] | None = None,
) -> tuple[float, ...]:
    """Positions for ``FewStepScheduler(pipe.scheduler, steps=steps, placement=...)``.

    Args:
        pipe: a diffusers pipeline that takes ``num_inference_steps`` and ``output_type="latent"``.
        prompts: a few; each costs ``full_steps`` steps.
        steps: how many positions.
        full_steps: length of the trajectory, and of the schedule the positions are made for.
        seed: of the first prompt's noise; the others count up.
        pipe_kwargs: further arguments of the pipeline, its size and guidance scale.

    Returns:
        ``steps`` positions in [0, 1): the jumps with the smallest sum of measured errors.
    """
    errors = measure_jump_errors(
        pipe, prompts, full_steps=full_steps, seed=seed, pipe_kwargs=pipe_kwargs
    )
    return tuple(best_placement(errors, steps))


@torch.no_grad()
def measure_jump_errors(
    pipe: Any,
    prompts: Sequence[str],
    *,
    full_steps: int = 50,
    seed: int = 0,
    pipe_kwargs: Mapping[str, Any] | None = None,
) -> torch.Tensor:
    """`jump_errors`, mean over prompts: ``[full_steps, full_steps + 1]`` float64.

    The trajectory is the wrapped solver's own, and kept in the memory of the latents' device: two
    and a half times ``full_steps`` latents at the peak, one prompt at a time.

    Raises:
        CalibrationError: no prompts.
        NonFiniteOutputError: the model's output is not finite.
    """
    if not prompts:
        raise CalibrationError("expected at least one prompt, got none")
    before = pipe.scheduler
    recorder = _Recorder(before, steps=full_steps, full_steps=full_steps)
    total = torch.zeros(full_steps, full_steps + 1, dtype=torch.float64)
    pipe.scheduler = recorder
    try:
        for n, prompt in enumerate(prompts):
            recorder.samples, recorder.clean, recorder.noise = [], [], []
            pipe(
                prompt,
                generator=torch.Generator().manual_seed(seed + n),
                output_type="latent",
                **{**(pipe_kwargs or {}), "num_inference_steps": full_steps},
            )
            samples = torch.stack(recorder.samples).flatten(1)
            clean, noise = (torch.stack(x).flatten(1) for x in (recorder.clean, recorder.noise))
            total += jump_errors(recorder.levels, samples, clean, noise)
    finally:
        pipe.scheduler = before
    if not bool(total.isfinite().all()):
        raise NonFiniteOutputError(
            "expected finite samples on the whole trajectory, got NaN or infinity; check the "
            "pipeline's precision with its own scheduler first"
        )
    return total / len(prompts)


class _Recorder(FewStepScheduler):
    """The wrapped scheduler as it is; keeps every sample and what the model made of it."""

    samples: list[torch.Tensor]
    clean: list[torch.Tensor]
    noise: list[torch.Tensor]

    def step(
        self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, **extra: Any
    ) -> Any:
        clean, noise = self.predict(model_output, sample, len(self.clean))
        self.clean.append(clean)
        self.noise.append(noise)
        result = super().step(model_output, timestep, sample, **extra)
        after = result[0] if isinstance(result, tuple) else result.prev_sample
        self.samples = [*(self.samples or [sample.to(clean.dtype)]), after.to(clean.dtype)]
        return result
