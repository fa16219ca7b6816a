"""What plans of equal density do to TinyWan's clips: ours, static masks, and output caching.

    python benchmarks/frontier.py --steps 20 --clips 8

Training-free. Every variant makes the same held-out clips from the same noise as the dense model;
PSNR with a 95% bootstrap interval over clips. Ours and the searched static plan are calibrated on
other prompts, for the density; fixed rules take the densest one that does not exceed it.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from evdit_opt.calibrate.draft import Drafter
from evdit_opt.calibrate.kinds import Planner
from evdit_opt.calibrate.make import make_problem
from evdit_opt.calibrate.record import record
from evdit_opt.calibrate.stage import Stage, staged
from evdit_opt.calibrate.survey import survey_attention
from evdit_opt.config import Config
from evdit_opt.demo.clips import HELD_OUT, TRAINED
from evdit_opt.demo.detect import caption_accuracy
from evdit_opt.demo.tinywan import TINYWAN_CALL, load_tinywan
from evdit_opt.masks import CACHED, Rule
from evdit_opt.models import as_denoiser
from evdit_opt.plan import Plan
from evdit_opt.quality import compare, psnr
from evdit_opt.reuse import with_reuse
from evdit_opt.versions import installed_versions

ROOT = Path(__file__).parents[1]
DENSITIES = (0.2, 0.3, 0.4)
SEED = 12000
FAMILIES = {
    "uniform references (paper)": lambda n: Rule(n),
    "uniform references, balanced": lambda n: Rule(n, weighting="balanced"),
    "uniform window": lambda n: Rule(0, n),
    "first frame + window": lambda n: Rule(1, n),
}


def uniform(plan: Plan, rule: Rule) -> Plan:
    density = rule.mask(plan.grid.frames).density
    sites = tuple(replace(s, rule=rule, density=density, reason="uniform") for s in plan.sites)
    return replace(plan, sites=sites, reuse=None)


def caching(plan: Plan, levels: tuple[float, ...], density: float) -> Plan:
    """Every output cached, refreshed at even distances as often as the density allows."""
    steps, count = len(levels), int(density * len(levels) + 1e-9)
    chosen = [levels[n * steps // count] for n in range(count)]
    static = uniform(plan, Rule(1))
    return with_reuse(static, chosen, rule=CACHED, levels=levels)


def variants(planner: Planner, density: float) -> Iterator[tuple[str, Plan]]:
    levels, template = planner.recording.levels, planner.all_dense()
    kinds = planner.kinds()
    for kind in kinds:
        if kind.name.startswith("reuse") and kind.name.endswith("choice 1"):
            found = kind.at(density)
            if found is not None:
                yield "ours", found.plan
    for kind in kinds:
        if kind.name.startswith("searched"):
            found = kind.at(density)
            if found is not None and found.plan.rules:
                yield f"static, {kind.name}", found.plan
    for name, make in FAMILIES.items():
        fitting = [
            plan
            for plan in (uniform(template, make(n)) for n in range(1, template.grid.frames))
            if plan.density <= density + 1e-9
        ]
        if fitting:
            yield name, max(fitting, key=lambda plan: plan.density)
    if density * len(levels) >= 1:
        yield "output caching, even refreshes", caching(template, levels, density)


def judge(
    stage: Stage, plan: Plan, prompts: list[str], dense: list[Any], steps: int
) -> dict[str, Any]:
    clips = stage.rehearse(plan, prompts, SEED, steps)
    quality, accuracy = compare(clips, dense), caption_accuracy([c.numpy() for c in clips], prompts)
    own = np.array([psnr(a, b) for a, b in zip(clips, dense, strict=True)])
    drawn = np.random.default_rng(0).choice(own, (10_000, len(own))).mean(1)
    return {
        "density": plan.density,
        "psnr_db": quality.psnr.mean,
        "psnr_ci95_db": [float(x) for x in np.quantile(drawn, (0.025, 0.975))],
        "ssim": quality.ssim.mean,
        "flicker_ratio": quality.flicker_ratio.mean if quality.flicker_ratio else None,
        "caption": (accuracy.shape + accuracy.colour + accuracy.direction) / 3,
        "rules": sorted({rule.describe(plan.grid.frames) for rule in plan.rules.values()}),
        "refreshes": None
        if plan.reuse is None
        else [n for n, m in enumerate(plan.reuse.modes(plan.reuse.levels)) if m == "refresh"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=3, help="to calibrate on")
    parser.add_argument("--guidance", type=float, default=TINYWAN_CALL["guidance_scale"])
    arguments = parser.parse_args()
    call = {**TINYWAN_CALL, "guidance_scale": arguments.guidance}
    config = Config(windows=(0, 1, 2, 4), calib_steps=arguments.steps, pipe_kwargs=call)
    prompts = [TRAINED[n * 7 % len(TRAINED)].caption() for n in range(arguments.prompts)]
    held_out = [HELD_OUT[n % len(HELD_OUT)].caption() for n in range(arguments.clips)]
    denoiser = as_denoiser(load_tinywan(), prompts, call)
    survey = survey_attention(denoiser)
    name = f"frontier_{arguments.steps}_steps_guidance_{arguments.guidance:g}.json"
    output = ROOT / "benchmarks/results/cpu" / name
    rows: list[dict[str, Any]] = []
    with staged(denoiser, survey.layouts, survey.scoped) as stage:
        found = record(stage, prompts, config, survey.grid_source.input)
        problem = make_problem(found, config, denoiser.model)
        planner = Planner(Drafter(denoiser, survey, config), found, problem)
        dense = [
            denoiser.run(prompt, SEED + n, arguments.steps) for n, prompt in enumerate(held_out)
        ]
        for density in DENSITIES:
            for variant, plan in variants(planner, density):
                row = judge(stage, plan, held_out, dense, arguments.steps)
                rows.append({"target": density, "variant": variant, **row})
                low, high = row["psnr_ci95_db"]
                print(
                    f"{density} {variant:32} {row['density']:.3f} {row['psnr_db']:.1f} dB "
                    f"({low:.1f} to {high:.1f}), flicker {row['flicker_ratio']}",
                    flush=True,
                )
                report = {
                    "steps": arguments.steps, "clips": arguments.clips,
                    "guidance": arguments.guidance, "calibration_prompts": arguments.prompts,
                    "rows": rows, "versions": installed_versions(),
                }  # fmt: skip
                output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
