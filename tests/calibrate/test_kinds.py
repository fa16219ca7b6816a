"""The kinds of static plans: which there are, and what the fitted ones are made of."""

from dataclasses import replace

import pytest

from evdit_opt.calibrate.draft import Drafter
from evdit_opt.calibrate.kinds import Planner
from evdit_opt.calibrate.make import make_problem
from evdit_opt.calibrate.prices import kept_pairs
from evdit_opt.calibrate.record import record
from evdit_opt.calibrate.stage import staged
from evdit_opt.calibrate.strengths import STRENGTHS, unfitted
from evdit_opt.calibrate.survey import survey_attention
from evdit_opt.config import Config
from evdit_opt.masks import Rule
from evdit_opt.models import as_denoiser
from tests.models.small_models import BY_NAME
from tests.test_api import CONFIG, calls

ALL = replace(CONFIG, weightings=("none", "balanced", "fitted"), spacings=("paper", "centred"))


def planner_of(config: Config) -> Planner:
    denoiser = as_denoiser(BY_NAME["wan"].model(), calls(), {})
    survey = survey_attention(denoiser)
    with staged(denoiser, survey.layouts, survey.scoped) as stage:
        recording = record(stage, calls()[:1], config, survey.grid_source.input)
    prices = kept_pairs(recording.errors, recording.reuse)
    problem = make_problem(recording, prices, config, denoiser.model)
    return Planner(Drafter(denoiser, survey, config), recording, problem)


@pytest.fixture(scope="module")
def planner() -> Planner:
    return planner_of(ALL)


def test_every_weighting_is_searched_and_uniform(planner):
    assert [kind.name for kind in planner.kinds()] == [
        f"{how}, weighting {weighting}"
        for weighting in ("none", "balanced", "fitted")
        for how in ("searched", "uniform")
    ]


def test_a_fitted_plan_takes_the_strength_that_errs_least(planner):
    kinds = {kind.name: kind for kind in planner.kinds()}
    plan = kinds["searched, weighting fitted"].at(0.6).plan
    assert any(rule.weighting == "fitted" for rule in plan.rules.values())
    for site in plan.sites:
        errors = {c.rule: c.output for c in planner.recording.errors[site.name]}
        others = [one for one in errors if unfitted(one) == unfitted(site.rule)]
        assert len(others) == len(STRENGTHS)
        assert site.error == errors[site.rule] == min(errors[one] for one in others)
        # The evidence shows one strength of every mask, the chosen one among them.
        shown = [one.rule for one in site.errors]
        assert site.rule.describe(plan.grid.frames) in shown
        assert len(shown) == len({unfitted(one) for one in errors})


def test_one_strength_serves_all_sites_of_a_uniform_plan(planner):
    kinds = {kind.name: kind for kind in planner.kinds()}
    [rule] = set(kinds["uniform, weighting fitted"].at(0.6).plan.rules.values())
    errors = planner.recording.errors.values()
    mean = {
        s: sum(c.output for own in errors for c in own if c.rule == one)
        for s in STRENGTHS
        for one in [_at(rule, s)]
    }
    assert mean[_strength(rule)] == min(mean.values())


def test_plans_that_reuse_know_no_strengths(planner):
    without = planner_of(replace(ALL, weightings=("none", "balanced")))
    assert planner.problem.errors == without.recording.errors == without.problem.errors


def _at(rule: Rule, strength: float) -> Rule:
    names = {0.0: "none", 1.0: "balanced"}
    if strength in names:
        return unfitted(rule, names[strength])
    return replace(rule, weighting="fitted", strength=strength)


def _strength(rule: Rule) -> float:
    return {"none": 0.0, "balanced": 1.0}.get(rule.weighting, rule.strength)
