"""What can be known of a fine-tuning before anything is trained, so that it is said then."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from evdit_opt.config import Config
from evdit_opt.distill.conditions import Conditions
from evdit_opt.distill.config import FinetuneConfig
from evdit_opt.distill.loop import TrainingConfig
from evdit_opt.errors import DistillationError
from evdit_opt.scheduler import FewStepScheduler

__all__ = ["laid_out", "require_one_guidance", "require_scaled"]


def require_one_guidance(config: FinetuneConfig, search: Config) -> None:
    """Refuse arguments of all calls that say something else than the configuration.

    Raises:
        DistillationError: another guidance scale or negative prompt, or a number of steps.
    """
    own = {"guidance_scale": config.guidance, "negative_prompt": config.negative_prompt}
    for name, value in own.items():
        if search.pipe_kwargs.get(name, value) != value:
            raise DistillationError(
                f"expected {name} {value!r} in the arguments of the calls, as the settings of the "
                f"fine-tuning say, got {search.pipe_kwargs[name]!r}; say it there alone, as "
                f"{name.removesuffix('_scale')}"
            )
    if "num_inference_steps" in search.pipe_kwargs:
        raise DistillationError(
            "expected no num_inference_steps in the arguments of the calls; the teacher's is "
            "full_steps, the student's is steps"
        )


def require_scaled(model: nn.Module, stage: str, config: TrainingConfig) -> None:
    """Refuse a model in float16 without a scaled loss: small gradients vanish in it.

    Raises:
        DistillationError: naming the stage.
    """
    half = any(value.dtype == torch.float16 for value in model.parameters())
    if half and not config.fp16:
        raise DistillationError(
            f"expected fp16: true of the {stage} stage for weights in float16, in which small "
            "gradients vanish; set it, or load the pipeline in bfloat16 or float32"
        )


def laid_out(
    pipe: Any, prompts: Sequence[str], config: FinetuneConfig, search: Config
) -> tuple[FewStepScheduler, tuple[int, ...]]:
    """The teacher's schedule as its pipeline lays it out, and the shape of a clip's latents.

    Some pipelines pass noise levels of their own, or a shift that depends on the size of the clip.

    Raises:
        EvditError: the scheduler, the denoiser or its conditions cannot be trained with.
    """
    before, steps = pipe.scheduler, config.full_steps
    whole = FewStepScheduler(before, steps=steps, segments=1, full_steps=steps)
    pipe.scheduler = whole
    try:
        given = (config.negative_prompt, prompts[0])
        found = Conditions(pipe, given, search.pipe_kwargs, steps=steps)
    finally:
        pipe.scheduler = before
    return whole, found.shape
