"""What plans of equal density do to TinyWan's clips: ours, static masks, and output caching.

    python -m benchmarks.frontier --steps 20 --clips 64

Training-free. Every variant makes the same held-out clips from the same noise as the dense model.
Ours is calibrated on other prompts. Everything that is done is kept in ``--folder`` (plans, dense
clips) and in the JSON (numbers of every clip), so that a run may be interrupted, and repeated with
more clips. Runs are not compiled: what is compared is the clips.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.rivals import output_caching, output_forecasting, static_rivals
from evdit_opt.calibrate.draft import Drafter
from evdit_opt.calibrate.kinds import Planner
from evdit_opt.calibrate.make import choose_kind, make_problem
from evdit_opt.calibrate.prices import kept_pairs
from evdit_opt.calibrate.record import Recording, record
from evdit_opt.calibrate.search import choose_rules, threshold_for_budget
from evdit_opt.calibrate.stage import Stage, staged
from evdit_opt.calibrate.survey import survey_attention
from evdit_opt.config import Config
from evdit_opt.demo.clips import HELD_OUT, TRAINED
from evdit_opt.demo.detect import caption_accuracy
from evdit_opt.demo.tinywan import TINYWAN_CALL, load_tinywan
from evdit_opt.models import as_denoiser
from evdit_opt.plan import Plan
from evdit_opt.quality import flicker_ratio, psnr, ssim
from evdit_opt.versions import installed_versions

ROOT = Path(__file__).parents[1]
SEED = 12000
METRICS = ("psnr_db", "ssim", "flicker_ratio")
REUSE = ("ours", "output caching, even refreshes", "output forecasting, even refreshes")
"""Compared on all clips; the static masks, which are far below, on fewer."""


def paper_search(planner: Planner, density: float) -> Plan | None:
    """Algorithm 1 of Efficient-vDiT over the paper's own masks."""
    errors = {
        site: tuple(
            c for c in own
            if (c.rule.window, c.rule.weighting, c.rule.spacing) == (0, "none", "paper")
        )
        for site, own in planner.recording.errors.items()
    }  # fmt: skip
    threshold = threshold_for_budget(errors, planner.prices, density)
    plan = planner.drafter.draft(choose_rules(errors, planner.prices, threshold), errors, threshold)
    return plan if plan.density <= density + 1e-9 else None


def variants(
    stage: Stage, planner: Planner, prompts: list[str], density: float, kept: Path
) -> dict[str, Plan]:
    """All plans that are compared at a density; what calibration chose is kept."""
    found: dict[str, Plan] = {}
    without = replace(planner, problem=replace(planner.problem, max_reusing=0))
    for name, own in (("ours", planner), ("ours without reuse", without)):
        path = kept / f"{name.replace(' ', '_')}_{density}.evdit.json"
        if not path.exists():
            _, drafted = choose_kind(stage, own, density, prompts)
            (drafted.plan if drafted else planner.all_dense()).save(path)
        found[name] = Plan.load(path)
    template = planner.all_dense()
    cached = output_caching(template, planner.recording.levels, density)
    others = {
        "output caching, even refreshes": cached,
        "output forecasting, even refreshes": output_forecasting(cached) if cached else None,
        "threshold search (paper)": paper_search(planner, density),
        **dict(static_rivals(template, density)),
    }
    return found | {name: plan for name, plan in others.items() if plan is not None}


def interval(values: list[float]) -> list[float]:
    """95% bootstrap interval of the mean."""
    drawn = np.random.default_rng(0).choice(np.array(values), (10_000, len(values))).mean(1)
    return [float(x) for x in np.quantile(drawn, (0.025, 0.975))]


