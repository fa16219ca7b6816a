"""TinyWan in few steps, no training: where the steps lie, and which solver takes them.

Clips are compared with those of the long schedule from the same noise. Positions are measured on
other prompts and noises. "naive" asks the pipeline's own scheduler for fewer steps.

    python benchmarks/few_steps.py && python benchmarks/few_steps.py --quote
"""

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler

from evdit_opt import FewStepScheduler
from evdit_opt.demo.clips import HELD_OUT, TRAINED
from evdit_opt.demo.detect import caption_accuracy
from evdit_opt.demo.tinywan import SHIFT, TINYWAN_CALL, load_tinywan
from evdit_opt.quality import compare
from evdit_opt.sampling.measure import measure_jump_errors
from evdit_opt.sampling.placement import best_placement
from evdit_opt.versions import installed_versions

OUTPUT = Path("benchmarks/results/cpu/few_steps.json")
PAGE = Path("docs/few_steps.md")
BLOCK = re.compile(r"(<!-- measured: .*? -->\n).*?(<!-- /measured -->)", re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--calibration", type=int, default=2)
    parser.add_argument("--full-steps", type=int, default=50)
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--seed", type=int, default=6000)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--quote", action="store_true", help="put the result into the page")
    arguments = parser.parse_args()
    if arguments.quote:
        PAGE.write_text(quote(PAGE.read_text(), json.loads(arguments.output.read_text())))
        return

    start = time.process_time()
    full, pipe = arguments.full_steps, load_tinywan()
    euler = pipe.scheduler
    unipc = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT
    )
    prompts = [HELD_OUT[n % len(HELD_OUT)].caption() for n in range(arguments.clips)]
    long = run(pipe, euler, prompts, arguments.seed, full)
    errors = measure_jump_errors(
        pipe,
        [TRAINED[7 * n % len(TRAINED)].caption() for n in range(arguments.calibration)],
        full_steps=full,
        seed=arguments.seed + 1000,
        pipe_kwargs=TINYWAN_CALL,
    )
    rows = []
    for steps in arguments.steps:
        measured = best_placement(errors, steps)
        schedulers = {
            ("Euler", "naive"): euler,
            ("Euler", "even"): FewStepScheduler(euler, steps=steps, full_steps=full),
            ("Euler", "log_snr"): FewStepScheduler(
                euler, steps=steps, full_steps=full, placement="log_snr"
            ),
            ("Euler", "measured"): FewStepScheduler(
                euler, steps=steps, full_steps=full, placement=measured
            ),
            ("UniPC", "naive"): unipc,
            ("UniPC", "measured"): FewStepScheduler(
                unipc, steps=steps, full_steps=full, placement=measured
            ),
        }
        for (solver, placement), scheduler in schedulers.items():
            clips = run(pipe, scheduler, prompts, arguments.seed, steps)
            quality = compare(clips, long)
            accuracy = caption_accuracy([clip.numpy() for clip in clips], prompts)
            rows.append(
                {
                    "steps": steps,
                    "solver": solver,
                    "placement": placement,
                    "sigmas": [round(float(sigma), 4) for sigma in scheduler.sigmas],
                    "psnr_db": quality.psnr.mean,
                    "psnr_db_stderr": quality.psnr.stderr,
                    "ssim": quality.ssim.mean,
                    "flicker_ratio": quality.flicker_ratio.mean if quality.flicker_ratio else None,
                    "shape": accuracy.shape,
                    "colour": accuracy.colour,
                    "direction": accuracy.direction,
                }
            )
    accuracy = caption_accuracy([clip.numpy() for clip in long], prompts)
    result = {
        "what": "TinyWan in few steps without training, paired with the long Euler schedule",
        "clips": arguments.clips,
        "calibration_prompts": arguments.calibration,
        "full_steps": full,
        "seed": arguments.seed,
        "full": {
            "shape": accuracy.shape,
            "colour": accuracy.colour,
            "direction": accuracy.direction,
        },
        "rows": rows,
        "cpu_seconds": round(time.process_time() - start),
        "versions": installed_versions(),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")


def quote(page: str, result: dict[str, Any]) -> str:
    """docs/few_steps.md with this result in it."""
    text = (
        f"{result['clips']} held-out clips, compared with the {result['full_steps']}-step Euler "
        "clips of the same noise; mean ± standard error.\n"
        f"Positions were measured on {result['calibration_prompts']} other prompts, on Euler's "
        'trajectory also for UniPC. "naive" asks the\nwrapped scheduler for fewer steps.\n\n'
    )
    return BLOCK.sub(lambda match: f"{match[1]}{text}{table(result)}\n{match[2]}", page)


def table(result: dict[str, Any]) -> str:
    """One row for each run."""
    lines = [
        "| steps | solver | placement | noise levels | PSNR dB | SSIM | flicker / long |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        levels = " ".join(f"{sigma:.2f}" for sigma in row["sigmas"][:-1])
        error = row["psnr_db_stderr"]  # none for a single clip
        psnr = f"{row['psnr_db']:.1f}" + ("" if error is None else f" ± {error:.1f}")
        cells = (row["steps"], row["solver"], row["placement"], levels, psnr)
        flicker = "" if row["flicker_ratio"] is None else f"{row['flicker_ratio']:.2f}"
        lines.append(f"| {' | '.join(map(str, cells))} | {row['ssim']:.3f} | {flicker} |")
    return "\n".join(lines)


@torch.no_grad()
def run(pipe: Any, scheduler: Any, prompts: list[str], seed: int, steps: int) -> list[torch.Tensor]:
    """One clip [frames, height, width, 3] in 0..1 for each prompt; seeds count up."""
    pipe.scheduler = scheduler
    return [
        pipe(
            prompt,
            generator=torch.Generator().manual_seed(seed + n),
            num_inference_steps=steps,
            output_type="pt",
            **TINYWAN_CALL,
        )
        .frames[0]
        .permute(0, 2, 3, 1)
        for n, prompt in enumerate(prompts)
    ]


if __name__ == "__main__":
    main()
