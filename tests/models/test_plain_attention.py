"""Video transformers that do not call SDPA, from calibration to numbers."""

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import evdit_opt
from evdit_opt import Config
from evdit_opt.apply import apply_plan, report, restore
from evdit_opt.grid import TokenLayout
from evdit_opt.masks import Rule
from evdit_opt.passes.find_attention import find_attention
from evdit_opt.passes.infer_layout import infer_layout
from tests.models.plain_attention import (
    FLAVOURS,
    Causal,
    Einsum,
    HeadsInTheBatch,
    LooksAtModuleWeights,
    LooksAtWeights,
    Matmul,
    PackedModule,
)
from tests.models.toy_dit import GRID, ToyDiT, make_plan, toy_inputs, toy_rules
from tests.often import often

# float32 rounding of a different summation order; dense and sparse differ by more than 1e-2.
CLOSE = 2e-6

flavours = pytest.mark.parametrize("flavour", FLAVOURS, ids=[kind.__name__ for kind in FLAVOURS])
Flavour = Callable[[int], nn.Module]


def build(flavour: Flavour, breaks: bool = False) -> ToyDiT:
    torch.manual_seed(0)
    return ToyDiT(attention=flavour, breaks=breaks).eval()


def sites(flavour: Flavour) -> tuple[str, ...]:
    inner = ".attention" if flavour in (PackedModule, LooksAtModuleWeights) else ""
    return tuple(f"{name}{inner}" for name in toy_rules())


def rules(flavour: Flavour) -> dict[str, Rule]:
    return dict(zip(sites(flavour), toy_rules().values(), strict=True))


def reference(model: ToyDiT, rules: dict[str, Rule]) -> torch.Tensor:
    """The model with the tile masks added to its own scores."""
    blocks = [(model.blocks[n].attn1, rule) for n, rule in enumerate(rules.values())]
    for attention, rule in blocks:
        attention.bias = rule.mask(GRID.frames).expand(TokenLayout(GRID))
    out = model(**toy_inputs())
    for attention, _ in blocks:
        attention.bias = None
    return out


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


@flavours
@torch.no_grad()
def test_sites_layouts_and_numbers(flavour: Flavour) -> None:
    model = build(flavour)
    dense, expected = model(**toy_inputs()), reference(model, rules(flavour))
    assert far(dense, expected) > 1e-2
    found = find_attention(model, (), toy_inputs())
    assert found.names == sites(flavour)
    assert set(found.refused.values()) == {
        "cross-attention: q and k, v come from different hidden states"
    }
    layouts = infer_layout(model, found, (), toy_inputs())
    assert dict(layouts.layouts) == dict.fromkeys(sites(flavour), TokenLayout(GRID))
    assert set(layouts.evidence.values()) == {"probe"}

    apply_plan(model, make_plan(model, dict(rules(flavour))), inner="eager")
    assert far(model(**toy_inputs()), expected) < CLOSE
    assert report(model).rewritten == sites(flavour)
    restore(model)
    assert torch.equal(model(**toy_inputs()), dense)


@flavours
@torch.no_grad()
def test_layers_that_share_graphs_have_masks_of_their_own(flavour: Flavour) -> None:
    model = build(flavour, breaks=True)
    expected = reference(model, rules(flavour))
    found = find_attention(model, (), toy_inputs())
    assert (found.names, found.scoped, found.fullgraph) == (sites(flavour), (), False)
    layouts = infer_layout(model, found, (), toy_inputs())
    assert dict(layouts.layouts) == dict.fromkeys(sites(flavour), TokenLayout(GRID))
    apply_plan(model, make_plan(model, dict(rules(flavour)), fullgraph=False), inner="eager")
    assert far(model(**toy_inputs()), expected) < CLOSE
    assert report(model).rewritten == sites(flavour)


@flavours
@torch.no_grad()
def test_what_the_plan_leaves_dense_keeps_the_models_own_arithmetic(flavour: Flavour) -> None:
    model = build(flavour)
    first, second = sites(flavour)
    # In eager inference nn.MultiheadAttention takes a path of its own, which rounds otherwise.
    dense = torch.compile(model, backend="eager", fullgraph=True)(**toy_inputs())
    apply_plan(model, make_plan(model, {first: Rule(GRID.frames), second: None}), inner="eager")
    assert torch.equal(model(**toy_inputs()), dense)


@pytest.mark.slow
@torch.no_grad()
def test_inductor_computes_the_same() -> None:
    model = build(Matmul)
    expected = reference(model, rules(Matmul))
    apply_plan(model, make_plan(model, dict(rules(Matmul))), inner="inductor")
    assert far(model(**toy_inputs()), expected) < CLOSE


@pytest.mark.parametrize("flavour", [Einsum, PackedModule])
def test_gradients(flavour: Flavour) -> None:
    model = build(flavour)
    reference(model, rules(flavour)).square().mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    apply_plan(model, make_plan(model, dict(rules(flavour))), inner="eager")
    model(**toy_inputs()).square().mean().backward()
    for name, gradient in expected.items():
        assert far(model.get_parameter(name).grad, gradient) < CLOSE, name


@pytest.mark.parametrize(
    ("flavour", "breaks"),
    often(
        ["in one graph"],
        {
            "in one graph": (HeadsInTheBatch, False),
            "in graphs that layers share": (PackedModule, True),
        },
    ),
)
def test_from_calibration_to_a_sparse_model(flavour: Flavour, breaks: bool) -> None:
    model, calls = build(flavour, breaks), [toy_inputs() for _ in range(2)]
    config = Config(
        threshold=0.9,
        references=(1,),
        windows=(0,),
        weightings=("none",),
        spacings=("paper",),
        min_tokens=8,
        verify_prompts=1,
        inner="eager",
        progress=False,
    )
    plan = evdit_opt.make_plan(model, calls, config)
    assert tuple(plan.rules) == sites(flavour)
    assert plan.fullgraph != breaks
    evdit_opt.apply_plan(model, plan, inner="eager")
    with torch.no_grad():
        actual = model(**toy_inputs())
        restore(model)
        assert far(actual, reference(model, dict(plan.rules))) < CLOSE
    strict = evdit_opt.make_plan(model, calls, replace(config, threshold=1e-6))
    assert strict.rules == {}


@pytest.mark.parametrize(
    ("flavour", "train", "reason"),
    [
        (LooksAtWeights, False, "attention weights are used elsewhere"),
        (LooksAtModuleWeights, False, "attention weights are used elsewhere"),
        (Causal, False, "hide different keys from different queries"),
        (Einsum, True, r"dropout 0\.1"),
    ],
)
def test_what_cannot_be_sparse_is_refused_with_the_reason(
    flavour: Flavour, train: bool, reason: str
) -> None:
    model = build(flavour).train(train)
    found = find_attention(model, (), toy_inputs())
    assert found.names == ()
    for name in sites(flavour):
        assert re.search(reason, found.refused[name]), found.refused[name]
    apply_plan(model, make_plan(model, dict(rules(flavour))), inner="eager")
    with pytest.raises(BackendCompilerFailed, match=rf"blocks\.0\.attn1.*{reason}"):
        model(**toy_inputs())
