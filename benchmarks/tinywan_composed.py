"""Few single calls under a plan against 50 guided dense steps: CPU time of the denoising loop.

    python -m benchmarks.tinywan_composed

Both shipped six-step students: the one taught to be sparse under its static mask, and the dense one
under the plan that calibration found for it. All are compiled by Inductor, or none (--eager). One
thread and its CPU time, so that other work on the machine shows little; the runs are interleaved.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.tinywan_knowledge import rule_of, uniform
from benchmarks.tinywan_training import load_half
from evdit_opt import FewStepScheduler
from evdit_opt.apply import apply_plan
from evdit_opt.demo.tinywan import TINYWAN_CALL, load_tinywan
from evdit_opt.plan import Plan
from evdit_opt.versions import installed_versions

OUTPUT = Path("benchmarks/results/cpu/composed.json")
STUDENTS = Path("benchmarks/students")
STEPS = 6
PROMPT = "a red circle moving left"


@torch.no_grad()
def seconds(pipe: Any, steps: int, guidance: float) -> float:
    """CPU seconds of one denoising run, text encoding and all, without decoding."""
    begin = time.process_time()
    pipe(
        PROMPT,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        **{**TINYWAN_CALL, "guidance_scale": guidance},
    )
    return time.process_time() - begin


def students() -> dict[str, tuple[Path, Plan]]:
    """By name: weights, and the plan they run under."""
    return {
        "distilled, 2,1,balanced": (
            STUDENTS / "tinywan_6_steps_sparse.safetensors", uniform(rule_of("2,1,balanced"))
        ),
        "calibrated for density 0.4": (
            STUDENTS / "tinywan_6_steps.safetensors",
            Plan.load(STUDENTS / "tinywan_6_steps_0.4.evdit.json"),
        ),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full-steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="compile none of them")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    teacher, found = load_tinywan(), students()
    if not options.eager:
        teacher.transformer.compile()
    pipes = {}
    for name, (weights, plan) in found.items():
        pipe = pipes[name] = load_tinywan()
        load_half(pipe.transformer, weights)
        pipe.scheduler = FewStepScheduler(pipe.scheduler, steps=STEPS, segments=STEPS)
        apply_plan(pipe.transformer, plan, inner="eager" if options.eager else "inductor")
        seconds(pipe, STEPS, 1.0)  # compiles
    guidance = TINYWAN_CALL["guidance_scale"]
    seconds(teacher, 2, guidance)
    long: list[float] = []
    short: dict[str, list[float]] = {name: [] for name in pipes}
    for _ in range(options.repeats):
        long.append(seconds(teacher, options.full_steps, guidance))
        for name, pipe in pipes.items():
            short[name] += [seconds(pipe, STEPS, 1.0) for _ in range(3)]
    result = {
        "what": "TinyWan's denoising loop: dense with guidance, against sparse few-step students",
        "unit": "CPU seconds of one thread on a shared machine, median of interleaved runs",
        "compiled": not options.eager,
        "full_steps": options.full_steps,
        "calls": [2 * options.full_steps, STEPS],
        "dense_cpu_seconds": [round(value, 3) for value in long],
        "rows": [
            {
                "name": name,
                "density": round(plan.density, 4),
                "cpu_seconds": [round(value, 3) for value in short[name]],
                "ratio": round(statistics.median(long) / statistics.median(short[name]), 2),
            }
            for name, (_, plan) in found.items()
        ],
        "ratio_of_calls": round(2 * options.full_steps / STEPS, 2),
        "versions": installed_versions(),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
