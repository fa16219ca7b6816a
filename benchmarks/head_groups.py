"""Would a rule per head, or per group of heads, beat one rule per site? TinyWan, equal density.

    python -m benchmarks.head_groups

Rules are chosen on some prompts, by the damage that the search of plans minimises (summed over
sites, see ``calibrate/damage.py``), and judged on prompts that were not looked at: by the same sum,
and by whole runs. A choice by two groups may use two rules at a site, whichever heads take which.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.head_choice import (
    HeadChoice,
    choose,
    choose_uniform,
    damages,
    site_choices,
    squares,
)
from benchmarks.head_kinds import EVERY, WEIGHTINGS, Kind, make_kinds, static_rules
from benchmarks.head_record import record_heads
from benchmarks.head_runs import run_choice
from evdit_opt import Config
from evdit_opt.calibrate.candidates import reused_rules
from evdit_opt.calibrate.stage import staged
from evdit_opt.calibrate.survey import survey_attention
from evdit_opt.demo.clips import HELD_OUT, TRAINED
from evdit_opt.demo.tinywan import TINYWAN_CALL, load_tinywan
from evdit_opt.models import as_denoiser
from evdit_opt.quality import Measured, compare, psnr
from evdit_opt.versions import installed_versions

OUTPUT = Path("benchmarks/results/cpu/head_groups.json")
CHOSEN_SEED, JUDGED_SEED = 100, 7000
DENSITIES = (0.2, 0.3, 0.4, 0.6)
RUN_AT = (0.3, 0.4)
RUN_KINDS = ("static, balanced", "reuse")
"""Which choices are run end to end: the weighting that calibration prefers, and reuse."""

FREEDOM = {"site": 1, "model": 1, "two groups": 2, "head": None}
"""How many rules the heads of a site may have between them; None: any number. "model": one rule for
all heads of all sites."""


def best_choices(
    kinds: Sequence[Kind], by: str, densities: Sequence[float]
) -> dict[float, tuple[Kind, dict[str, HeadChoice]]]:
    """The kind and the choice of least damage at every density."""
    found: dict[float, tuple[Kind, dict[str, HeadChoice]]] = {}
    for kind in kinds:
        damage = {name: damages(errors) for name, errors in kind.chosen_on.items()}
        options = {name: site_choices(own, kind.costs, FREEDOM[by]) for name, own in damage.items()}
        for density in densities:
            if by == "model":
                choice = choose_uniform(damage, kind.costs, density)
            else:
                choice = choose(options, density)
            if choice is None:
                continue
            if density not in found or total(choice) < total(found[density][1]):
                found[density] = kind, choice
    return found


def total(choice: Mapping[str, HeadChoice]) -> float:
    """Damage summed over sites."""
    return sum(one.damage for one in choice.values())


def judge(kind: Kind, choice: Mapping[str, HeadChoice]) -> dict[str, Any]:
    """What a choice costs, and what it does on prompts it was not made for."""
    damage = output = 0.0
    for name, one in choice.items():
        errors = kind.judged_on[name]
        damage += damages(errors)[one.rules].item()
        output += squares(errors)[0].movedim(0, -1)[one.rules].sqrt().mean().item()
    return {
        "density": sum(one.cost for one in choice.values()) / len(choice),
        "refresh_every": kind.every,
        "damage_chosen_on": total(choice),
        "damage": damage,
        "output_error": output,
        "rules_per_site": sum(len(set(one.rules)) for one in choice.values()) / len(choice),
    }


def run_row(
    clips: Sequence[Tensor], dense: Sequence[Tensor], baseline: Sequence[Tensor] | None
) -> dict[str, Any]:
    """Quality of clips, and their gain in dB over those of one rule per site, paired."""
    quality = compare(clips, dense)
    each = [psnr(own, twin) for own, twin in zip(clips, dense, strict=True)]
    row: dict[str, Any] = {
        "psnr_db": quality.psnr.mean,
        "psnr_db_each": each,
        "ssim": quality.ssim.mean,
        "flicker_ratio": quality.flicker_ratio.mean if quality.flicker_ratio else None,
    }
    if baseline is not None:
        gains = [
            own - psnr(other, twin) for own, other, twin in zip(each, baseline, dense, strict=True)
        ]
        gain = Measured.of(gains)
        row |= {"gain_db": gain.mean, "gain_db_stderr": gain.stderr}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=4, help="to choose rules on")
    parser.add_argument("--clips", type=int, default=4, help="to judge choices by")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    steps = arguments.steps
    prompts = [TRAINED[n * 7 % len(TRAINED)].caption() for n in range(arguments.prompts)]
    unseen = [HELD_OUT[n % len(HELD_OUT)].caption() for n in range(arguments.clips)]
    denoiser = as_denoiser(load_tinywan(), prompts, TINYWAN_CALL)
    survey = survey_attention(denoiser)
    frames, video = survey.grid.frames, survey.grid_source.input
    rules = [rule for weighting in WEIGHTINGS for rule in static_rules(weighting, frames)]
    reused = reused_rules(Config(), frames)
    candidates = rules, reused, EVERY
    table: dict[str, Any] = {}
    runs: list[dict[str, Any]] = []
    with staged(denoiser, survey.layouts, survey.scoped) as stage:
        chosen_on, _ = record_heads(stage, prompts, CHOSEN_SEED, steps, video, *candidates)
        judged_on, dense = record_heads(stage, unseen, JUDGED_SEED, steps, video, *candidates)
        for name, kinds in make_kinds(reused, chosen_on, judged_on, steps).items():
            best = {by: best_choices(kinds, by, DENSITIES) for by in FREEDOM}
            table[name] = {
                f"{density}": {by: judge(*best[by][density]) for by in FREEDOM}
                for density in DENSITIES
            }
            if name not in RUN_KINDS:
                continue
            for density in RUN_AT:
                baseline = None
                for by in FREEDOM:
                    kind, choice = best[by][density]
                    own = {site: kind.rules_of(one) for site, one in choice.items()}
                    clips = run_choice(stage, own, kind.every, video, unseen, JUDGED_SEED, steps)
                    described = {
                        site: [rule.describe(frames) if rule else "dense" for rule in each]
                        for site, each in own.items()
                    }
                    row = {"kind": name, "density": density, "a_rule_per": by}
                    runs.append(row | run_row(clips, dense, baseline) | {"rules": described})
                    if by == "site":
                        baseline = clips
                    print({k: v for k, v in runs[-1].items() if k != "rules"}, flush=True)
    result = {
        "what": "one rule per model, one or two per site, or one per head, on TinyWan: sums over "
        "sites of predicted damage and of relative output error, on prompts not chosen on; whole "
        "runs paired with dense clips of the same noise",
        "steps": steps,
        "prompts_chosen_on": len(prompts),
        "prompts_judged_on": len(unseen),
        "sites": len(survey.layouts),
        "heads": next(iter(chosen_on.values())).heads,
        "predicted": table,
        "runs": runs,
        "versions": installed_versions(),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
