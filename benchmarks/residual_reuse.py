"""Residual reuse on TinyWan, against static masks: the same held-out clips, seeds and steps.

    python benchmarks/residual_reuse.py quality
    python benchmarks/residual_reuse.py speed

Quality against the dense clips, mean density over the steps (a refresh computes the dense attention
and the mask: 1 + density), and the time of a whole denoising run, dense and reusing compiled alike.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evdit_opt import apply_plan, restore
from evdit_opt.demo.clips import HELD_OUT
from evdit_opt.demo.detect import caption_accuracy
from evdit_opt.demo.tinywan import TINYWAN_CALL, load_tinywan
from evdit_opt.masks import Rule
from evdit_opt.models import as_denoiser
from evdit_opt.plan import Plan
from evdit_opt.quality import compare
from evdit_opt.reuse import refresh_every, with_reuse
from evdit_opt.versions import installed_versions

ROOT = Path(__file__).parents[1]


def generate(pipe: Any, prompts: list[str], steps: int) -> list[np.ndarray]:
    run = as_denoiser(pipe, prompts, TINYWAN_CALL).run
    return [run(prompt, 5000 + n, steps).numpy() for n, prompt in enumerate(prompts)]


def static(plan: Plan, rule: Rule) -> Plan:
    density = rule.mask(plan.grid.frames).density
    sites = tuple(replace(s, rule=rule, density=density) for s in plan.sites)
    return replace(plan, sites=sites)


def variants(plan: Plan, levels: list[float]) -> dict[str, Plan]:
    """Static masks and reuse at about the same cost, and some cheaper and dearer."""
    own, window = Rule(0), Rule(0, 1)
    made = {
        "static: calibrated plan": plan,
        "static: 2 references (paper)": static(plan, Rule(2)),
    }
    for every in (2, 4, 5, 10):
        refresh_at = refresh_every(levels, every)
        made[f"own frame, refresh every {every}"] = with_reuse(plan, refresh_at, rule=own)
    made["window 1, refresh every 5"] = with_reuse(plan, refresh_every(levels, 5), rule=window)
    return made


def seconds(pipe: Any, prompt: str, steps: int) -> float:
    start = time.perf_counter()
    pipe(prompt, num_inference_steps=steps, output_type="latent", **{
        name: value for name, value in TINYWAN_CALL.items() if name != "output_type"
    })  # fmt: skip
    return time.perf_counter() - start


def measure_quality(plan: Plan, levels: list[float], clips: int, steps: int) -> dict[str, Any]:
    """Every variant's clips against the dense ones of the same seeds."""
    pipe = load_tinywan()
    prompts = [HELD_OUT[n % len(HELD_OUT)].caption() for n in range(clips)]
    dense = generate(pipe, prompts, steps)
    rows = []
    for name, variant in variants(plan, levels).items():
        apply_plan(pipe.transformer, variant, inner="eager")
        made = generate(pipe, prompts, steps)
        restore(pipe.transformer)
        quality, accuracy = compare(made, dense), caption_accuracy(made, prompts)
        row = {
            "variant": name,
            "density": variant.density_over(levels),
            "psnr_db": quality.psnr.mean,
            "psnr_stderr": quality.psnr.stderr,
            "ssim": quality.ssim.mean,
            "flicker_ratio": quality.flicker_ratio.mean if quality.flicker_ratio else None,
            "caption": [accuracy.shape, accuracy.colour, accuracy.direction],
        }
        rows.append(row)
        print(f"{name:42} density {row['density']:.3f} PSNR {row['psnr_db']:.1f} "
              f"flicker {row['flicker_ratio']:.2f}", flush=True)  # fmt: skip
    return {"clips": clips, "rows": rows}


def measure_speed(plan: Plan, levels: list[float], name: str, steps: int) -> dict[str, Any]:
    """Median seconds of a denoising run, dense and reusing in turn, both compiled."""
    dense, reusing = load_tinywan(), load_tinywan()
    dense.transformer.compile(dynamic=False)
    apply_plan(reusing.transformer, variants(plan, levels)[name])
    prompt = HELD_OUT[0].caption()
    times: dict[str, list[float]] = {"dense": [], "reusing": []}
    for round_ in range(6):
        for which, pipe in (("dense", dense), ("reusing", reusing)):
            took = seconds(pipe, prompt, steps)
            if round_:
                times[which].append(took)
    median = {which: statistics.median(took) for which, took in times.items()}
    print(f"{name}: denoising run {median['dense']:.2f} -> {median['reusing']:.2f} s")
    return {"variant": name, "threads": torch.get_num_threads(), **median}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["quality", "speed"])
    parser.add_argument("--clips", type=int, default=6)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--timed", default="own frame, refresh every 5")
    arguments = parser.parse_args()
    steps = arguments.steps
    output = ROOT / f"benchmarks/results/cpu/residual_reuse_{steps}_steps.json"
    report = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}

    plan = Plan.load(ROOT / "benchmarks/tinywan_static.evdit.json")
    scheduler = load_tinywan().scheduler
    scheduler.set_timesteps(steps)
    levels = [float(level) for level in scheduler.timesteps]
    if arguments.part == "quality":
        report["quality"] = measure_quality(plan, levels, arguments.clips, steps)
    else:
        report["speed"] = measure_speed(plan, levels, arguments.timed, steps)
    report |= {"steps": steps, "versions": dict(installed_versions())}
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
