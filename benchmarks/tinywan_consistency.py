"""Distil TinyWan's 50 guided steps into a few single calls: a multistep consistency student.

    python -m benchmarks.tinywan_consistency --segments 6

Writes the student's weights (float16) and the log below the output folder; go on after a kill by
the same command. `benchmarks/tinywan_students.py` measures it.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.tinywan_knowledge import rule_of, uniform
from benchmarks.tinywan_training import World, bound, load_half, parse_phase, save_half, seeds
from evdit_opt.apply import apply_plan
from evdit_opt.demo.tinywan import TINYWAN_CALL
from evdit_opt.distill.consistency import consistency_loss, consistency_target, guided
from evdit_opt.distill.loop import Losses, Numbers, TrainingConfig, train
from evdit_opt.distill.segments import Segments, annealed_steps, segments_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--segments", type=int, default=6)
    parser.add_argument("--full-steps", type=int, default=50)
    parser.add_argument(
        "--phases",
        nargs="+",
        default=["500:3-5:8:5e-4:250", "150:17-17:2:3e-4:150", "50:17-17:2:3e-4:1"],
        help="steps:frames:batch:rate:decay_from, one after the other",
    )
    parser.add_argument("--first-teacher-steps", type=int, default=4)
    parser.add_argument("--huber", type=float, default=None)
    parser.add_argument("--average", type=float, default=None)
    parser.add_argument("--guidance", type=float, default=TINYWAN_CALL["guidance_scale"])
    parser.add_argument("--start", type=Path, help="weights of the student to begin with")
    parser.add_argument("--rule", help="train under this static mask, such as 2,1,balanced")
    parser.add_argument("--latents", type=Path, default=Path("runs/tinywan/pool"))
    parser.add_argument("--folder", type=Path, default=Path("runs/tinywan/consistency"))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    world = World(options.latents)
    if options.start is not None:
        load_half(world.student, options.start)
    if options.rule is not None:
        apply_plan(world.student, uniform(rule_of(options.rule)), inner="eager")
    cut = segments_of(
        world.pipe.scheduler, segments=options.segments, full_steps=options.full_steps
    )
    steps_each = -(-options.full_steps // options.segments)
    started = time.process_time()
    for index, phase in enumerate(map(parse_phase, options.phases)):
        first = options.first_teacher_steps if index == 0 else steps_each
        config = TrainingConfig(
            steps=phase.steps,
            batch=phase.batch,
            learning_rate=phase.rate,
            warmup=30 if index < 2 else 1,
            decay_from=phase.decay_from,
            average=options.average,
        )

        def teacher_steps(step: int, first: int = first, steps: int = phase.steps) -> int:
            return annealed_steps(step / steps, first, steps_each)

        losses = losses_of(
            world, cut, phase.frames, teacher_steps, options.guidance, options.huber, 1000 * index
        )
        for record in train(world.student, losses, config, options.folder / f"phase{index}"):
            if record["step"] % 10 == 0:
                print(index, record, round(time.process_time() - started), flush=True)
        save_half(world.student, options.folder / "student.safetensors")


def losses_of(
    world: World,
    cut: Segments,
    frames: tuple[int, int],
    teacher_steps: Callable[[int], int],
    guidance: float,
    huber: float | None,
    purpose: int,
) -> Losses:
    """The consistency loss on TinyWan's latents."""

    def losses(model: nn.Module, numbers: Numbers) -> dict[str, torch.Tensor]:
        batch = world.batch(numbers, frames)
        draw = cut.draw(seeds(numbers, purpose), teacher_steps(numbers.step))
        sample = cut.noised(batch.latents, batch.noise, draw.start)
        teacher = guided(
            bound(world.teacher, batch.text), bound(world.teacher, batch.empty), guidance
        )
        student = bound(model, batch.text)
        target = consistency_target(cut, draw, sample, teacher, student)
        output = student(*cut.model_input(sample, draw.start))
        error = consistency_loss(cut, draw, sample, target, output, huber)
        return {"loss": error.mean()}

    return losses


if __name__ == "__main__":
    main()
