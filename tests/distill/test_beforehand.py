"""What is said before anything is trained, and the schedule that a pipeline lays out."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from evdit_opt import Config, FewStepScheduler
from evdit_opt.distill.beforehand import laid_out, require_one_guidance, require_scaled
from evdit_opt.distill.config import FinetuneConfig
from evdit_opt.distill.loop import TrainingConfig
from evdit_opt.distill.segments import cut
from evdit_opt.errors import DistillationError

CONFIG = FinetuneConfig(folder=Path("run"), full_steps=12, guidance=3.0)


class Shifting:
    """A pipeline that passes noise levels of its own, and a shift that depends on the size."""

    def __init__(self) -> None:
        self.transformer = nn.Identity()
        self.scheduler: Any = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)

    def __call__(
        self,
        prompt: str,
        num_inference_steps: int = 50,
        guidance_scale: float = 5.0,
        generator: torch.Generator | None = None,
        output_type: str = "np",
    ) -> SimpleNamespace:
        n = num_inference_steps
        self.scheduler.set_timesteps(sigmas=[1 - k / n for k in range(n)], mu=1.2)
        sample = torch.zeros(1, 4, 3, 2, 2)
        for timestep in self.scheduler.timesteps:
            self.transformer(hidden_states=sample, timestep=timestep.expand(1))
        return SimpleNamespace(frames=sample)


def test_training_visits_the_points_that_the_pipeline_samples_at() -> None:
    pipe = Shifting()
    own = pipe.scheduler
    whole, shape = laid_out(pipe, ("a",), CONFIG, Config())
    assert pipe.scheduler is own
    assert shape == (4, 3, 2, 2)
    segments = cut(whole, segments=4)
    pipe.scheduler = few = FewStepScheduler(own, steps=4, segments=4, full_steps=12)
    few.set_timesteps(sigmas=[1 - k / 12 for k in range(12)], mu=1.2)
    assert segments.timesteps[list(segments.edges[:-1])].tolist() == few.timesteps.tolist()
    assert segments.alpha[list(segments.edges)].tolist() == list(few.levels.alpha)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"guidance_scale": 6.0}, "guidance_scale 3.0 .*got 6.0; say it there alone, as guidance"),
        ({"negative_prompt": "bad"}, "got 'bad'; say it there alone, as negative_prompt"),
        ({"num_inference_steps": 50}, "no num_inference_steps"),
    ],
    ids=str,
)
def test_a_call_that_contradicts_the_settings_is_refused(given: dict, message: str) -> None:
    with pytest.raises(DistillationError, match=message):
        require_one_guidance(CONFIG, Config(pipe_kwargs=given))
    require_one_guidance(CONFIG, Config(pipe_kwargs={"guidance_scale": 3.0, "height": 16}))
    require_one_guidance(replace(CONFIG, negative_prompt="bad"), Config())


def test_weights_in_float16_need_a_scaled_loss() -> None:
    model = nn.Linear(2, 2).half()
    with pytest.raises(DistillationError, match="fp16: true of the knowledge stage"):
        require_scaled(model, "knowledge", TrainingConfig(steps=1))
    require_scaled(model, "knowledge", TrainingConfig(steps=1, fp16=True))
    require_scaled(model.bfloat16(), "knowledge", TrainingConfig(steps=1))
