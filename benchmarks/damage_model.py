"""Does the damage that calibration predicts rank plans as whole runs do? Random plans on TinyWan.

    python benchmarks/damage_model.py --plans 60

Every site gets a random option (dense, a static rule, or a rule that reuses), every plan a random
schedule. Predicted: the sum of ``calibrate/reuse_search.py``. True: the squared relative error of
the video against the dense run of the same seed, mean over prompts the prediction never saw. The
rank correlation is Spearman's. Plans are added one by one, so that a run may be interrupted; those
of the same steps and clips whose prediction is still the same are not run again.
"""

import argparse
import json
import random
from math import isclose
from pathlib import Path
from typing import Any

import torch

from evdit_opt.calibrate.draft import Drafter
from evdit_opt.calibrate.prices import kept_pairs
from evdit_opt.calibrate.problem import Found, Problem, site_options
from evdit_opt.calibrate.record import record
from evdit_opt.calibrate.stage import staged
from evdit_opt.calibrate.survey import survey_attention
from evdit_opt.config import Config
from evdit_opt.demo.clips import HELD_OUT, TRAINED
from evdit_opt.demo.tinywan import TINYWAN_CALL, load_tinywan
from evdit_opt.models import as_denoiser
from evdit_opt.versions import installed_versions

OUTPUT = Path("benchmarks/results/cpu/damage_model.json")
SEED = 9000


def random_found(problem: Problem, chance: random.Random) -> Found:
    """A random schedule, and a random option at every site."""
    steps = len(problem.levels)
    count = chance.randint(1, steps // 2)
    schedule = tuple(sorted({0, *chance.sample(range(1, steps), count - 1)}))
    # Plans differ most in how much of them is static, so that share is drawn first.
    static = chance.random()
    options = {}
    for site in problem.errors:
        own = site_options(problem, site, schedule)
        dense, fixed = own[:1], [one for one in own[1:] if not one.reuses]
        reused = [one for one in own if one.reuses]
        draw = chance.random()
        options[site] = chance.choice(dense if draw < 0.1 else fixed if draw < static else reused)
    damage = sum(one.damage for one in options.values())
    cost = sum(one.cost for one in options.values())
    return Found(options, schedule, damage, cost / steps / len(options))


def ranks(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).argsort().argsort().double()


def spearman(left: list[float], right: list[float]) -> float:
    """Rank correlation; ties are not averaged, floats hardly have any."""
    return float(torch.corrcoef(torch.stack([ranks(left), ranks(right)]))[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plans", type=int, default=60)
    parser.add_argument("--prompts", type=int, default=3, help="to calibrate on")
    parser.add_argument("--clips", type=int, default=2, help="to judge every plan by")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    config = Config(
        references=(1, 2, 4, 6), windows=(0, 1), calib_steps=arguments.steps,
        pipe_kwargs=TINYWAN_CALL, max_distinct_rules=8,
    )  # fmt: skip
    prompts = [TRAINED[n * 7 % len(TRAINED)].caption() for n in range(arguments.prompts)]
    held_out = [HELD_OUT[n % len(HELD_OUT)].caption() for n in range(arguments.clips)]
    denoiser = as_denoiser(load_tinywan(), prompts, TINYWAN_CALL)
    survey = survey_attention(denoiser)
    drafter = Drafter(denoiser, survey, config)
    chance = random.Random(SEED)
    rows: list[dict[str, Any]] = []
    before = measured_before(arguments)
    with staged(denoiser, survey.layouts, survey.scoped) as stage:
        found = record(stage, prompts, config, survey.grid_source.input)
        prices = kept_pairs(found.errors, found.reuse)
        count = len(found.errors)
        problem = Problem(found.errors, found.reuse, found.levels, prices, count, 100)
        dense = [
            denoiser.run(prompt, SEED + n, arguments.steps) for n, prompt in enumerate(held_out)
        ]
        for number in range(arguments.plans):
            one = random_found(problem, chance)
            while not any(option.reuses for option in one.options.values()):
                one = random_found(problem, chance)
            if number < len(before) and isclose(
                before[number]["predicted"], one.damage, rel_tol=1e-6
            ):
                rows.append(before[number])
                continue
            plan = drafter.draft_reuse(one, found.errors, found.levels)
            clips = stage.rehearse(plan, held_out, SEED, arguments.steps)
            error = [
                float((a - b).square().sum() / b.square().sum())
                for a, b in zip(clips, dense, strict=True)
            ]
            rows.append(
                {
                    "density": one.price,
                    "refreshes": len(one.refreshes),
                    "reusing": sum(option.reuses for option in one.options.values()),
                    "predicted": one.damage,
                    "site_error": sum(option.error for option in one.options.values()),
                    "true": sum(error) / len(error),
                }
            )
            print(number, {k: round(v, 5) for k, v in rows[-1].items()}, flush=True)
            write(arguments, rows)


def measured_before(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of the same steps and clips that are there."""
    if not arguments.output.exists():
        return []
    report = json.loads(arguments.output.read_text(encoding="utf-8"))
    alike = all(report[name] == getattr(arguments, name) for name in ("steps", "clips"))
    return list(report["rows"]) if alike else []


def write(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    true = [row["true"] for row in rows]
    report = {
        "what": "random plans on TinyWan: predicted damage against true runs on unseen prompts",
        "steps": arguments.steps,
        "clips": arguments.clips,
        "spearman": {
            name: spearman([row[name] for row in rows], true)
            for name in ("predicted", "site_error")
        }
        if len(rows) > 2
        else None,
        "rows": rows,
        "versions": installed_versions(),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
