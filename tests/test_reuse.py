"""Residual reuse: against a second, uncompiled implementation, and that state never mixes."""

import gc
import inspect
import logging
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

from evdit_opt.apply import apply_plan, is_optimized, report, restore
from evdit_opt.errors import PlanError, PlanMismatchError, UnsupportedInputError
from evdit_opt.generations import STRANGERS
from evdit_opt.grid import TokenLayout
from evdit_opt.masks import CACHED, Rule
from evdit_opt.plan import Plan
from evdit_opt.reuse import refresh_every, with_reuse, without_reuse
from tests.models.branching_dit import make_branching, scope_plan
from tests.models.masked import masked_attention
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
from tests.models.toy_dit import GRID, make_plan, toy_rules


@pytest.mark.parametrize(
    ("refresh_at", "modes", "inner"),
    [
        ((900.0, 650.0, 250.0), "fufufu", "eager"),
        ((800.0, 300.0), "dfuufu", "eager"),
        ((800.0, 300.0), "dfuufu", "inductor"),
        ((1000.0,), "fuuuuu", "eager"),
        ((901.0, 899.0, 700.0, 600.0, 350.0, 200.0), "ffffff", "eager"),
    ],
    ids=["every other step", "dense at first", "compiled", "once", "more levels than steps"],
)
def test_a_run_is_that_of_the_reference(refresh_at: Any, modes: str, inner: str) -> None:
    model, inputs, rules = timed_toy(), conditioning(), toy_rules(2)
    right = expected(model, rules, inputs, modes, tuple(rules))
    with masked_attention(model, rules, TokenLayout(GRID)):
        static = sample(model, inputs)
    apply_plan(model, reusing_plan(model, refresh_at), inner=inner)
    got = sample(model, inputs)
    assert error(got, right) < CLOSE
    assert error(static, right) > 1e-2
    again = sample(model, conditioning(2))
    with torch.no_grad():
        assert error(again, got) > 1e-2
    distinct = {"f": "refresh", "u": "reuse", "d": "dense"}.keys() & set(modes)
    assert report(model).graphs == len(distinct)  # one graph per mode, whatever the steps
    restore(model)
    assert not any(hasattr(module, "_evdit_site") for module in model.modules())


def test_residuals_of_an_autocast_are_not_those_of_a_run_without() -> None:
    """As clips are made in full precision while a model is trained in half of it."""
    model, inputs = timed_toy(), conditioning()
    apply_plan(model, reusing_plan(model), inner="eager")
    with torch.autocast("cpu", torch.bfloat16):
        rough = sample(model, inputs)
    after = sample(model, inputs)
    restore(model)
    apply_plan(model, reusing_plan(model), inner="eager")
    alone = sample(model, inputs)
    assert error(after, alone) == 0
    assert error(rough, alone) > 0


def test_only_the_named_sites_reuse() -> None:
    model, inputs, rules = timed_toy(), conditioning(), toy_rules(2)
    sites = ("blocks.1.attn1",)
    right = expected(model, rules, inputs, "fufufu", sites)
    apply_plan(model, reusing_plan(model, sites=sites), inner="eager")
    assert error(sample(model, inputs), right) < CLOSE


@pytest.mark.parametrize("way", ["one graph", "shared graphs", "scope", "outside graphs"])
def test_an_output_can_be_reused_as_a_whole(way: str) -> None:
    first, second = toy_rules(2)
    rules = {first: CACHED, second: toy_rules(2)[second]}
    model = timed_toy(breaks=way == "shared graphs")
    plan = make_plan(model, toy_rules(2))
    if way in ("scope", "outside graphs"):
        make_branching(model, way == "outside graphs")
        plan = scope_plan(model, toy_rules(2))
    right = expected(model, rules, conditioning(), "dfuufu", tuple(rules))
    plan = with_reuse(plan, (800.0, 300.0), rule=CACHED, sites=[first], levels=LEVELS)
    plan = replace(plan, reuse=replace(plan.reuse, sites=tuple(rules)))
    if way == "shared graphs":
        plan = replace(plan, fullgraph=False)
    apply_plan(model, plan, inner="eager")
    got = sample(model, conditioning())
    assert error(got, right) < CLOSE
    assert {site.density for site in report(model).sites} >= {0.0}
    restore(model)


def test_a_site_that_keeps_nothing_must_reuse() -> None:
    model = timed_toy()
    with pytest.raises(PlanError, match="whose rule keeps nothing"):
        make_plan(model, dict.fromkeys(toy_rules(2), CACHED))


