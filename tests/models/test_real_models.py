"""Six diffusers models: which layers are found, where their tokens lie, what they compute."""

import pytest
import torch
from torch import nn

from evdit_opt.apply import apply_plan, report, restore
from evdit_opt.grid import VideoGrid
from evdit_opt.masks import Rule
from evdit_opt.passes.find_attention import find_attention
from evdit_opt.passes.infer_layout import infer_layout
from evdit_opt.passes.observe_attention import observe
from evdit_opt.plan import Plan
from tests.models.masked import masked_attention
from tests.models.small_models import CASES, GRID, Case
from tests.models.toy_dit import make_plan

RULES = (Rule(1), Rule(0, window=1))

# float32 rounding in another order; the tests also show that dense is 1000 times further away.
CLOSE = 3e-6

cases = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


def rules_of(case: Case) -> dict[str, Rule]:
    return dict(zip(case.sites, RULES, strict=True))


def plan_of(case: Case, model: nn.Module) -> Plan:
    return make_plan(
        model,
        dict(rules_of(case)),
        source=case.source,
        grid=GRID,
        prefix=case.prefix,
        suffix=case.suffix,
    )


def reference(case: Case, model: nn.Module, grid: VideoGrid = GRID) -> torch.Tensor:
    with masked_attention(model, rules_of(case), case.layout(grid)) as applied:
        out = model(**case.inputs(grid))[0]
    assert all(applied.values()), applied
    return out


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return (actual - expected).abs().max().item()


@cases
def test_sites_and_layouts_are_found_and_no_others(case: Case) -> None:
    model, call = case.model(), case.inputs()
    dense = model(**call)[0]
    sites = find_attention(model, (), call)
    assert sites.names == case.sites
    assert sites.fullgraph
    assert all(sites.refused.values())
    found = infer_layout(model, sites, (), call)
    assert (found.grid, found.source) == (GRID, case.source)
    assert dict(found.layouts) == dict.fromkeys(case.sites, case.layout())
    assert set(found.evidence.values()) == {"probe"}
    assert not found.refused
    assert torch.equal(model(**call)[0], dense)


@cases
@torch.no_grad()
def test_outputs_are_those_of_dense_masks(case: Case) -> None:
    model = case.model()
    dense = model(**case.inputs())[0]
    expected = reference(case, model)
    assert error(dense, expected) > 1000 * CLOSE

    apply_plan(model, plan_of(case, model), inner="eager")
    assert error(model(**case.inputs())[0], expected) < CLOSE
    assert report(model).rewritten == case.sites
    assert report(model).graphs == 1

    restore(model)
    assert torch.equal(model(**case.inputs())[0], dense)


@pytest.mark.slow
@cases
@torch.no_grad()
def test_inductor_computes_the_same(case: Case) -> None:
    model = case.model()
    expected = reference(case, model)
    apply_plan(model, plan_of(case, model), inner="inductor")
    assert error(model(**case.inputs())[0], expected) < CLOSE
    assert report(model).rewritten == case.sites


@torch.no_grad()
def test_resolution_and_length_may_change_on_the_fly() -> None:
    case = CASES[0]
    model = case.model()
    grids = (GRID, VideoGrid(6, 2, 5), VideoGrid(9, 3, 4))
    expected = [reference(case, model, grid) for grid in grids]
    apply_plan(model, plan_of(case, model), inner="eager")
    for grid, right in zip(grids, expected, strict=True):
        assert error(model(**case.inputs(grid))[0], right) < CLOSE


def test_gradients() -> None:
    case = CASES[0]
    model = case.model()
    reference(case, model).square().mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    apply_plan(model, plan_of(case, model), inner="eager")
    model(**case.inputs())[0].square().mean().backward()
    for name, gradient in expected.items():
        assert error(model.get_parameter(name).grad, gradient) < CLOSE, name


@torch.no_grad()
def test_observing_shows_every_site_and_changes_nothing() -> None:
    case = CASES[2]  # its own mask, joint text
    model = case.model()
    dense = model(**case.inputs())[0]
    seen = []

    def look(name, q, k, v, attn_mask, scale):
        assert not q.requires_grad
        seen.append((name, q.shape[2], k.shape[2], v.shape[2], attn_mask.shape))

    with observe(model, case.sites, look):
        assert torch.equal(model(**case.inputs())[0], dense)
        model(**case.inputs())
    tokens = case.layout().seq_len
    once = [(name, tokens, tokens, tokens, (1, 1, 1, tokens)) for name in case.sites]
    assert seen == once * 2
    model(**case.inputs())
    assert len(seen) == 4
