"""The drift guard: what it measures, when it speaks, and that it costs nothing in between."""

import inspect
import logging
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evdit_opt import api
from evdit_opt.apply import apply_plan, report, restore
from evdit_opt.config import Config
from evdit_opt.errors import PlanError
from evdit_opt.grid import TokenLayout
from evdit_opt.guard import ROWS, Guard, expected_errors
from evdit_opt.masks import CACHED, Rule
from evdit_opt.models import config_hash
from evdit_opt.plan import Plan, RuleEvidence
from evdit_opt.reuse import with_reuse
from tests.models.branching_dit import make_branching, scope_plan
from tests.models.timed_toy import LEVELS, call, conditioning, sample, timed_toy
from tests.models.toy_dit import GRID, make_plan, toy_inputs, toy_rules

NAMES = tuple(toy_rules(2))
ALWAYS = Guard(every=1, checks=1)


def expecting(plan: Plan, *errors: float) -> Plan:
    sites = zip(plan.sites, errors, strict=True)
    return replace(plan, sites=tuple(replace(site, error=error) for site, error in sites))


def guarding(model: nn.Module) -> Any:
    found: Any = inspect.unwrap(model._compiled_call_impl).func
    return found._call if hasattr(found, "_generations") else found


def measured(model: nn.Module) -> list[float]:
    """Errors over the latest checks, by site."""
    return [guarding(model).error(name) for name in NAMES]


def plain(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs)


def first_error(model: nn.Module, inputs: dict[str, Tensor], seed: int = 0) -> float:
    """What the guard should see at the first site, computed without it, in float64."""
    seen: list[tuple[Tensor, ...]] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append((q, k, v))
        return F.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v

    with mock.patch.object(F, "scaled_dot_product_attention", attend):
        plain(model, inputs)
    q, k, v = (x.double() for x in seen[0])
    logits = q @ k.mT * q.shape[-1] ** -0.5
    mask = toy_rules(2)[NAMES[0]].mask(GRID.frames).expand(TokenLayout(GRID)).double()
    right, sparse = (x.softmax(-1) @ v for x in (logits, logits + mask))
    rows = torch.rand(ROWS, generator=torch.Generator().manual_seed(seed))
    rows = (rows * GRID.tokens).long()
    wrong = (sparse - right)[:, :, rows].square().sum() / right[:, :, rows].square().sum()
    return float(wrong.sqrt())


@pytest.mark.parametrize(
    ("grad", "inner"),
    [
        (False, "eager"),
        (False, "inductor"),
        (True, "eager"),
        pytest.param(True, "inductor", marks=pytest.mark.nightly),
    ],
    ids=["no grad-eager", "no grad-inductor", "grad-eager", "grad-inductor"],
)
def test_it_measures_the_error_of_the_site_and_changes_nothing(inner: str, grad: bool) -> None:
    model, inputs = timed_toy(), {**conditioning(), "timestep": torch.tensor([1.0])}
    wanted = first_error(model, inputs)
    plan = make_plan(model, toy_rules(2))
    apply_plan(model, plan, inner=inner)
    output = model(**inputs).detach()
    restore(model)
    apply_plan(model, expecting(plan, 0.5, 0.5), inner=inner, guard=ALWAYS)
    with torch.set_grad_enabled(grad):
        got = model(**inputs)
    torch.testing.assert_close(got, output, rtol=0, atol=0)
    assert got.requires_grad == grad
    if grad:
        got.sum().backward()
    assert measured(model)[0] == pytest.approx(wanted, rel=1e-4)
    assert wanted > 0.05


