"""The clock: prices add up to the forwards that were timed, and targets become budgets."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest

import evdit_opt
from evdit_opt.calibrate import clock as clock_module
from evdit_opt.calibrate.clock import Clock, measure_clock
from evdit_opt.calibrate.draft import Drafter
from evdit_opt.calibrate.record import Recording, record
from evdit_opt.calibrate.stage import staged
from evdit_opt.calibrate.strengths import unfitted
from evdit_opt.calibrate.survey import survey_attention
from evdit_opt.config import Config
from evdit_opt.errors import CalibrationError
from evdit_opt.masks import CACHED, Rule
from evdit_opt.models import as_denoiser
from tests.models.small_models import BY_NAME
from tests.short_tinywan import short_tinywan
from tests.test_api import CONFIG, calls

SMALL = {"num_frames": 9, "height": 32, "width": 32, "guidance_scale": 2.0}
FORWARDS = {"dense": 10.0, "refresh": 10.0, "reuse": 4.0}


def attention_ms(rule: Rule | None) -> float:
    return 0.5 if rule is None else 0.1 * (1 + rule.references)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is run once, and takes a time that is known."""

    def pretend(
        actions: Mapping[Any, Callable[[], object]], _rounds: int = 0, warmup: int = 0
    ) -> dict[Any, float]:
        for action in actions.values():
            action()
        return {
            name: FORWARDS[name] if isinstance(name, str) else attention_ms(name)
            for name in actions
        }

    monkeypatch.setattr(clock_module, "interleaved_ms", pretend)


def calibrated(target: Any, items: list[Any], config: Config) -> tuple[Drafter, Recording]:
    denoiser = as_denoiser(target, items, config.pipe_kwargs)
    survey = survey_attention(denoiser)
    with staged(denoiser, survey.layouts, survey.scoped) as stage:
        recording = record(stage, items[:1], config, survey.grid_source.input)
    return Drafter(denoiser, survey, config), recording


@pytest.mark.usefixtures("timed")
def test_a_pipeline_is_timed_dense_and_with_its_attention_gone() -> None:
    config = Config(
        references=(1, 2), windows=(0,), calib_steps=3, min_tokens=16, inner="eager",
        progress=False, pipe_kwargs=SMALL,
    )  # fmt: skip
    clock = measure_clock(*calibrated(short_tinywan(), ["a red circle moves right"], config))
    assert (clock.dense_ms, clock.rest_ms) == (10.0, 4.0)
    sites = list(clock.prices.dense)
    assert clock.sites == len(sites) == 2
    assert clock.prices.dense == pytest.approx(dict.fromkeys(sites, 1.0))
    for site in sites:
        cached, one = clock.prices.rules[site][CACHED], clock.prices.rules[site][Rule(1)]
        assert (cached.reused, cached.refresh) == pytest.approx((0.0, 1.0))
        # A rule saves what its attention is faster; the projections stay.
        assert one.sparse * clock.site_ms == pytest.approx(3.0 - 0.5 + 0.2)
        assert one.refresh * clock.site_ms == pytest.approx(3.0 + 0.2)


@pytest.mark.usefixtures("timed")
def test_without_steps_the_rest_is_what_attention_leaves() -> None:
    clock = measure_clock(*calibrated(BY_NAME["wan"].model(), calls(), CONFIG))
    assert clock.dense_ms == 10.0
    assert clock.rest_ms == pytest.approx(10.0 - 0.5 * clock.sites)
    for rules in clock.prices.rules.values():
        assert rules[Rule(1)].sparse == pytest.approx(0.2 / 0.5)


@pytest.mark.usefixtures("timed")
def test_one_time_serves_all_strengths(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[Any] = []
    pretend = clock_module.interleaved_ms
    monkeypatch.setattr(
        clock_module,
        "interleaved_ms",
        lambda actions, *a, **k: timed.extend(actions) or pretend(actions, *a, **k),
    )
    config = replace(CONFIG, weightings=("fitted",))
    found = calibrated(BY_NAME["wan"].model(), calls(), config)
    for rules in measure_clock(*found).prices.rules.values():
        fitted = [rule for rule in rules if rule.weighting == "fitted"]
        assert len(fitted) == 2 * 2 * 4  # references, spacings, strengths
        for rule in fitted:
            assert rules[rule] == rules[unfitted(rule, "balanced")]
    assert {rule.weighting for rule in timed if isinstance(rule, Rule)} == {"none", "balanced"}


def make(rest_ms: float = 4.0) -> Clock:
    prices = clock_module.Prices(dense={"a": 1.0, "b": 1.0}, rules={})
    return Clock(dense_ms=10.0, rest_ms=rest_ms, prices=prices, sites=2, device="a device")


def test_budget_and_prediction_are_inverse() -> None:
    clock = make()
    for speedup in (1.0, 1.3, 2.0, 2.4):
        assert clock.predict(clock.budget(speedup)).speedup == pytest.approx(speedup)
    assert clock.predict(1.0).optimized_ms == pytest.approx(clock.dense_ms)
    assert clock.predict(0.0).optimized_ms == pytest.approx(clock.rest_ms)


def test_more_than_all_attention_cannot_be_saved() -> None:
    with pytest.raises(CalibrationError, match=r"speedup below 2\.50, got 2\.5"):
        make().budget(2.5)


@pytest.mark.usefixtures("timed")
def test_a_speedup_is_searched_and_its_prediction_kept() -> None:
    config = Config(
        references=(1, 2), windows=(0,), calib_steps=3, min_tokens=16, inner="eager",
        progress=False, pipe_kwargs=SMALL, speedup=1.5, trial_prompts=1, verify_prompts=0,
        weightings=("none",),
    )  # fmt: skip
    plan = evdit_opt.make_plan(short_tinywan(), ["a red circle moves right"], config)
    assert plan.predicted is not None
    assert plan.predicted.speedup >= 1.5 - 1e-9
    assert plan.rules
    assert evdit_opt.Plan.from_json(plan.to_json()).predicted == plan.predicted
