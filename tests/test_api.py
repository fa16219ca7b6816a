"""optimize, make_plan, apply_plan, restore on a small random Wan, and each wrong input."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import evdit_opt
from evdit_opt import Config, Plan, VideoGrid
from evdit_opt.errors import (
    AlreadyOptimizedError,
    CalibrationError,
    NonFiniteOutputError,
    NoVideoAttentionError,
    PlanMismatchError,
    QualityFloorError,
    UnsupportedInputError,
)
from evdit_opt.masks import Rule
from tests.models.case import Shape
from tests.models.small_models import BY_NAME

WAN = BY_NAME["wan"]
GRID = VideoGrid(7, 4, 5)
CONFIG = Config(
    threshold=0.5,
    references=(1, 2),
    windows=(0,),
    min_tokens=16,
    verify_prompts=1,
    weightings=("none",),
    inner="eager",
    progress=False,
)


def calls(count: int = 3, grid: VideoGrid = GRID) -> list[dict[str, Any]]:
    return [WAN.inputs(Shape(grid=grid), seed=seed) for seed in range(count)]


def run(model: nn.Module, call: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**call)[0]


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Calibrated once: all weightings, searched and uniform."""
    config = replace(CONFIG, weightings=("none", "balanced", "fitted"))
    return evdit_opt.make_plan(WAN.model(), calls(), config)


def test_optimize_returns_the_same_module_and_makes_it_sparse():
    model, call = WAN.model(), calls()[0]
    dense = run(model, call)
    assert evdit_opt.optimize(model, calls(), CONFIG) is model
    sparse = run(model, call)
    assert not torch.equal(dense, sparse)
    assert (sparse - dense).norm() < dense.norm()
    assert evdit_opt.restore(model) is model
    assert torch.equal(run(model, call), dense)


def test_a_plan_records_its_evidence(plan):
    assert [site.name for site in plan.sites] == list(WAN.layouts())
    assert plan.grid == GRID
    assert plan.calibration.prompt_count == 3
    assert plan.calibration.held_out_error is not None
    assert plan.calibration.trials[0].temporal == min(t.temporal for t in plan.calibration.trials)
    for site in plan.sites:
        assert len(site.errors) >= 2
        assert site.rule is not None


def test_calibration_is_deterministic_and_leaves_the_model_dense(plan):
    model, call = WAN.model(), calls()[0]
    dense = run(model, call)
    config = replace(CONFIG, weightings=("none", "balanced", "fitted"))
    assert evdit_opt.make_plan(model, calls(), config) == plan
    assert torch.equal(run(model, call), dense)


def test_a_saved_plan_gives_the_same_numbers_in_another_model(plan, tmp_path):
    plan.save(tmp_path / "wan.evdit.json")
    call = calls()[0]
    outputs = [
        run(evdit_opt.apply_plan(WAN.model(), p, inner="eager"), call)
        for p in (plan, Plan.load(tmp_path / "wan.evdit.json"))
    ]
    assert torch.equal(*outputs)


@pytest.mark.nightly
def test_a_fitted_strength_reaches_the_model(plan):
    def output(rule: Rule) -> torch.Tensor:
        sites = tuple(replace(site, rule=rule, second=None) for site in plan.sites)
        model = evdit_opt.apply_plan(WAN.model(), replace(plan, sites=sites), inner="eager")
        return run(model, calls()[0])

    balanced, fitted = Rule(2, weighting="balanced"), Rule(2, weighting="fitted")
    assert torch.equal(output(fitted), output(balanced))  # a strength of 1
    half, none = output(replace(fitted, strength=0.5)), output(Rule(2))
    assert not torch.equal(half, output(balanced))
    assert not torch.equal(half, none)
    assert torch.equal(output(replace(fitted, strength=0.0)), none)


def test_a_density_is_reached_or_the_sparsest_there_is():
    config = replace(CONFIG, density=0.5, references=(1, 2, 3))
    plan = evdit_opt.make_plan(WAN.model(), calls(), config)
    assert plan.density <= 0.5


