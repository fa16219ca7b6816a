"""The kinds of static plans: which there are, and what the fitted ones are made of."""

from dataclasses import replace
from unittest import mock

import pytest

from evdit_opt.calibrate.draft import Drafter
from evdit_opt.calibrate.kinds import Drafted, Planner
from evdit_opt.calibrate.make import make_problem
from evdit_opt.calibrate.prices import kept_pairs
from evdit_opt.calibrate.record import record
from evdit_opt.calibrate.stage import staged
from evdit_opt.calibrate.strengths import unfitted
from evdit_opt.calibrate.survey import survey_attention
from evdit_opt.config import Config
from evdit_opt.models import as_denoiser
from tests.models.small_models import BY_NAME
from tests.test_api import CONFIG, calls

TWO = "searched, weighting balanced, two rules"
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


def test_every_weighting_is_offered(planner):
    assert [kind.name for kind in planner.kinds()] == [
        "searched, weighting none",
        "uniform, weighting none",
        "searched, weighting balanced",
        "uniform, weighting balanced",
        "searched, weighting fitted",
        TWO,
    ]
    # What two calls take in the place of one is not measured.
    assert TWO not in [kind.name for kind in replace(planner, timed=True).kinds()]
    alone = replace(planner, recording=replace(planner.recording, heads={}))
    assert TWO not in [kind.name for kind in alone.kinds()]


@pytest.mark.parametrize("budget", [0.3, 0.4, 0.45, 0.55])
def test_two_rules_keep_to_the_budget_and_do_less_damage(planner, budget):
    kinds = {kind.name: kind for kind in planner.kinds()}
    two, one = (kinds[name].at(budget) for name in (TWO, "searched, weighting balanced"))
    assert two.price == pytest.approx(two.plan.density, rel=1e-12)
    assert two.price <= budget + 1e-9
    if one.price <= budget:
        assert two.damage <= one.damage * (1 + 1e-9)
    assert two.damage > 0.0
    ways = {(site.rule, site.second) for site in two.plan.sites if site.rule}
    assert len(ways) <= planner.config.max_distinct_rules
    assert two.plan.second_rules
    for site in two.plan.sites:
        assert site.error is None or 0.0 < site.error < 1.0
        if site.second is not None:
            assert site.second.total == BY_NAME["wan"].model().config.num_attention_heads


def test_one_way_for_all_sites_where_there_may_be_no_more(planner):
    config = replace(planner.config, max_distinct_rules=1)
    few = replace(planner, drafter=replace(planner.drafter, config=config))
    plan = {kind.name: kind for kind in few.kinds()}[TWO].at(0.5).plan
    assert len({(site.rule, site.second) for site in plan.sites if site.rule}) == 1


def test_a_plan_with_two_rules_keeps_no_other_from_a_run(planner):
    names = [kind.name for kind, _ in planner.worth_trying(0.55)]
    without = replace(planner, timed=True).worth_trying(0.55)
    assert [kind.name for kind, _ in without] == [name for name in names if name != TWO]
    assert TWO in names

    def harmless(_planner: Planner, budget: float) -> Drafted:
        return replace(split(planner, budget), damage=1e-6)

    split = Planner._split
    with mock.patch.object(Planner, "_split", harmless):
        assert [kind.name for kind, _ in planner.worth_trying(0.55)] == names


def test_a_fitted_plan_has_the_masks_of_the_balanced_one(planner):
    kinds = {kind.name: kind for kind in planner.kinds()}
    balanced, fitted = (kinds[f"searched, weighting {w}"].at(0.6) for w in ("balanced", "fitted"))
    assert (fitted.plan.density, fitted.price) == (balanced.plan.density, balanced.price)
    assert any(rule.weighting == "fitted" for rule in fitted.plan.rules.values())
    for site, before in zip(fitted.plan.sites, balanced.plan.sites, strict=True):
        assert unfitted(site.rule) == unfitted(before.rule)
        candidates = planner.recording.errors[site.name]
        errors = {c.rule: c.output for c in candidates}
        assert site.error == errors[site.rule]
        # The evidence shows one strength of every mask, the chosen one among them.
        shown = [one.rule for one in site.errors]
        assert site.rule.describe(fitted.plan.grid.frames) in shown
        assert len(shown) == len({unfitted(one) for one in errors})


def test_fitted_alone_is_enough(planner):
    alone = planner_of(replace(ALL, weightings=("fitted",)))
    kind, two = alone.kinds()
    assert two.name == TWO
    expected = {one.name: one for one in planner.kinds()}[kind.name].at(0.6).plan
    assert kind.at(0.6).plan.rules == expected.rules
    both = replace(
        planner, drafter=replace(planner.drafter, config=replace(ALL, weightings=("balanced",)))
    )
    assert alone.budget_within_threshold() == both.budget_within_threshold()


def test_plans_that_reuse_know_no_strengths(planner):
    without = planner_of(replace(ALL, weightings=("none", "balanced")))
    assert planner.problem.errors == without.recording.errors == without.problem.errors
