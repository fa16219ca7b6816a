"""Teach a sparse TinyWan student what its dense self says: knowledge distillation, without data.

    python -m benchmarks.tinywan_knowledge --teacher runs/tinywan/consistency/student.safetensors
    python -m benchmarks.tinywan_knowledge --cost

The first line trains, the second one measures what a training step costs at several densities, in
CPU seconds of one thread.
"""

import argparse
import copy
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.tinywan_training import bound, load_half, save_half
from evdit_opt.apply import apply_plan
from evdit_opt.demo.clips import TRAINED
from evdit_opt.demo.tinywan import LATENT_SHAPE, load_tinywan
from evdit_opt.demo.train_denoiser import encode_prompts
from evdit_opt.distill.consistency import Model, guided
from evdit_opt.distill.knowledge import EdgeWalk, KnowledgeWeights, SiteOutputs, knowledge_losses
from evdit_opt.distill.loop import Numbers, TrainingConfig, train
from evdit_opt.distill.segments import segments_of
from evdit_opt.masks import Rule
from evdit_opt.plan import Plan
from evdit_opt.versions import installed_versions

PLAN = Path(__file__).with_name("tinywan_static.evdit.json")
COST = Path("benchmarks/results/cpu/distillation_cost.json")
FIRST_NOISE = 20_000_000
"""Training clips begin at these noise seeds; evaluation has others."""


def uniform(rule: Rule) -> Plan:
    """The same rule in every site of TinyWan."""
    plan = Plan.load(PLAN)
    density = rule.mask(plan.grid.frames).density
    sites = tuple(
        replace(site, rule=rule, density=density, reason="uniform") for site in plan.sites
    )
    return replace(plan, sites=sites, reuse=None, quality=None, speed=None)


def rule_of(text: str) -> Rule:
    """A rule from "references,window,weighting[,spacing]"."""
    references, window, weighting, *spacing = text.split(",")
    return Rule(int(references), int(window), weighting, *spacing)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", type=Path, help="weights of the dense few-step student")
    parser.add_argument("--rule", default="2,1,balanced")
    parser.add_argument("--plan", type=Path, help="a plan instead of one rule everywhere")
    parser.add_argument("--segments", type=int, default=6)
    parser.add_argument("--guidance", type=float, default=1.0, help="of the teacher's walk")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--output-weight", type=float, default=1.0)
    parser.add_argument("--attention-weight", type=float, default=0.1)
    parser.add_argument(
        "--difference-weight", type=float, default=0.0,
        help="of the squared error of the output's differences from frame to frame",
    )  # fmt: skip
    parser.add_argument("--folder", type=Path, default=Path("runs/tinywan/knowledge"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cost", action="store_true", help="measure the cost of a step instead")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.cost:
        COST.write_text(json.dumps(cost(), indent=2) + "\n")
        return
    pipe = load_tinywan()
    teacher = pipe.transformer.eval().requires_grad_(False)
    if options.teacher is not None:
        load_half(teacher, options.teacher)
    student = copy.deepcopy(teacher).requires_grad_(True)
    plan = Plan.load(options.plan) if options.plan else uniform(rule_of(options.rule))
    sites = tuple(plan.rules)
    watched, wanted = SiteOutputs(student, sites), SiteOutputs(teacher, sites)
    apply_plan(student, plan, inner="eager")
    segments = segments_of(pipe.scheduler, segments=options.segments)
    captions = [label.caption(n % 3) for n, label in enumerate(TRAINED)]
    with torch.no_grad():
        *text, empty = encode_prompts(pipe.tokenizer, pipe.text_encoder, [*captions, ""])

    def clips(walk: int) -> range:
        return range(walk * options.batch, (walk + 1) * options.batch)

    def noise(walk: int) -> torch.Tensor:
        made = [torch.Generator().manual_seed(FIRST_NOISE + clip) for clip in clips(walk)]
        return torch.stack([torch.randn(LATENT_SHAPE, generator=each) for each in made])

    def prompts(walk: int) -> torch.Tensor:
        # 29 is prime to the number of captions, so that neighbours differ in everything
        return torch.stack([text[(29 * clip) % len(captions)] for clip in clips(walk)])

    def leader(walk: int) -> Model:
        without = bound(teacher, empty.expand(options.batch, -1, -1))
        return guided(bound(teacher, prompts(walk)), without, options.guidance)

    walk = EdgeWalk(segments, noise, leader)
    weights = KnowledgeWeights(output=options.output_weight, attention=options.attention_weight)

    def losses(model: nn.Module, numbers: Numbers) -> dict[str, torch.Tensor]:
        sample, points, target = walk.visit(numbers.step)
        texts, given = prompts(numbers.step // len(segments)), segments.model_input(sample, points)
        if options.guidance != 1:  # the student learns the conditional call
            with torch.no_grad():
                target = bound(teacher, texts)(*given)
        theirs = wanted.take()
        call = bound(model, texts)
        if plan.reuse is not None:
            walk.renew(call, plan.reuse)
        output = call(*given)
        found = knowledge_losses(output, watched.take(), target, theirs, weights)
        changes = (output - target).diff(dim=2).square().mean()
        loss = found["loss"] + options.difference_weight * changes
        return {**found, "changes": changes.detach(), "loss": loss}

    config = TrainingConfig(
        steps=options.steps,
        batch=options.batch,
        learning_rate=options.rate,
        warmup=20,
        decay_from=options.steps // 2,
        save_every=25,
    )
    for record in train(student, losses, config, options.folder):
        if record["step"] % 10 == 0:
            print(record, flush=True)
    save_half(student, options.folder / "student.safetensors")


def cost(repeats: int = 3) -> dict[str, Any]:
    """Forward and backward of TinyWan at its 17 latent frames, dense and under uniform plans."""
    dense = load_tinywan().transformer.train()
    rules = ("dense", "4,1,balanced", "2,1,balanced", "1,1,balanced", "0,0,none")
    batch = (torch.randn(1, *LATENT_SHAPE), torch.full((1,), 500.0), torch.randn(1, 16, 64))
    models, densities = {}, {}
    for name in rules:
        model = copy.deepcopy(dense)
        densities[name] = 1.0
        if name != "dense":
            plan = uniform(rule_of(name))
            densities[name] = plan.density
            apply_plan(model, plan, inner="eager")
        models[name] = model
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(repeats + 1):  # the first one traces
        for name, model in models.items():
            begin = time.thread_time()
            sample, timestep, text = batch
            bound(model, text)(sample, timestep).square().mean().backward()
            if repeat:
                seconds[name].append(time.thread_time() - begin)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "what": "forward and backward of TinyWan's transformer, eager, one clip of 1700 tokens",
        "unit": "CPU seconds of one thread, median of interleaved runs on a shared machine",
        "repeats": repeats,
        "rows": [
            {
                "rule": name,
                "density": round(densities[name], 4),
                "cpu_seconds": round(medians[name], 4),
                "of_dense": round(medians[name] / medians["dense"], 4),
                "spread": [round(min(values), 4), round(max(values), 4)],
            }
            for name, values in seconds.items()
        ],
        "versions": installed_versions(),
    }


if __name__ == "__main__":
    main()
