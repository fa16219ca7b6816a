"""Residuals carried on between refreshes: against the second implementation."""

import inspect
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest

from evdit_opt.apply import apply_plan, report
from evdit_opt.errors import PlanError
from evdit_opt.plan import Plan, TrendPoint
from tests.models.timed_toy import (
    CLOSE,
    LEVELS,
    call,
    conditioning,
    error,
    expected,
    reusing_plan,
    sample,
    timed_toy,
)
from tests.models.toy_dit import toy_rules

TREND = (TrendPoint(level=700.0, damping=0.2), TrendPoint(level=300.0, damping=0.8))


def with_trend(plan: Plan) -> Plan:
    return replace(plan, reuse=replace(plan.reuse, trend=TREND))


def damping(level: float) -> float:
    return min(max((700.0 - level) / 400.0, 0.0), 1.0) * 0.6 + 0.2


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_residuals_are_carried_on(inner: str) -> None:
    model, rules = timed_toy(), toy_rules(2)
    levels = (900.0, 800.0, 650.0, 500.0, 400.0, 250.0, 100.0)
    modes, refresh_at = "fufuufu", (900.0, 650.0, 250.0)
    branches = [conditioning(1), conditioning(2)]
    right = [
        expected(model, rules, inputs, modes, tuple(rules), levels, damping) for inputs in branches
    ]
    unmoved = expected(model, rules, branches[0], modes, tuple(rules), levels)
    apply_plan(model, with_trend(reusing_plan(model, refresh_at)), inner=inner)
    for _ in range(2):  # the second video starts from nothing, too
        steps = [[call(model, inputs, level) for inputs in branches] for level in levels]
        for got, wanted in zip(zip(*steps, strict=True), right, strict=True):
            assert error(list(got), wanted) < CLOSE
    assert error(unmoved, right[0]) > 100 * CLOSE
    assert report(model).graphs == 2


def test_slopes_take_as_much_as_residuals_and_stay_where_they_are() -> None:
    model, inputs = timed_toy(), conditioning()
    apply_plan(model, with_trend(reusing_plan(model)), inner="eager")
    reusing: Any = inspect.unwrap(model._compiled_call_impl).func
    sample(model, inputs, LEVELS[:2])
    residuals = report(model).residual_bytes
    call(model, inputs, LEVELS[2])
    assert report(model).residual_bytes == 2 * residuals
    (known,) = reusing._generations._known.values()
    places = {name: slope.data_ptr() for name, slope in known.slopes.items()}
    sample(model, inputs, LEVELS[3:])  # the third refresh
    assert {name: slope.data_ptr() for name, slope in known.slopes.items()} == places


def test_after_a_step_that_broke_off_nothing_is_carried_on() -> None:
    model, inputs, rules = timed_toy(), conditioning(), toy_rules(2)
    right = expected(model, rules, inputs, "fu", tuple(rules), LEVELS[4:])
    apply_plan(model, with_trend(reusing_plan(model)), inner="eager")
    sample(model, inputs, LEVELS[:3])
    with (
        mock.patch("evdit_opt.reuse.Reusing._run", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        call(model, inputs, 400.0)
    assert error(sample(model, inputs, LEVELS[4:]), right) < CLOSE


def test_how_far_ahead_a_step_looks() -> None:
    record = with_trend(reusing_plan(timed_toy())).reuse
    assert record.ahead(500.0, (900.0,)) == 0.0
    assert record.ahead(500.0, (990.0, 900.0, 600.0)) == pytest.approx(0.5 * 100 / 300)
    assert record.ahead(800.0, (1000.0, 900.0)) == pytest.approx(0.2)
    assert record.ahead(100.0, (400.0, 200.0)) == pytest.approx(0.8 * 0.5)
    assert replace(record, trend=()).ahead(500.0, (900.0, 600.0)) == 0.0
    assert replace(record, trend=TREND[:1]).ahead(100.0, (400.0, 200.0)) == pytest.approx(0.1)
    with pytest.raises(PlanError, match="descending"):
        replace(record, trend=TREND[::-1])
