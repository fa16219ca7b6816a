"""How many prompts calibration needs: plans made on few and on many, on the same held-out clips.

    python -m benchmarks.calibration_prompts

TinyWan. Efficient-vDiT says that masks depend on the data little; here the whole plan is at stake:
rules, refresh steps, how residuals are carried on. Every plan is searched on the prompts it was
given; the few are among the many. Plans and dense clips are kept in ``--folder``.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.frontier import ROOT, SEED, add_clips, describe, interval
from evdit_opt.calibrate.draft import Drafter
from evdit_opt.calibrate.kinds import Planner
from evdit_opt.calibrate.make import choose_kind, make_problem
from evdit_opt.calibrate.prices import kept_pairs
from evdit_opt.calibrate.record import record
from evdit_opt.calibrate.stage import staged
from evdit_opt.calibrate.survey import survey_attention
from evdit_opt.config import Config
from evdit_opt.demo.clips import HELD_OUT, TRAINED
from evdit_opt.demo.tinywan import TINYWAN_CALL, load_tinywan
from evdit_opt.models import as_denoiser
from evdit_opt.plan import Plan
from evdit_opt.versions import installed_versions

OUTPUT = ROOT / "benchmarks/results/cpu/calibration_prompts.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, nargs="+", default=[4, 32])
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--density", type=float, default=0.3)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/calibration_prompts")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    config = Config(calib_steps=arguments.steps, pipe_kwargs=TINYWAN_CALL)
    texts = [TRAINED[n * 7 % len(TRAINED)].caption() for n in range(max(arguments.prompts))]
    held_out = [HELD_OUT[n % len(HELD_OUT)].caption() for n in range(arguments.clips)]
    denoiser = as_denoiser(load_tinywan(), texts, TINYWAN_CALL)
    survey = survey_attention(denoiser)
    rows: list[dict[str, Any]] = []
    with staged(denoiser, survey.layouts, survey.scoped) as stage:
        dense = []
        for n, prompt in enumerate(held_out):
            clip = arguments.folder / f"dense_{arguments.steps}_{n}.pt"
            if not clip.exists():
                torch.save(denoiser.run(prompt, SEED + n, arguments.steps), clip)
            dense.append(torch.load(clip))
        for count in arguments.prompts:
            path = arguments.folder / f"{count}_prompts_{arguments.density}.evdit.json"
            if not path.exists():
                recording = record(stage, texts[:count], config, survey.grid_source.input)
                prices = kept_pairs(recording.errors, recording.reuse)
                problem = make_problem(recording, prices, config, denoiser.model)
                planner = Planner(Drafter(denoiser, survey, config), recording, problem)
                rehearsed = texts[: min(count, config.trial_prompts)]
                _, drafted = choose_kind(stage, planner, arguments.density, rehearsed)
                (drafted.plan if drafted else planner.all_dense()).save(path)
            plan = Plan.load(path)
            row: dict[str, Any] = {"prompts": count, "density": plan.density, **describe(plan)}
            row |= {metric: [] for metric in ("psnr_db", "ssim", "flicker_ratio", "caption")}
            add_clips(row, stage, plan, held_out, dense, arguments.steps)
            rows.append(row)
            difference = np.array(rows[0]["psnr_db"]) - np.array(row["psnr_db"])
            row["fewest_minus_this_db"] = float(difference.mean())
            row["ci95_fewest_minus_this_db"] = interval(difference.tolist())
            told = {key: row[key] for key in ("prompts", "mean_psnr_db", "fewest_minus_this_db")}
            print(told, row["ci95_fewest_minus_this_db"], flush=True)
            report = {
                "what": "held-out clips under plans calibrated on few and on many prompts",
                "steps": arguments.steps, "target": arguments.density,
                "trial_prompts": config.trial_prompts, "rows": rows,
                "versions": installed_versions(),
            }  # fmt: skip
            OUTPUT.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
