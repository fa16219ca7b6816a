"""What spacing and weighting of reference frames do to video: uniform masks on TinyWan.

One rule at every site, no training, held-out prompts, same noise as the dense clips. Besides the
quality of the clips, each row has the errors a calibration sees at the sites, so that the two can
be compared: does a per-site error rank masks as the video does?

    python benchmarks/weighting.py --clips 8 --steps 20
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from evdit_opt import Config, apply_plan, restore
from evdit_opt.calibrate.draft import Drafter
from evdit_opt.calibrate.record import record
from evdit_opt.calibrate.stage import staged
from evdit_opt.calibrate.survey import survey_attention
from evdit_opt.calibrate.trial import mean_error
from evdit_opt.demo.clips import HELD_OUT
from evdit_opt.demo.detect import caption_accuracy
from evdit_opt.demo.tinywan import TINYWAN_CALL, load_tinywan
from evdit_opt.models import as_denoiser
from evdit_opt.quality import compare
from evdit_opt.versions import installed_versions

REFERENCES = (2, 4, 6)
OUTPUT = Path("benchmarks/results/cpu/weighting.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=2000)
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results/cpu/weighting.json")
    )
    arguments = parser.parse_args()

    prompts = [HELD_OUT[n % len(HELD_OUT)].caption() for n in range(arguments.clips)]
    pipe = load_tinywan()
    denoiser = as_denoiser(pipe, prompts, TINYWAN_CALL)
    config = Config(
        references=REFERENCES,
        windows=(0,),
        max_density=0.7,
        calib_steps=arguments.steps,
        reuse=False,
        seed=arguments.seed,
        trial_prompts=len(prompts),  # whose clips are kept
        pipe_kwargs=TINYWAN_CALL,
    )
    survey = survey_attention(denoiser)
    with staged(denoiser, survey.layouts) as stage:
        recording = record(stage, prompts, config, survey.grid_source.input)
    errors, dense = recording.errors, recording.results
    frames = survey.grid.frames
    template = Drafter(denoiser, survey, config).dense("template")
    rows: list[dict[str, Any]] = []
    for index, candidate in enumerate(next(iter(errors.values()))):
        rule = candidate.rule
        sites = tuple(
            replace(site, rule=rule, density=candidate.density, reason="uniform")
            for site in template.sites
        )
        apply_plan(pipe, replace(template, sites=sites), inner="eager")
        clips = [
            denoiser.run(prompt, arguments.seed + n, arguments.steps)
            for n, prompt in enumerate(prompts)
        ]
        restore(pipe)
        quality = compare(clips, dense)
        accuracy = caption_accuracy([clip.numpy() for clip in clips], prompts)
        changes = [clip.diff(dim=0) for clip in clips], [clip.diff(dim=0) for clip in dense]
        at_sites = [site[index] for site in errors.values()]
        rows.append(
            {
                "rule": rule.describe(frames),
                "density": candidate.density,
                "psnr_db": quality.psnr.mean,
                "psnr_db_stderr": quality.psnr.stderr,
                "ssim": quality.ssim.mean,
                "flicker_ratio": quality.flicker_ratio.mean if quality.flicker_ratio else None,
                "video_temporal_error": mean_error(*changes),
                "site_output_error": sum(c.output for c in at_sites) / len(at_sites),
                "site_temporal_error": sum(c.temporal for c in at_sites) / len(at_sites),
                "shape": accuracy.shape,
                "colour": accuracy.colour,
                "direction": accuracy.direction,
            }
        )
    result = {
        "what": "uniform masks on TinyWan, no training, paired with dense clips of the same noise",
        "clips": arguments.clips,
        "steps": arguments.steps,
        "seed": arguments.seed,
        "rank_correlation_with_psnr": {
            name: _spearman([row[name] for row in rows], [-row["psnr_db"] for row in rows])
            for name in ("site_output_error", "site_temporal_error", "video_temporal_error")
        },
        "rows": sorted(rows, key=lambda row: (row["density"], row["psnr_db"])),
        "versions": installed_versions(),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")


def _spearman(left: list[float], right: list[float]) -> float:
    """Rank correlation; ties are not averaged, floats hardly have any."""
    ranks = [torch.tensor(values).argsort().argsort().double() for values in (left, right)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


if __name__ == "__main__":
    main()
