"""apply_plan, restore and report on a toy model; real models are in tests/models."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

from evdit_opt.apply import apply_plan, is_optimized, report, restore
from evdit_opt.errors import (
    AlreadyOptimizedError,
    LayoutError,
    PlanMismatchError,
    UnsupportedInputError,
)
from evdit_opt.grid import TokenLayout, VideoGrid
from evdit_opt.kernels import autotune
from evdit_opt.masks import Rule
from tests.models.masked import masked_attention
from tests.models.toy_dit import GRID, SOURCE, make_plan, toy, toy_inputs, toy_rules

# float32 rounding of a different summation order; dense and sparse differ by more than 1e-2.
CLOSE = 2e-6


def reference(model: nn.Module, rules: dict[str, Rule], grid: VideoGrid = GRID) -> torch.Tensor:
    with torch.no_grad(), masked_attention(model, rules, TokenLayout(grid)):
        return model(**toy_inputs(grid))


def run(model: nn.Module, grid: VideoGrid = GRID) -> torch.Tensor:
    with torch.no_grad():
        return model(**toy_inputs(grid))


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return (actual - expected).abs().max().item()


def test_every_layer_gets_its_own_mask_and_restore_is_exact() -> None:
    model, rules = toy(), toy_rules()
    dense, expected = run(model), reference(model, rules)
    keys, attributes = set(model.state_dict()), set(vars(model))

    assert apply_plan(model, make_plan(model, rules), inner="eager") is model
    assert error(run(model), expected) < CLOSE
    assert error(dense, expected) > 1e-2
    done = report(model)
    assert done.rewritten == tuple(rules)
    assert done.graphs == 1
    assert "blocks.1.attn1  0 references + window 1, density 0.625" in done.show()
    assert set(model.state_dict()) == keys

    restore(model)
    assert torch.equal(run(model), dense)
    assert set(vars(model)) == attributes
    assert not any(hasattr(module, "_evdit_site") for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_the_grid_is_read_live(dynamic: bool) -> None:
    model, rules = toy(), toy_rules()
    # The first has no two sizes alike: Dynamo takes equal sizes to be one symbol.
    grids = [VideoGrid(*s) for s in ((6, 5, 7), (6, 4, 5), (6, 2, 3), (5, 4, 5), (6, 5, 7))]
    expected = [reference(model, rules, grid) for grid in grids]
    apply_plan(model, make_plan(model, rules), inner="eager", dynamic=dynamic)
    for grid, right in zip(grids, expected, strict=True):
        assert error(run(model, grid), right) < CLOSE, grid
    # One graph per grid, or per frame count where sizes are symbolic.
    assert report(model).graphs == (2 if dynamic else 4)


def test_graph_breaks_between_blocks() -> None:
    model, rules = toy(4, breaks=True), toy_rules(4)
    expected = reference(model, rules)
    apply_plan(model, make_plan(model, rules, fullgraph=False), inner="eager")
    assert error(run(model), expected) < CLOSE
    assert report(model).graphs > 1
    other = VideoGrid(6, 3, 3)
    restore(model)
    right = reference(model, rules, other)
    apply_plan(model, make_plan(model, rules, fullgraph=False), inner="eager")
    assert error(run(model, other), right) < CLOSE


def test_plans_can_be_tried_without_end() -> None:
    model = toy(1)
    for number in range(12):
        rules = {"blocks.0.attn1": Rule(number % 3, window=number % 2)}
        expected = reference(model, rules)
        apply_plan(model, make_plan(model, rules), inner="eager")
        assert error(run(model), expected) < CLOSE
        restore(model)


def test_gradients_with_and_without_checkpointing() -> None:
    model, rules = toy(), toy_rules()
    with masked_attention(model, rules, TokenLayout(GRID)):
        model(**toy_inputs()).square().mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for checkpoint in (False, True):
        model.checkpoint = checkpoint
        model.zero_grad()
        apply_plan(model, make_plan(model, rules), inner="eager")
        model(**toy_inputs()).square().mean().backward()
        assert report(model).rewritten == tuple(rules)
        restore(model)
        for name, parameter in model.named_parameters():
            assert error(parameter.grad, expected[name]) < CLOSE, (name, checkpoint)


def test_short_sequences_and_full_masks_stay_dense_with_the_reason() -> None:
    model = toy()
    rules = {"blocks.0.attn1": Rule(1), "blocks.1.attn1": Rule(4)}
    dense = run(model)
    apply_plan(model, make_plan(model, rules, min_tokens=1000), inner="eager")
    assert torch.equal(run(model), dense)
    reasons = report(model).dense
    assert reasons["blocks.0.attn1"] == "24 tokens, the plan is for at least 1000"
    assert reasons["blocks.1.attn1"] == "rule 4 references keeps every tile of 4 frames"


def test_a_plan_without_sparse_sites_is_applied_dense() -> None:
    model = toy()
    dense = run(model)
    apply_plan(model, make_plan(model, {"blocks.0.attn1": None}), inner="eager")
    assert torch.equal(run(model), dense)
    assert report(model).dense == {"blocks.0.attn1": "chosen by a test"}
    restore(model)
    assert not is_optimized(model)


def test_before_the_first_call_the_report_says_so() -> None:
    model = toy()
    apply_plan(model, make_plan(model, toy_rules()), inner="eager")
    assert report(model).dense["blocks.0.attn1"] == "not compiled yet: call the model once"


def test_twice_is_an_error() -> None:
    model = toy()
    plan = make_plan(model, toy_rules())
    apply_plan(model, plan, inner="eager")
    with pytest.raises(AlreadyOptimizedError, match="restore"):
        apply_plan(model, plan, inner="eager")


def test_a_plan_of_another_model_is_an_error() -> None:
    plan = make_plan(toy(), toy_rules())
    with pytest.raises(PlanMismatchError, match="expected a ToyDiT, got a Linear"):
        apply_plan(nn.Linear(2, 2), plan)
    longer = make_plan(toy(3), toy_rules(3))
    model = toy()
    with pytest.raises(PlanMismatchError, match=r"blocks\.2\.attn1"):
        apply_plan(model, longer)
    assert not is_optimized(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_planned_site_that_cannot_be_rewritten_is_an_error_with_its_name() -> None:
    model = toy()
    apply_plan(model, make_plan(model, {"blocks.1.attn2": Rule(1)}), inner="eager")
    with pytest.raises(BackendCompilerFailed, match=r"blocks\.1\.attn2.*not rewritten") as failure:
        run(model)
    assert isinstance(failure.value.inner_exception, PlanMismatchError)


def test_text_where_calibration_saw_none_is_an_error() -> None:
    model = toy()
    wrong = make_plan(
        model,
        toy_rules(),
        source=type(SOURCE)(kind="patch", input="hidden_states", patch=(1, 2, 1), dims=(2, 3, 4)),
    )
    apply_plan(model, wrong, inner="eager")
    with pytest.raises(BackendCompilerFailed, match="sequence of 24") as failure:
        run(model)
    assert isinstance(failure.value.inner_exception, LayoutError)


@pytest.mark.parametrize("way", ["forward", "deepcopy", "pickle", "part"])
def test_a_site_outside_the_compiled_graph_is_an_error_with_its_name(way: str) -> None:
    model = toy()
    apply_plan(model, make_plan(model, toy_rules()), inner="eager")
    if way == "deepcopy":
        model = copy.deepcopy(model)
    elif way == "pickle":
        model = pickle.loads(pickle.dumps(model))
    calls = {
        "forward": lambda: model.forward(**toy_inputs()),
        "part": lambda: model.blocks[0](torch.randn(1, 24, 16), torch.randn(1, 5, 16)),
    }
    with pytest.raises(PlanMismatchError, match=r"site blocks\.0\.attn1.*executed eagerly"):
        calls.get(way, lambda: run(model))()
    restore(model)
    run(model)


def test_models_compiled_by_somebody_else() -> None:
    model = toy()
    plan = make_plan(model, toy_rules())
    with pytest.raises(UnsupportedInputError, match="_orig_mod"):
        apply_plan(torch.compile(model, backend="eager"), plan)
    with pytest.raises(UnsupportedInputError, match=r"torch\.nn\.Module"):
        apply_plan("model", plan)
    model.blocks[0].compile(backend="eager")
    with pytest.raises(UnsupportedInputError, match=r"blocks\.0"):
        apply_plan(model, plan, fullgraph=False)


def test_restore_gives_back_the_users_own_compile() -> None:
    model = toy()
    dense = run(model)
    model.compile(backend="eager")
    own = model._compiled_call_impl
    apply_plan(model, make_plan(model, toy_rules()), inner="eager")
    run(model)
    restore(model)
    assert model._compiled_call_impl is own
    assert torch.equal(run(model), dense)


def test_without_a_plan_restore_and_report_are_errors() -> None:
    with pytest.raises(PlanMismatchError, match="apply_plan"):
        restore(toy())
    with pytest.raises(PlanMismatchError, match="apply_plan"):
        report(toy())


def test_the_report_says_what_auto_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = autotune.Choice(
        name="masked", milliseconds={"decomposed": 2.0, "masked": 1.0}, key=(("tokens", 6),)
    )
    monkeypatch.setattr(autotune, "_choices", {choice.key: choice})
    line = "auto: masked (masked 1 ms, decomposed 2 ms) for tokens 6"
    for impl, said in (("auto", True), ("decomposed", False)):
        model = toy()
        apply_plan(model, make_plan(model, toy_rules()), inner="eager", impl=impl)
        assert (line in report(model).show()) == said
