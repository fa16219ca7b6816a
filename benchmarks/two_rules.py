"""Static plans of TinyWan with and without two rules at a site, at equal density.

    python -m benchmarks.two_rules
    python -m benchmarks.two_rules --steps 8 --output benchmarks/results/cpu/two_rules_8_steps.json
    python -m benchmarks.two_rules --quote

Both are what ``make_plan`` returns; for the second one the kind of plan that may give the heads of
a site two rules is not offered. Judged on clips of prompts and noise that it did not see.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.head_groups import run_row
from evdit_opt import Config, Plan, make_plan
from evdit_opt.calibrate.kinds import Kind, Planner
from evdit_opt.calibrate.stage import staged
from evdit_opt.calibrate.survey import survey_attention
from evdit_opt.demo.clips import HELD_OUT, TRAINED
from evdit_opt.demo.tinywan import TINYWAN_CALL, load_tinywan
from evdit_opt.models import as_denoiser
from evdit_opt.versions import installed_versions

OUTPUT = Path("benchmarks/results/cpu/two_rules.json")
RESULTS = (OUTPUT, OUTPUT.with_name("two_rules_8_steps.json"))
PAGE = Path("docs/notes/head_groups.md")
BLOCK = re.compile(r"(<!-- two rules: .*? -->\n).*?(<!-- /two rules -->)", re.DOTALL)
CHOSEN_SEED, JUDGED_SEED = 100, 7000
DENSITIES = (0.2, 0.3)


def kinds_of_one_rule(planner: Planner) -> list[Kind]:
    """All kinds of plan but the one that splits heads."""
    return [kind for kind in ALL_KINDS(planner) if "two rules" not in kind.name]


ALL_KINDS = Planner.kinds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=4, help="to calibrate on")
    parser.add_argument("--clips", type=int, default=4, help="to judge plans by")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--keep-in", type=Path, help="for finished runs, which both plans share")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--quote", action="store_true", help="put the results into the page")
    arguments = parser.parse_args()
    if arguments.quote:
        found = [json.loads(path.read_text()) for path in RESULTS if path.exists()]
        PAGE.write_text(quote(PAGE.read_text(), found))
        return
    steps = arguments.steps
    prompts = [TRAINED[n * 7 % len(TRAINED)].caption() for n in range(arguments.prompts)]
    unseen = [HELD_OUT[n % len(HELD_OUT)].caption() for n in range(arguments.clips)]
    pipe = load_tinywan()
    plans: dict[tuple[float, bool], Plan] = {}
    for density in DENSITIES:
        config = Config(
            density=density, reuse=False, calib_steps=steps, seed=CHOSEN_SEED, verify_prompts=0,
            pipe_kwargs=TINYWAN_CALL, progress=False,
        )  # fmt: skip
        for splits in (False, True):
            offered = ALL_KINDS if splits else kinds_of_one_rule
            with mock.patch.object(Planner, "kinds", offered):
                plans[density, splits] = make_plan(pipe, prompts, config, keep_in=arguments.keep_in)
            print(plans[density, splits].describe(), flush=True)

    denoiser = as_denoiser(pipe, prompts, TINYWAN_CALL)
    survey = survey_attention(denoiser)
    rows: list[dict[str, Any]] = []
    with staged(denoiser, survey.layouts, survey.scoped) as stage:
        dense = [denoiser.run(prompt, JUDGED_SEED + n, steps) for n, prompt in enumerate(unseen)]
        for density in DENSITIES:
            baseline = None
            for splits in (False, True):
                plan = plans[density, splits]
                clips = stage.rehearse(plan, unseen, JUDGED_SEED, steps)
                row = {
                    "budget": density,
                    "two_rules_offered": splits,
                    "density": plan.density,
                    "kind": plan.calibration.trials[0].name,
                    "sites_with_two": len(plan.second_rules),
                }
                row |= run_row(clips, dense, baseline)
                row["trials"] = [
                    {"name": one.name, "density": one.density, "psnr_db": one.psnr}
                    for one in plan.calibration.trials
                ]
                row["rules"] = {site.name: site.describe(plan.grid.frames) for site in plan.sites}
                rows.append(row)
                baseline = baseline or clips
                print({k: v for k, v in row.items() if k not in ("rules", "trials")}, flush=True)
    result = {
        "what": "static plans of make_plan for TinyWan with and without two rules at a site; "
        "clips paired with dense ones of the same noise",
        "steps": steps,
        "prompts_calibrated_on": len(prompts),
        "clips": len(unseen),
        "runs": rows,
        "versions": installed_versions(),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def quote(page: str, results: Sequence[dict[str, Any]]) -> str:
    """docs/notes/head_groups.md with the table of these results in it."""
    lines = [
        "| steps | budget | two rules | plan | density | sites with two | PSNR dB | gain, paired "
        "| flicker / dense |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        for row in result["runs"]:
            gain = ""
            if row["two_rules_offered"]:
                gain = f"{row['gain_db']:+.1f} ± {row['gain_db_stderr']:.1f}"
            cells = [
                result["steps"], row["budget"], "yes" if row["two_rules_offered"] else "no",
                row["kind"], f"{row['density']:.3f}", row["sites_with_two"],
                f"{row['psnr_db']:.1f}", gain, f"{row['flicker_ratio']:.2f}",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(map(str, cells))} |")
    table = "\n".join(lines)
    return BLOCK.sub(lambda match: f"{match[1]}{table}\n{match[2]}", page)


if __name__ == "__main__":
    main()