def add_clips(
    row: dict[str, Any], stage: Stage, plan: Plan, prompts: list[str], dense: list[torch.Tensor],
    steps: int,
) -> None:  # fmt: skip
    """Make the clips that a row lacks."""
    for n in range(len(row["psnr_db"]), len(prompts)):
        [clip] = stage.rehearse(plan, [prompts[n]], SEED + n, steps)
        right = caption_accuracy([clip.numpy()], [prompts[n]])
        row["psnr_db"].append(round(psnr(clip, dense[n]), 3))
        row["ssim"].append(round(ssim(clip, dense[n]), 5))
        row["flicker_ratio"].append(round(flicker_ratio(clip, dense[n]), 4))
        row["caption"].append(round((right.shape + right.colour + right.direction) / 3, 4))
    for metric in METRICS:
        row[f"mean_{metric}"] = float(np.nanmean(row[metric]))
        row[f"ci95_{metric}"] = interval([x for x in row[metric] if x == x])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--static-clips", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=3, help="to calibrate on")
    parser.add_argument("--guidance", type=float, default=TINYWAN_CALL["guidance_scale"])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.2, 0.3, 0.4, 0.6])
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/frontier")
    arguments = parser.parse_args()
    steps, call = arguments.steps, {**TINYWAN_CALL, "guidance_scale": arguments.guidance}
    name = f"frontier_{steps}_steps_guidance_{arguments.guidance:g}"
    kept, output = arguments.folder / name, ROOT / f"benchmarks/results/cpu/{name}.json"
    kept.mkdir(parents=True, exist_ok=True)
    config = Config(
        references=(1, 2, 3, 4, 6, 8), windows=(0, 1, 2, 4), calib_steps=steps, pipe_kwargs=call
    )
    prompts = [TRAINED[n * 7 % len(TRAINED)].caption() for n in range(arguments.prompts)]
    held_out = [HELD_OUT[n % len(HELD_OUT)].caption() for n in range(arguments.clips)]
    denoiser = as_denoiser(load_tinywan(), prompts, call)
    survey = survey_attention(denoiser)
    rows: list[dict[str, Any]] = json.loads(output.read_text())["rows"] if output.exists() else []
    with staged(denoiser, survey.layouts, survey.scoped) as stage:
        recorded = kept / "recording.pt"
        if not recorded.exists():
            torch.save(record(stage, prompts, config, survey.grid_source.input), recorded)
        recording: Recording = torch.load(recorded, weights_only=False)  # our own file
        problem = make_problem(
            recording, kept_pairs(recording.errors, recording.reuse), config, denoiser.model
        )
        planner = Planner(Drafter(denoiser, survey, config), recording, problem)
        dense: list[torch.Tensor] = []
        for n, prompt in enumerate(held_out):
            clip = kept / f"dense_{n}.pt"
            if not clip.exists():
                torch.save(denoiser.run(prompt, SEED + n, steps), clip)
            dense.append(torch.load(clip))
        for density in arguments.densities:
            for variant, plan in variants(stage, planner, prompts[:2], density, kept).items():
                count = arguments.clips if variant in REUSE else arguments.static_clips
                if not count:
                    continue
                key = {"target": density, "variant": variant, "plan": plan.fingerprint()}
                row = next((r for r in rows if r.items() >= key.items()), None)
                if row is None:
                    rows[:] = [r for r in rows if (r["target"], r["variant"]) != (density, variant)]
                    row = {**key, "density": plan.density, **describe(plan)}
                    row |= {metric: [] for metric in (*METRICS, "caption")}
                    rows.append(row)
                add_clips(row, stage, plan, held_out[:count], dense, steps)
                low, high = row["ci95_psnr_db"]
                print(
                    f"{density} {variant:32} {row['density']:.3f} {row['mean_psnr_db']:.2f} dB "
                    f"({low:.1f} to {high:.1f}), flicker {row['mean_flicker_ratio']:.2f}, "
                    f"{len(row['psnr_db'])} clips",
                    flush=True,
                )
                report = {
                    "steps": steps, "guidance": arguments.guidance,
                    "calibration_prompts": arguments.prompts, "rows": rows,
                    "versions": installed_versions(),
                }  # fmt: skip
                output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def describe(plan: Plan) -> dict[str, Any]:
    """What a plan does, in words."""
    frames, reuse = plan.grid.frames, plan.reuse
    modes = () if reuse is None else reuse.modes(reuse.levels)
    return {
        "rules": {s.name: s.describe(frames) for s in plan.sites},
        "refreshes": [step for step, mode in enumerate(modes) if mode == "refresh"],
        "trial": plan.calibration.trials[0].name if plan.calibration.trials else None,
    }


if __name__ == "__main__":
    main()