def test_the_density_of_a_run_counts_refreshes() -> None:
    model = timed_toy()
    first = next(iter(toy_rules(2)))
    plan = with_reuse(make_plan(model, toy_rules(2)), (800.0, 300.0), sites=[first])
    between = plan.density
    assert between == sum(site.density for site in plan.sites) / 2
    # dense, refresh, reuse, reuse, refresh, reuse; only one of the two sites refreshes
    assert plan.density_over(LEVELS) == pytest.approx((1 + 5 * between + 2 * 0.5) / 6)
    known = replace(plan, reuse=replace(plan.reuse, levels=LEVELS))
    assert known.density == plan.density_over(LEVELS)
    assert known.fingerprint() == plan.fingerprint()  # what a run was is evidence, not numbers
    assert Plan.from_json(known.to_json()) == known


def test_layers_that_share_graphs_keep_their_own_residuals() -> None:
    model, inputs, rules = timed_toy(breaks=True), conditioning(), toy_rules(2)
    right = expected(model, rules, inputs, "fufufu", tuple(rules))
    plan = replace(reusing_plan(model), fullgraph=False)
    apply_plan(model, plan, inner="eager")
    assert error(sample(model, inputs), right) < CLOSE


def test_the_next_video_compiles_nothing_and_takes_no_more_memory() -> None:
    model = timed_toy()
    apply_plan(model, reusing_plan(model), inner="eager")
    reusing: Any = inspect.unwrap(model._compiled_call_impl).func
    sample(model, conditioning(1))
    graphs, made = report(model).graphs, torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for seed in range(2, 6):
        gc.collect()  # tracing leaves cycles that hold the conditioning it saw
        sample(model, conditioning(seed))
        assert len(reusing._generations) == 1
    assert report(model).graphs == graphs
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == made


@pytest.mark.parametrize("outside", [False, True], ids=["in-graph", "outside-graphs"])
def test_sites_reached_in_scopes_reuse_too(outside: bool) -> None:
    model, rules = timed_toy(), toy_rules(2)
    make_branching(model, outside)
    videos = [conditioning(1), conditioning(2)]
    right = [expected(model, rules, inputs, "dfuufu", tuple(rules)) for inputs in videos]
    plan = with_reuse(scope_plan(model, rules), (800.0, 300.0))
    apply_plan(model, plan, inner="eager")
    for inputs, wanted in zip(videos, right, strict=True):
        assert error(sample(model, inputs), wanted) < CLOSE


def test_guidance_branches_interleave() -> None:
    model, rules = timed_toy(), toy_rules(2)
    branches = [conditioning(1), conditioning(2)]
    right = [expected(model, rules, inputs, "fufufu", tuple(rules)) for inputs in branches]
    apply_plan(model, reusing_plan(model), inner="eager")
    steps = [[call(model, inputs, level) for inputs in branches] for level in LEVELS]
    for got, wanted in zip(zip(*steps, strict=True), right, strict=True):
        assert error(list(got), wanted) < CLOSE


def test_pipelines_at_different_steps_interleave() -> None:
    model, rules = timed_toy(), toy_rules(2)
    first, second = conditioning(1), conditioning(2)
    right = [expected(model, rules, inputs, "fufufu", tuple(rules)) for inputs in (first, second)]
    apply_plan(model, reusing_plan(model), inner="eager")
    early = sample(model, first, LEVELS[:3])
    begun = sample(model, second, LEVELS[:4])
    late, ended = sample(model, first, LEVELS[3:]), sample(model, second, LEVELS[4:])
    assert error(early + late, right[0]) < CLOSE
    assert error(begun + ended, right[1]) < CLOSE


def test_a_new_video_of_the_same_prompt_starts_anew() -> None:
    model, rules, inputs = timed_toy(), toy_rules(2), conditioning()
    apply_plan(model, reusing_plan(model), inner="eager")
    sample(model, inputs, LEVELS[:4])  # given up half way
    other = {**inputs, "hidden_states": conditioning(5)["hidden_states"]}
    got = sample(model, other)
    restore(model)
    assert error(got, expected(model, rules, other, "fufufu", tuple(rules))) < CLOSE


def test_other_batches_and_freed_conditioning_start_anew() -> None:
    model, rules = timed_toy(), toy_rules(2)
    apply_plan(model, reusing_plan(model, (900.0,)), inner="eager")
    for batch in (1, 2, 1):
        inputs = conditioning(batch, batch)
        sample(model, inputs, (900.0, 800.0))
        # The same place in memory, another prompt, at a level that could continue the last run.
        text = inputs.pop("text")
        place, shape = text.data_ptr(), text.shape
        del text
        fresh = torch.randn(shape)
        inputs["text"] = fresh
        got = call(model, inputs, 650.0)
        restored = expected(restore(model), rules, inputs, "f", tuple(rules), (650.0,))
        assert error([got], restored) < CLOSE, f"same memory: {fresh.data_ptr() == place}"
        apply_plan(model, reusing_plan(model, (900.0,)), inner="eager")


