"""A plan with two rules at its sites, from calibration to the model that runs it."""

from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

import evdit_opt
from evdit_opt import Plan
from evdit_opt.calibrate.kinds import Kind, Planner
from tests.models.small_models import BY_NAME
from tests.test_api import CONFIG, calls, run

CALIBRATION = replace(CONFIG, weightings=("none", "balanced"), density=0.55)
OFFERED = Planner.kinds


def split_kinds(planner: Planner) -> list[Kind]:
    return [kind for kind in OFFERED(planner) if kind.splits]


def test_calibration_makes_such_a_plan_and_the_model_runs_it(tmp_path: Path) -> None:
    model, call = BY_NAME["wan"].model(), calls()[0]
    dense = run(model, call)
    with mock.patch.object(Planner, "kinds", split_kinds):
        plan = evdit_opt.make_plan(model, calls(), CALIBRATION)
    assert plan.second_rules
    assert plan.density <= 0.55
    [trial] = plan.calibration.trials
    assert trial.name == "searched, weighting balanced, two rules"
    assert plan.calibration.held_out_error is not None
    plan.save(tmp_path / "plan.json")
    evdit_opt.apply_plan(model, Plan.load(tmp_path / "plan.json"), inner="eager")
    sparse = run(model, call)
    # The trial ran on stage, without a compiler: the same error, measured there.
    error = float((sparse - dense).norm() / dense.norm())
    others = [run(model, item) for item in calls()[1 : CALIBRATION.trial_prompts]]
    assert torch.equal(run(evdit_opt.restore(model), call), dense)
    errors = [error]
    for item, got in zip(calls()[1:], others, strict=False):
        wanted = run(model, item)
        errors.append(float((got - wanted).norm() / wanted.norm()))
    assert abs(sum(errors) / len(errors) - trial.output) < 1e-4 * trial.output


@pytest.mark.nightly
def test_it_competes_and_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    model = BY_NAME["wan"].model()
    straight = evdit_opt.make_plan(model, calls(), CALIBRATION)
    names = [trial.name for trial in straight.calibration.trials]
    assert "searched, weighting balanced, two rules" in names
    best = min(straight.calibration.trials, key=lambda trial: trial.score)
    assert straight.calibration.trials[0] == best
    kept = tmp_path / "runs"
    assert evdit_opt.make_plan(model, calls(), CALIBRATION, keep_in=kept) == straight
    with mock.patch.object(Planner, "kinds", split_kinds):  # takes up the recording
        again = evdit_opt.make_plan(model, calls(), CALIBRATION, keep_in=kept)
    assert again.second_rules
