"""What a plan loses at another size than it was calibrated at, against one calibrated there.

    nice python -m benchmarks.retarget               # all sizes; a size that is done is kept
    python benchmarks/quote_retarget.py

A plan calibrated at TinyWan's own size is retargeted to 0.75 and 1.5 times its frames and to
another aspect ratio; beside it one calibrated at that size, in the same way, for the density the
retargeted plan has there. The demo's plan, which was calibrated on more runs, is retargeted too.
All run on held-out prompts and are compared with the dense clips of the same seeds. TinyWan was
trained at one size only: what its dense clips look like at others is not asked here.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from evdit_opt import apply_plan, make_plan
from evdit_opt.demo.clips import HELD_OUT
from evdit_opt.demo.run import CALIBRATION_PROMPTS, DEMO_CONFIG
from evdit_opt.demo.tinywan import TINYWAN_CALL, load_tinywan
from evdit_opt.grid import VideoGrid
from evdit_opt.models import as_denoiser
from evdit_opt.plan import Plan
from evdit_opt.quality import compare, psnr
from evdit_opt.retarget import retarget
from evdit_opt.versions import installed_versions

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "benchmarks/results/cpu/retarget.json"
DEMO = ROOT / "docs/demo/plan.evdit.json"
STEPS, SEED = 20, 3000

# Arguments of the pipeline, latent grid in tokens. At home: 33 frames of 80 x 80, 17 x 10 x 10.
SIZES: dict[str, tuple[dict[str, int], VideoGrid]] = {
    "0.75x frames": ({"num_frames": 25}, VideoGrid(13, 10, 10)),
    "wide": ({"height": 64, "width": 96}, VideoGrid(17, 8, 12)),
    "1.5x frames": ({"num_frames": 49}, VideoGrid(25, 10, 10)),
}


def run(plan: Plan | None, call: dict[str, Any], prompts: list[str]) -> list[torch.Tensor]:
    """Clips of the prompts, dense or under a plan."""
    pipe = load_tinywan()
    if plan is not None:
        apply_plan(pipe, plan, inner="eager", impl="static")
    denoiser = as_denoiser(pipe, prompts, call)
    return [denoiser.run(prompt, SEED + n, STEPS) for n, prompt in enumerate(prompts)]


def calibrate(call: dict[str, Any], density: float) -> Plan:
    """On two of the demo's prompts; kinds of plan are tried on one: as cheap as it can be."""
    config = replace(
        DEMO_CONFIG, density=density, verify_prompts=0, trial_prompts=1, pipe_kwargs=call
    )
    return make_plan(load_tinywan(), CALIBRATION_PROMPTS[:2], config)


def measure(name: str, home: Plan, demo: Plan, clips: int) -> dict[str, Any]:
    """The row of one size."""
    changed, grid = SIZES[name]
    call = {**TINYWAN_CALL, **changed}
    moved = retarget(home, grid)
    there = calibrate(call, moved.plan.density)
    assert there.grid == grid, there.grid
    prompts = [HELD_OUT[n % len(HELD_OUT)].caption() for n in range(clips)]
    dense = run(None, call, prompts)
    found: dict[str, Any] = {
        "size": name, "call": changed, "grid": [grid.frames, grid.height, grid.width],
        "extrapolated": list(moved.extrapolated),
    }  # fmt: skip
    plans = {"retargeted": moved.plan, "there": there, "demo": retarget(demo, grid).plan}
    for what, own in plans.items():
        videos = run(own, call, prompts)
        flickers = compare(videos, dense).flicker_ratio
        found[what] = {
            "density": own.density,
            "plan": own.fingerprint()[:12],
            "psnr_db": [psnr(a, b) for a, b in zip(videos, dense, strict=True)],
            "flicker_ratio": None if flickers is None else flickers.mean,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=4)
    arguments = parser.parse_args()
    demo = Plan.load(DEMO)
    report = json.loads(OUTPUT.read_text()) if OUTPUT.exists() else None
    if report is None:
        home = calibrate(TINYWAN_CALL, 0.2734)  # the demo's density
        report = {
            "home": json.loads(home.to_json()), "demo": demo.fingerprint(), "rows": [],
            "clips": arguments.clips, "steps": STEPS, "seed": SEED,
            "versions": installed_versions(),
        }  # fmt: skip
    home = Plan.from_json(json.dumps(report["home"]))
    for name in SIZES:
        if name not in [row["size"] for row in report["rows"]]:
            report["rows"].append(measure(name, home, demo, arguments.clips))
        OUTPUT.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
