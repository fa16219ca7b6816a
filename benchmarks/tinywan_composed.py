"""Few single calls under a plan against 50 guided dense steps: CPU time of the denoising loop.

    python -m benchmarks.tinywan_composed --weights runs/tinywan/knowledge/student.safetensors

Both are compiled by Inductor, or neither (--eager). One thread and its CPU time, so that other work
on the machine shows little; the runs are interleaved.
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
from evdit_opt.versions import installed_versions

OUTPUT = Path("benchmarks/results/cpu/composed.json")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--rule", default="2,1,balanced")
    parser.add_argument("--segments", type=int, default=6)
    parser.add_argument("--full-steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="compile neither of them")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    teacher, student = load_tinywan(), load_tinywan()
    load_half(student.transformer, options.weights)
    steps = options.segments
    student.scheduler = FewStepScheduler(student.scheduler, steps=steps, segments=steps)
    plan = uniform(rule_of(options.rule))
    if not options.eager:
        teacher.transformer.compile()
    apply_plan(student.transformer, plan, inner="eager" if options.eager else "inductor")
    guidance = TINYWAN_CALL["guidance_scale"]
    seconds(teacher, 2, guidance)  # compiles
    seconds(student, steps, 1.0)
    long, short = [], []
    for _ in range(options.repeats):
        long.append(seconds(teacher, options.full_steps, guidance))
        short += [seconds(student, steps, 1.0) for _ in range(3)]
    ratio = statistics.median(long) / statistics.median(short)
    result = {
        "what": "TinyWan's denoising loop: dense with guidance, against a sparse few-step student",
        "unit": "CPU seconds of one thread on a shared machine, median of interleaved runs",
        "compiled": not options.eager,
        "full_steps": options.full_steps,
        "calls": [2 * options.full_steps, steps],
        "density": round(plan.density, 4),
        "dense_cpu_seconds": [round(value, 3) for value in long],
        "student_cpu_seconds": [round(value, 3) for value in short],
        "ratio": round(ratio, 2),
        "ratio_of_calls": round(2 * options.full_steps / steps, 2),
        "versions": installed_versions(),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
