"""How well the clock predicts: plans for several speeds, their predicted and measured forwards.

    python -m benchmarks.cost_model

TinyWan, one calibration prompt, compiled by Inductor. For every target the best plan that reuses
and the best static one are timed over whole denoising runs, dense and optimized in turn. What is
compared are shares of the dense forward: its milliseconds change by the minute with other work.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from evdit_opt.apply import apply_plan, restore
from evdit_opt.calibrate.clock import measure_clock
from evdit_opt.calibrate.draft import Drafter
from evdit_opt.calibrate.kinds import Planner
from evdit_opt.calibrate.make import make_problem
from evdit_opt.calibrate.record import record
from evdit_opt.calibrate.stage import staged
from evdit_opt.calibrate.survey import survey_attention
from evdit_opt.config import Config
from evdit_opt.demo.clips import TRAINED
from evdit_opt.demo.run import measure_run
from evdit_opt.demo.tinywan import TINYWAN_CALL, load_tinywan
from evdit_opt.models import as_denoiser
from evdit_opt.versions import installed_versions

OUTPUT = Path(__file__).parent / "results/cpu/cost_model.json"
KINDS = ("reuse, searched", "searched, weighting none")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", type=float, nargs="+", default=[1.3, 1.6, 2.0])
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    config = Config(
        references=(1, 2, 4, 6), windows=(0, 1), calib_steps=arguments.steps,
        pipe_kwargs=TINYWAN_CALL,
    )  # fmt: skip
    prompts = [TRAINED[0].caption()]
    optimized, dense = load_tinywan(), load_tinywan()
    denoiser = as_denoiser(optimized, prompts, TINYWAN_CALL)
    survey = survey_attention(denoiser)
    drafter = Drafter(denoiser, survey, config)
    with staged(denoiser, survey.layouts, survey.scoped) as stage:
        recording = record(stage, prompts, config, survey.grid_source.input)
    clock = measure_clock(drafter, recording)
    problem = make_problem(recording, clock.prices, config, denoiser.model)
    planner = Planner(drafter, recording, problem, timed=True)
    dense.transformer.compile(dynamic=False)
    rows: list[dict[str, Any]] = []
    for target in arguments.targets:
        for kind in planner.kinds():
            if kind.name not in KINDS:
                continue
            drafted = kind.at(clock.budget(target))
            if drafted is None or not drafted.plan.rules:
                continue
            predicted = clock.predict(drafted.price)
            apply_plan(optimized.transformer, drafted.plan)
            measured = measure_run(optimized, dense, drafted.plan, arguments.steps)
            restore(optimized.transformer)
            speedup = measured["dense"] / measured["optimized"]
            row = {
                "target": target,
                "kind": kind.name,
                "density": drafted.plan.density,
                "predicted_ms": predicted.optimized_ms,
                "measured_ms": measured["optimized"],
                "predicted_dense_ms": predicted.dense_ms,
                "measured_dense_ms": measured["dense"],
                "predicted_speedup": predicted.speedup,
                "measured_speedup": speedup,
                "step_time_off": speedup / predicted.speedup - 1,
            }
            rows.append(row)
            print({name: round(v, 3) if isinstance(v, float) else v for name, v in row.items()})
            report = {
                "what": "mean forward of TinyWan's transformer over a run, predicted and measured",
                "step_time_off": "predicted over measured step time - 1, each as a share of dense",
                "steps": arguments.steps, "device": clock.device, "rest_ms": clock.rest_ms,
                "rows": rows, "versions": installed_versions(),
            }  # fmt: skip
            OUTPUT.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
