"""The two training losses: every process and every forward has its own clips, at any step."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from evdit_opt.distill.config import FinetuneConfig
from evdit_opt.distill.knowledge import KnowledgeWeights, SiteOutputs
from evdit_opt.distill.loop import Numbers, TrainingConfig
from evdit_opt.distill.segments import segments_of
from evdit_opt.distill.stages import Setting, consistency_stage, knowledge_stage

PROMPTS = ("one", "two", "three", "four", "five")
SHORT = TrainingConfig(steps=4, batch=2)


class Talking(nn.Module):
    """A model of one layer that remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.site = nn.Linear(6, 6)
        self.heard: list[tuple[str, ...]] = []

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.site(sample) + timestep[:, None] / 1000)


def bind(model: Talking, prompts):
    def call(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        model.heard.append(tuple(prompts))
        shift = torch.tensor([[float(len(prompt))] for prompt in prompts])
        return model(sample + shift, timestep)

    return call


def setting(**changes: object) -> Setting:
    usual: dict = {"consistency": SHORT, "knowledge": SHORT, "guidance": 3.0}
    conditions: object = SimpleNamespace(shape=(6,), bind=bind)
    return Setting(
        config=FinetuneConfig(folder=Path("none"), **{**usual, **changes}),
        segments=segments_of(FlowMatchEulerDiscreteScheduler(), segments=3, full_steps=12),
        conditions=conditions,
        prompts=PROMPTS,
        device=torch.device("cpu"),
    )


def numbers(step: int, rows: tuple[int, ...], total: int = 4) -> Numbers:
    return Numbers(step=step, samples=tuple(step * total + row for row in rows), total=total)


ONE = numbers(1, (0,))


class Latents:
    captions = tuple(f"{prompt}!" for prompt in PROMPTS)

    def shuffled(self, number: int, seed: int) -> int:
        return number % len(self.captions)

    def take(self, chosen: list[int]) -> torch.Tensor:
        return torch.stack([torch.full((6,), float(number)) for number in chosen])


@pytest.mark.parametrize("stage", ["consistency", "knowledge", "guided knowledge"])
@torch.no_grad()
def test_halves_of_a_batch_make_the_whole(stage: str) -> None:
    """So two processes, or two accumulated forwards, train on what one large batch would."""

    def made(model: nn.Module):
        teacher: nn.Module = Talking()
        if stage == "consistency":
            return consistency_stage(setting(), teacher, Latents())
        hooks = SiteOutputs(model, ["site"]), SiteOutputs(teacher, ["site"])
        return knowledge_stage(setting(), teacher, *hooks, 3.0 if stage[0] == "g" else 1.0, None)

    model = Talking()
    model.site.weight.mul_(1.5)
    whole, parts = made(model), made(model)
    # a site's error is relative to the mean square of the batch it is in; the output's is not
    term = "loss" if stage == "consistency" else "output"
    for step in (0, 1, 2, 3, 4):
        one = whole(model, numbers(step, (0, 1, 2, 3)))[term]
        halves = [parts(model, numbers(step, rows))[term] for rows in ((0, 1), (2, 3))]
        assert torch.allclose(one, sum(halves) / 2, rtol=1e-5)
        assert float(one) > 1e-3


@torch.no_grad()
def test_the_student_is_conditional_and_the_teacher_guided() -> None:
    teacher, student = Talking(), Talking()
    consistency_stage(setting(negative_prompt="bad"), teacher, Latents())(
        student, numbers(1, (0, 1, 2, 3))
    )
    asked = ("five!", "one!", "two!", "three!")
    assert set(teacher.heard) == {asked, ("bad",) * 4}
    assert set(student.heard) == {asked}


@torch.no_grad()
def test_knowledge_after_consistency_calls_the_teacher_once_a_step() -> None:
    teacher, student = Talking(), Talking()
    hooks = SiteOutputs(student, ["site"]), SiteOutputs(teacher, ["site"])
    losses = knowledge_stage(setting(), teacher, *hooks, 1.0, None)
    for step in range(6):
        found = losses(student, numbers(step, (0, 1, 2, 3)))
        assert float(found["loss"]) == 0.0  # a copy of its teacher
    assert len(teacher.heard) == len(student.heard) == 6
    assert teacher.heard == student.heard
    assert teacher.heard[0] == teacher.heard[2] != teacher.heard[3]


@torch.no_grad()
def test_huber_is_that_of_the_settings() -> None:
    square, huber = (
        float(consistency_stage(setting(**given), Talking(), Latents())(Talking(), ONE)["loss"])
        for given in ({}, {"huber": 0.3})
    )
    assert square > 1e-3
    assert huber == pytest.approx((square + 0.3**2) ** 0.5 - 0.3)


@torch.no_grad()
def test_the_teacher_begins_with_as_few_steps_as_the_settings_say() -> None:
    """One a segment lands on its edge, where the student has no say."""
    calls = []
    for first in (1, 4):
        student = Talking()
        losses = consistency_stage(setting(first_teacher_steps=first), Talking(), Latents())
        for row in range(8):
            losses(student, numbers(0, (row,), 8))
        calls.append(len(student.heard))
    assert calls[0] == 8 < calls[1]


@torch.no_grad()
def test_the_terms_of_knowledge_count_as_the_settings_say() -> None:
    teacher, student = Talking(), Talking()
    student.site.weight.mul_(1.5)
    hooks = SiteOutputs(student, ["site"]), SiteOutputs(teacher, ["site"])
    weights = KnowledgeWeights(output=0.5, attention=3.0)
    found = knowledge_stage(setting(weights=weights), teacher, *hooks, 1.0, None)(student, ONE)
    wanted = 0.5 * float(found["output"]) + 3.0 * float(found["attention"])
    assert float(found["loss"]) == pytest.approx(wanted)
    assert min(float(found["output"]), float(found["attention"])) > 1e-3
