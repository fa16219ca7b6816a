"""Knowledge distillation of a student that reuses residuals from step to step."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from evdit_opt.apply import apply_plan
from evdit_opt.distill.config import FinetuneConfig
from evdit_opt.distill.knowledge import SiteOutputs
from evdit_opt.distill.loop import Losses, Numbers, TrainingConfig, train
from evdit_opt.distill.segments import segments_of
from evdit_opt.distill.stages import Setting, knowledge_stage
from evdit_opt.plan import Plan
from evdit_opt.plan_records import TrendPoint
from evdit_opt.reuse import with_reuse
from tests.models.timed_toy import CLOSE, TimedToy, reused_attention
from tests.models.toy_dit import GRID, TEXT, make_plan, toy_rules
from tests.often import often

SHAPE = (4, GRID.frames, 2 * GRID.height, 2 * GRID.width)
SITES = tuple(toy_rules())
SEGMENTS = segments_of(FlowMatchEulerDiscreteScheduler(shift=3.0), segments=4, full_steps=12)
LEVELS = SEGMENTS.timesteps[list(SEGMENTS.edges[:-1])].tolist()
EVERY_SECOND = (LEVELS[0], LEVELS[2])
PROMPTS = ("one", "two", "three")


class Denoiser(TimedToy):
    """Its 16 numbers a token are the 4 channels of a patch of 2 x 2."""

    def forward(self, hidden_states: Any, text: Any, timestep: Any) -> torch.Tensor:
        tokens = super().forward(hidden_states, text, timestep)
        patches = tokens.unflatten(1, (GRID.frames, GRID.height, GRID.width)).unflatten(
            4, (4, 2, 2)
        )
        return patches.permute(0, 4, 1, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)


def bind(model: Denoiser, prompts: Sequence[str]) -> Any:
    rows = [torch.randn(TEXT, 8, generator=torch.Generator().manual_seed(len(p))) for p in prompts]
    text = torch.stack(rows)
    return lambda sample, timestep: model(sample, text, timestep.expand(len(sample)))


def models() -> tuple[Denoiser, Denoiser]:
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        made.append(Denoiser())
    return made[0].requires_grad_(False), made[1]


def stage(teacher: Denoiser, student: Denoiser, plan: Plan, batch: int = 1) -> Losses:
    """The stage, the plan applied to the student."""
    conditions: Any = SimpleNamespace(shape=SHAPE, bind=bind)
    setting = Setting(
        config=FinetuneConfig(folder=Path("none"), knowledge=TrainingConfig(steps=8, batch=batch)),
        segments=SEGMENTS,
        conditions=conditions,
        prompts=PROMPTS,
        device=torch.device("cpu"),
    )
    watched, wanted = SiteOutputs(student, SITES), SiteOutputs(teacher, SITES)
    apply_plan(student, plan, inner="eager")
    return knowledge_stage(setting, teacher, watched, wanted, 1.0, plan.reuse)


def numbers(step: int, rows: tuple[int, ...] = (0,), total: int = 1) -> Numbers:
    return Numbers(step=step, samples=tuple(step * total + row for row in rows), total=total)


def plan_of(model: Denoiser, trend: tuple[TrendPoint, ...] = ()) -> Plan:
    plan = with_reuse(make_plan(model, toy_rules()), EVERY_SECOND)
    assert plan.reuse is not None
    return replace(plan, reuse=replace(plan.reuse, trend=trend))


def test_a_step_is_taught_in_the_mode_it_will_run_in() -> None:
    """Against an uncompiled second implementation, called where the teacher went."""
    teacher, student = models()
    heard: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    handle = teacher.register_forward_hook(
        lambda _, given, output: heard.append((*given[:2], output))
    )
    losses = stage(teacher, student, plan_of(student))
    found = [float(losses(student, numbers(step))["output"]) for step in range(8)]
    handle.remove()
    residuals: dict[str, torch.Tensor] = {}
    for step, (sample, text, target) in enumerate(heard):
        mode = dict.fromkeys(SITES, ("refresh", "reuse")[step % 2])
        with reused_attention(teacher, toy_rules(), mode, residuals):
            output = teacher(sample, text, torch.tensor([LEVELS[step % 4]]))
        wanted = float((output - target).square().mean())
        # the square of a difference that is off by CLOSE
        off = 2 * CLOSE * wanted**0.5 + CLOSE**2
        assert found[step] == pytest.approx(wanted, rel=0, abs=off)
        assert (found[step] > 1e-6) is (step % 2 == 1)  # a refresh is dense, as the teacher is


@pytest.mark.parametrize("trend", often(["carried on"], {"kept": False, "carried on": True}))
def test_what_a_step_teaches_depends_on_its_number_alone(trend: bool) -> None:
    """Also with forwards of a step in turn, more of them than generations that are kept."""
    points = tuple(TrendPoint(level=level, damping=1.0) for level in LEVELS) if trend else ()
    teacher, student = models()
    plan = plan_of(student, points)
    losses = stage(teacher, student, plan)
    straight = {
        (step, row): float(losses(student, numbers(step, (row,), 6))["loss"].detach())
        for step in range(8)
        for row in range(6)
    }
    assert len(set(straight.values())) > 8
    for step, row in ((3, 4), (7, 0), (1, 5)):
        teacher, student = models()
        fresh = stage(teacher, student, plan)
        assert (
            float(fresh(student, numbers(step, (row,), 6))["loss"].detach()) == straight[step, row]
        )


def test_a_resumed_training_repeats_the_uninterrupted_one(tmp_path: Path) -> None:
    """Stopped between a refresh and the step that reuses it."""
    weights = []
    for stops in ((8,), (3, 8)):
        for steps in stops:
            teacher, student = models()
            config = TrainingConfig(steps=8, batch=1, learning_rate=1e-3, warmup=1, save_every=1)
            losses = stage(teacher, student, plan_of(student))
            folder = tmp_path / str(len(stops))
            for record in train(student, losses, config, folder):
                if record["step"] == steps:
                    break
        weights.append(student.state_dict())
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name])