def test_threads_do_not_mix() -> None:
    model, rules = timed_toy(), toy_rules(2)
    inputs = conditioning(1)
    others = {**inputs, "hidden_states": conditioning(2)["hidden_states"]}  # the same prompt
    right = [expected(model, rules, x, "fufufu", tuple(rules)) for x in (inputs, others)]
    apply_plan(model, reusing_plan(model), inner="eager")
    sample(model, inputs)  # compiled before the threads start
    turns, results = threading.Barrier(2), {}

    def work(number: int, given: dict[str, Tensor]) -> None:
        outputs = []
        for level in LEVELS:
            turns.wait(60)
            outputs.append(call(model, given, level))
        results[number] = outputs

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate((inputs, others))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, wanted in enumerate(right):
        assert error(results[number], wanted) < CLOSE


def test_a_failed_step_leaves_no_residual() -> None:
    model, rules, inputs = timed_toy(), toy_rules(2), conditioning()
    apply_plan(model, reusing_plan(model, (900.0,)), inner="eager")
    sample(model, inputs, LEVELS[:2])
    with pytest.raises(RuntimeError):
        call(model, {**inputs, "text": inputs["text"][..., :3]}, 700.0)
    got = call(model, inputs, 650.0)
    right = expected(restore(model), rules, inputs, "fuu", tuple(rules), (900.0, 800.0, 650.0))
    assert error([got], right[2:]) < CLOSE  # another conditioning failed: this one goes on


def test_levels_differing_within_a_batch_are_refused() -> None:
    model = timed_toy()
    apply_plan(model, reusing_plan(model), inner="eager")
    with torch.no_grad(), pytest.raises(UnsupportedInputError, match="one noise level"):
        model(**conditioning(1, 2), timestep=torch.tensor([900.0, 800.0]))
    with torch.no_grad(), pytest.raises(UnsupportedInputError, match="'timestep'"):
        model(*conditioning().values(), None)


def test_conditioning_made_anew_in_every_step_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = timed_toy(), conditioning()
    apply_plan(model, reusing_plan(model), inner="eager")
    kept = []
    with caplog.at_level(logging.WARNING, "evdit_opt.generations"):
        for step in range(STRANGERS + 2):
            kept.append(inputs["text"].clone())
            call(model, {**inputs, "text": kept[-1]}, 900.0 - step)
    assert caplog.text.count("made anew in every step") == 1


def test_a_model_without_the_argument_is_refused() -> None:
    model = timed_toy()
    with pytest.raises(PlanMismatchError, match="'sigma'"):
        apply_plan(model, reusing_plan(model, timestep="sigma"), inner="eager")
    assert not is_optimized(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_torch_compile_alone_cannot_reuse() -> None:
    model = timed_toy()
    options = {"plan": reusing_plan(model), "inner": "eager"}
    compiled = torch.compile(model, backend="evdit", options=options)
    with pytest.raises(BackendCompilerFailed, match="apply_plan"):
        call(compiled, conditioning(), 900.0)


def test_without_reuse_its_sites_are_dense_and_the_others_as_before() -> None:
    model, (first, second) = timed_toy(), toy_rules(2)
    static = make_plan(model, toy_rules(2))
    assert without_reuse(static) is static
    left = without_reuse(with_reuse(static, (800.0,), sites=[first]))
    assert left.reuse is None
    assert left.rules == {second: toy_rules(2)[second]}


def test_a_dense_site_cannot_reuse() -> None:
    plan = make_plan(timed_toy(), {"blocks.0.attn1": None, "blocks.1.attn1": Rule(1)})
    with pytest.raises(PlanError, match=r"blocks\.0\.attn1"):
        with_reuse(plan, (900.0,), sites=("blocks.0.attn1",))


def test_another_rule_between_refreshes() -> None:
    plan = make_plan(timed_toy(), toy_rules(2))
    reusing = with_reuse(plan, (900.0,), rule=Rule(0))
    assert set(reusing.rules.values()) == {Rule(0)}
    assert reusing.density == Rule(0).mask(GRID.frames).density
    assert reusing.fingerprint() != plan.fingerprint()
    assert "2 sites reuse what their mask drops, renewed at 1 noise level" in reusing.describe()


@pytest.mark.parametrize(
    "levels", [(), (1.0, 1.0), (1.0, 2.0), (float("nan"),), (-1.0,)],
    ids=["none", "twice", "rising", "nan", "negative"],
)  # fmt: skip
def test_levels_out_of_order_are_refused(levels: Any) -> None:
    with pytest.raises(PlanError):
        reusing_plan(timed_toy(), levels)


def test_every_nth_step() -> None:
    assert refresh_every(LEVELS, 2) == (900.0, 650.0, 250.0)
    assert refresh_every(LEVELS, 99) == (900.0,)
    with pytest.raises(PlanError):
        refresh_every(LEVELS, 0)