@pytest.mark.parametrize("way", ["one graph", "shared graphs", "scope", "outside graphs"])
def test_it_warns_once_where_weights_changed_and_not_before(
    way: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = timed_toy(breaks=way == "shared graphs")
    plan = make_plan(model, toy_rules(2))
    if way in ("scope", "outside graphs"):
        make_branching(model, way == "outside graphs")
        plan = scope_plan(model, toy_rules(2))
    if way == "shared graphs":
        plan = replace(plan, fullgraph=False)
    videos = [conditioning(seed) for seed in range(8)]
    apply_plan(model, expecting(plan, 9.0, 9.0), inner="eager", guard=Guard(every=1))
    for inputs in videos:
        call(model, inputs, 1.0)
    plan = expecting(plan, *measured(model))
    restore(model)

    apply_plan(model, plan, inner="eager", guard=Guard(every=2, checks=4))
    with caplog.at_level(logging.WARNING, "evdit_opt.guard"):
        for inputs in (*videos, *videos):
            call(model, inputs, 1.0)
        assert not caplog.records
        with torch.no_grad():
            for name in ("q", "k"):  # sharp, and mostly on other frames
                getattr(model.get_submodule(NAMES[1]), name).weight.mul_(50.0)
        for inputs in (*videos, *videos):
            call(model, inputs, 1.0)
        assert len(caplog.records) == 1
    assert NAMES[1] in caplog.text
    assert NAMES[0] not in caplog.text
    assert f"calibration measured {plan.sites[1].error:.3f}" in caplog.text
    graphs = report(model).graphs
    call(model, videos[0], 1.0)
    assert report(model).graphs == graphs


def test_a_nan_is_drift(caplog: pytest.LogCaptureFixture) -> None:
    model = timed_toy()
    apply_plan(model, expecting(make_plan(model, toy_rules(2)), 9.0, 9.0), guard=ALWAYS)
    with torch.no_grad():
        model.get_submodule(NAMES[0]).v.weight.fill_(torch.nan)
    with caplog.at_level(logging.WARNING, "evdit_opt.guard"):
        call(model, conditioning(), 1.0)
    assert "is off dense attention by nan" in caplog.text


@pytest.mark.parametrize("rule", [Rule(0), CACHED], ids=["own frame", "whole output"])
def test_reuse_is_checked_between_refreshes(rule: Rule) -> None:
    model = timed_toy()
    plan = with_reuse(make_plan(model, toy_rules(2)), (900.0, 650.0, 250.0), rule=rule)
    apply_plan(model, plan, inner="eager")
    right = sample(model, conditioning())
    plain_graphs = report(model).graphs
    restore(model)
    guard = Guard(every=1, checks=9)
    apply_plan(model, expecting(plan, 9.0, 9.0), inner="eager", guard=guard)
    got = sample(model, conditioning())
    assert all(torch.equal(a, b) for a, b in zip(got, right, strict=True))
    assert [len(seen) for seen in guarding(model)._seen.values()] == [3, 3]  # "fufufu"
    assert report(model).graphs == plain_graphs  # every reuse step was checked
    with_residual = measured(model)
    restore(model)
    if not rule.keeps_nothing:  # what the residual repairs is seen
        static = expecting(make_plan(model, dict.fromkeys(NAMES, rule)), 9.0, 9.0)
        apply_plan(model, static, inner="eager", guard=guard)
        sample(model, conditioning())
        pairs = zip(with_residual, measured(model), strict=True)
        assert all(reusing < without for reusing, without in pairs)


def test_calls_that_are_not_checked_run_the_graph_they_would_run_anyway() -> None:
    model, inputs = timed_toy(), conditioning()
    plan = expecting(make_plan(model, toy_rules(2)), 9.0, 9.0)
    made: list[Any] = []

    def inner(gm: Any, _examples: Any) -> Any:
        made.append(sorted(str(node.target) for node in gm.graph.nodes))
        return gm.forward

    apply_plan(model, plan, inner=inner)
    call(model, inputs, 1.0)
    restore(model)
    with mock.patch.object(Tensor, "tolist", side_effect=AssertionError("a host sync")):
        apply_plan(model, plan, inner=inner, guard=Guard(every=10**9, seed=1))
        for _ in range(3):
            call(model, inputs, 1.0)
    assert len(made) == 2
    assert made[0] == made[1]
    restore(model)
    apply_plan(model, plan, inner=inner, guard=Guard(every=4, checks=8))
    for _ in range(40):
        call(model, inputs, 1.0)
    assert len(made) == 4  # one more
    assert sum("row_error" in name for name in made[3] + made[2]) == 2  # a check per site
    assert len(guarding(model)._seen[NAMES[0]]) == 8  # of 10 checks
    assert guarding(model)._next // 4 == 10


def test_what_a_plan_expects() -> None:
    plan = make_plan(timed_toy(), toy_rules(2))
    with pytest.raises(PlanError, match="knows the error of a site"):
        expected_errors(plan)
    with pytest.raises(PlanError, match="knows the error of a site"):
        apply_plan(timed_toy(), plan, guard=ALWAYS)
    rule = plan.sites[0].rule
    known = RuleEvidence(rule=rule.describe(GRID.frames), density=0.5, output=0.125, temporal=1.0)
    other = replace(known, rule="3:1", output=0.9)
    first = replace(plan.sites[0], errors=(other, known))
    older = replace(plan, sites=(first, plan.sites[1]))
    assert expected_errors(older) == {NAMES[0]: 0.125}
    newer = expecting(plan, 0.25, 0.5)
    assert expected_errors(newer) == dict(zip(NAMES, (0.25, 0.5), strict=True))
    reusing = with_reuse(newer, LEVELS[:2], sites=NAMES[1:])
    assert expected_errors(reusing) == {NAMES[0]: 0.25}  # reuse was not measured
    assert Plan.from_json(newer.to_json()) == newer
    assert newer.fingerprint() == plan.fingerprint()


@pytest.mark.parametrize("wrong", [{"every": 0}, {"checks": 0}, {"tolerance": 0.5}], ids=str)
def test_settings_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match=next(iter(wrong))):
        Guard(**wrong)


def test_optimize_hands_it_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = timed_toy()
    plan = expecting(make_plan(model, toy_rules(2)), 9.0, 9.0)
    plan = replace(plan, model_config_hash=config_hash(model))
    monkeypatch.setattr(api, "make_plan", lambda *_: plan)
    api.optimize(model, [], Config(inner="eager"), guard=ALWAYS)
    call(model, conditioning(), 1.0)
    assert [len(seen) for seen in guarding(model)._seen.values()] == [1, 1]


def test_a_call_that_fails_leaves_no_check_behind() -> None:
    model = timed_toy()
    apply_plan(model, expecting(make_plan(model, toy_rules(2)), 9.0, 9.0), guard=ALWAYS)
    with pytest.raises(RuntimeError):
        call(model, {**toy_inputs(), "text": torch.randn(1, 5, 3)}, 1.0)
    assert guarding(model)._live.rows is None
    assert all(mark.drift is None for mark in guarding(model)._sites.values())
    call(model, conditioning(), 1.0)
    assert [len(seen) for seen in guarding(model)._seen.values()] == [1, 1]
