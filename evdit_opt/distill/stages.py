"""The losses of the two training stages, for a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from evdit_opt.distill.conditions import Conditions
from evdit_opt.distill.config import FinetuneConfig
from evdit_opt.distill.consistency import (
    Model,
    consistency_loss,
    consistency_target,
    guided,
)
from evdit_opt.distill.data import LatentShards
from evdit_opt.distill.knowledge import EdgeWalk, SiteOutputs, knowledge_losses
from evdit_opt.distill.loop import Losses, Numbers
from evdit_opt.distill.segments import Segments, annealed_steps
from evdit_opt.plan_records import ReuseRecord

__all__ = ["Setting", "consistency_stage", "knowledge_stage"]

NOISE, DRAW, ORDER = 1, 2, 3
"""Purposes of random numbers; each sample has a stream for each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What both stages need.

    Attributes:
        config: the person's.
        segments: of the schedule.
        conditions: of all prompts, the negative one too.
        prompts: what is trained on.
        device: of the models.
    """

    config: FinetuneConfig
    segments: Segments
    conditions: Conditions
    prompts: Sequence[str]
    device: torch.device

    def noise(self, purpose: int, numbers: Sequence[int]) -> torch.Tensor:
        """[len(numbers), *latent shape] float32, a function of seed, purpose and number."""
        rows = []
        for number in numbers:
            seed = np.random.SeedSequence((self.config.seed, purpose, number))
            generator = torch.Generator().manual_seed(
                int(seed.generate_state(1, np.uint64)[0] >> 1)
            )
            rows.append(torch.randn(self.conditions.shape, generator=generator))
        return torch.stack(rows).to(self.device)


def consistency_stage(setting: Setting, teacher: nn.Module, latents: LatentShards) -> Losses:
    """Multistep consistency distillation with the guided teacher; see consistency.py.

    Args:
        setting: see `Setting`.
        teacher: frozen.
        latents: data; their captions are among the conditions.
    """
    config, segments, conditions = setting.config, setting.segments, setting.conditions
    most = max(b - a for a, b in zip(segments.edges, segments.edges[1:], strict=False))

    def losses(model: nn.Module, numbers: Numbers) -> dict[str, torch.Tensor]:
        chosen = [latents.shuffled(number, config.seed) for number in numbers.samples]
        prompts = [latents.captions[number] for number in chosen]
        progress = numbers.step / config.consistency.steps
        steps = annealed_steps(progress, min(config.first_teacher_steps, most), most)
        draw = segments.draw([(config.seed, DRAW, number) for number in numbers.samples], steps)
        noise = setting.noise(NOISE, numbers.samples)
        sample = segments.noised(latents.take(chosen).to(setting.device), noise, draw.start)
        negative = [config.negative_prompt] * len(prompts)
        guide = guided(
            conditions.bind(teacher, prompts), conditions.bind(teacher, negative), config.guidance
        )
        student = conditions.bind(model, prompts)
        shard = config.consistency.shard
        target = consistency_target(segments, draw, sample, guide, student, always=shard)
        output = student(*segments.model_input(sample, draw.start))
        error = consistency_loss(segments, draw, sample, target, output, config.huber)
        return {"loss": error.mean()}

    return losses


def knowledge_stage(
    setting: Setting,
    teacher: nn.Module,
    watched: SiteOutputs,
    wanted: SiteOutputs,
    guidance: float,
    reuse: ReuseRecord | None,
) -> Losses:
    """A sparse student taught at the edges of its dense teacher's walks; see knowledge.py.

    Args:
        setting: see `Setting`.
        teacher: frozen, dense.
        watched: hooks on the student.
        wanted: hooks on the teacher.
        guidance: 1 after consistency distillation. Else walks are guided, and the student learns
            the conditional call: guidance is folded in later.
        reuse: of the student's plan.
    """
    segments, conditions, count = setting.segments, setting.conditions, len(setting.segments)
    walks: dict[tuple[int, ...], EdgeWalk] = {}  # by the rows of a step: accumulation interleaves

    def clips(walk: int, numbers: Numbers) -> list[int]:
        return [walk * numbers.total + row for row in numbers.rows]

    def prompts(walk: int, numbers: Numbers) -> list[str]:
        every, chosen = len(setting.prompts), []
        for clip in clips(walk, numbers):
            epoch, position = divmod(clip, every)
            order = np.random.default_rng((setting.config.seed, ORDER, epoch)).permutation(every)
            chosen.append(setting.prompts[int(order[position])])
        return chosen

    def leader(walk: int, numbers: Numbers) -> Model:
        negative = [setting.config.negative_prompt] * len(numbers.rows)
        texts = prompts(walk, numbers)
        return guided(conditions.bind(teacher, texts), conditions.bind(teacher, negative), guidance)

    def begin(numbers: Numbers) -> EdgeWalk:
        return EdgeWalk(
            segments,
            lambda walk: setting.noise(NOISE, clips(walk, numbers)),
            lambda walk: leader(walk, numbers),
        )

    def losses(model: nn.Module, numbers: Numbers) -> dict[str, torch.Tensor]:
        if numbers.rows not in walks:
            walks[numbers.rows] = begin(numbers)
        sample, points, target = walks[numbers.rows].visit(numbers.step)
        texts = prompts(numbers.step // count, numbers)
        if guidance != 1:
            with torch.no_grad():
                given = segments.model_input(sample, points)
                target = conditions.bind(teacher, texts)(*given)
        theirs = wanted.take()
        student = conditions.bind(model, texts)  # one condition, so its calls are one generation
        if reuse is not None:
            walks[numbers.rows].renew(student, reuse)
        output = student(*segments.model_input(sample, points))
        return knowledge_losses(output, watched.take(), target, theirs, setting.config.weights)

    return losses