def test_no_calibration_items_is_an_error():
    with pytest.raises(CalibrationError, match="at least one calibration prompt"):
        evdit_opt.make_plan(WAN.model(), [], CONFIG)


def test_too_few_items_to_hold_one_out_is_an_error():
    with pytest.raises(CalibrationError, match="more than 1 calibration"):
        evdit_opt.make_plan(WAN.model(), calls(1), CONFIG)


def test_a_prompt_for_a_module_is_an_error():
    with pytest.raises(CalibrationError, match="call 0 is str"):
        evdit_opt.make_plan(WAN.model(), ["a cat"], CONFIG)


def test_something_else_than_a_model_is_an_error():
    with pytest.raises(UnsupportedInputError, match="got dict"):
        evdit_opt.make_plan({}, calls(), CONFIG)


def test_an_image_model_is_refused():
    import diffusers

    model = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16,
        pooled_projection_dim=16, out_channels=4,
    ).eval()  # fmt: skip
    call = {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "encoder_hidden_states": torch.randn(1, 5, 16),
        "pooled_projections": torch.randn(1, 16),
        "timestep": torch.tensor([3]),
    }
    with pytest.raises(NoVideoAttentionError, match="SD3Transformer2DModel"):
        evdit_opt.make_plan(model, [call, call], CONFIG)


def test_short_sequences_stay_dense_with_the_reason(caplog):
    model, call = WAN.model(), calls()[0]
    dense = run(model, call)
    config = replace(CONFIG, min_tokens=1000)
    plan = evdit_opt.make_plan(model, calls(), config)
    assert not plan.rules
    assert all("min_tokens = 1000" in site.reason for site in plan.sites)
    evdit_opt.optimize(model, calls(), config)
    assert "left WanTransformer3DModel dense" in caplog.text
    assert torch.equal(run(model, call), dense)


def test_a_threshold_nothing_meets_leaves_it_dense():
    plan = evdit_opt.make_plan(WAN.model(), calls(), replace(CONFIG, threshold=1e-9))
    assert not plan.rules
    assert all("the best rule errs by" in site.reason for site in plan.sites)


def test_optimizing_twice_is_an_error(plan):
    model = evdit_opt.apply_plan(WAN.model(), plan, inner="eager")
    with pytest.raises(AlreadyOptimizedError, match="restore"):
        evdit_opt.optimize(model, calls(), CONFIG)


def test_a_plan_of_another_model_is_an_error(plan):
    with pytest.raises(PlanMismatchError, match="WanTransformer3DModel"):
        evdit_opt.apply_plan(BY_NAME["cogvideox"].model(), plan)


def test_a_plan_of_a_smaller_model_of_the_class_is_an_error(plan):
    larger = WAN.model(Shape(layers=3))
    with pytest.raises(PlanMismatchError, match="configuration"):
        evdit_opt.apply_plan(larger, plan)
    assert not hasattr(larger, "_evdit")


def test_nan_weights_are_an_error_and_leave_no_hooks():
    model = WAN.model()
    with torch.no_grad():
        model.blocks[0].ffn.net[2].weight.fill_(float("nan"))
    with pytest.raises(NonFiniteOutputError, match="NaN"):
        evdit_opt.make_plan(model, calls(), CONFIG)
    assert not model._forward_pre_hooks
    assert not hasattr(model, "_evdit")


def test_a_floor_that_cannot_be_met_raises_with_the_best_plan(monkeypatch):
    # Floors judge video; a module has none, so the judgement itself is replaced.
    monkeypatch.setattr(Config, "missed_floors", lambda self, quality: ("PSNR 1 dB, floor 99 dB",))
    with pytest.raises(QualityFloorError, match="floor 99") as caught:
        evdit_opt.make_plan(WAN.model(), calls(), CONFIG)
    assert isinstance(caught.value.plan, Plan)
