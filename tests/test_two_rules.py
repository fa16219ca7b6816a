"""Plans with two rules at a site, applied: every way a model runs, against dense masks per head."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

from evdit_opt.apply import apply_plan, report, restore
from evdit_opt.errors import PlanMismatchError
from evdit_opt.export import export_program
from evdit_opt.grid import TokenLayout
from evdit_opt.guard import Guard
from evdit_opt.masks import Rule
from evdit_opt.models import config_hash
from evdit_opt.plan import Plan, SecondRule
from tests.models.branching_dit import branching, scope_plan
from tests.models.masked import masked_attention
from tests.models.toy_dit import GRID, make_plan, toy, toy_inputs, toy_rules
from tests.tolerance import assert_close_to_fp64

NAMES = tuple(toy_rules(2))
SECONDS = {
    NAMES[0]: SecondRule(rule=Rule(0, window=1), heads=(0,), total=2),
    NAMES[1]: SecondRule(rule=Rule(2, weighting="balanced"), heads=(1,), total=2),
}


class PerHead:
    """Stands in for a rule: a mask with a dimension for heads."""

    def __init__(self, rule: Rule, second: SecondRule) -> None:
        self.rule, self.second = rule, second

    def mask(self, frames: int) -> "PerHead":
        return self

    def expand(self, layout: TokenLayout) -> Tensor:
        """``[heads, seq, seq]``"""
        rules = [
            self.second.rule if head in self.second.heads else self.rule
            for head in range(self.second.total)
        ]
        return torch.stack([rule.mask(layout.grid.frames).expand(layout) for rule in rules])


def two_rules(plan: Plan) -> Plan:
    sites = tuple(replace(site, second=SECONDS[site.name], error=0.1) for site in plan.sites)
    return replace(plan, sites=sites)


def right(model: Any, inputs: dict[str, Tensor], dtype: torch.dtype) -> Any:
    """Output and gradient of a copy in another dtype, by dense masks."""
    model = copy.deepcopy(model).to(dtype)
    inputs = {name: value.to(dtype) for name, value in inputs.items()}
    rules: Any = {
        name: PerHead(rule, SECONDS[name]) for name, rule in toy_rules(len(model.blocks)).items()
    }
    with masked_attention(model, rules, TokenLayout(GRID)) as applied:
        out = model(**inputs)
    assert all(applied.values())
    return out, gradient(model, out)


def gradient(model: Any, out: Tensor) -> Tensor:
    torch.manual_seed(2)
    weight = torch.randn(out.shape).to(out.dtype)
    (found,) = torch.autograd.grad((out * weight).sum(), model.blocks[0].attn1.q.weight)
    return found


@pytest.mark.parametrize(
    ("inner", "layers"), [("eager", 2), pytest.param("inductor", 1, marks=pytest.mark.nightly)]
)
def test_outputs_and_gradients(inner: str, layers: int) -> None:
    model, inputs = toy(layers), toy_inputs()
    plan = two_rules(make_plan(model, toy_rules(layers)))
    exact, eager = (right(model, inputs, dtype) for dtype in (torch.float64, torch.float32))
    apply_plan(model, plan, inner=inner)
    out = model(**inputs)
    assert_close_to_fp64(out, exact[0], eager[0], "output")
    assert_close_to_fp64(gradient(model, out), exact[1], eager[1], "gradient")
    with torch.no_grad():  # where Inductor sees into the operator
        assert_close_to_fp64(model(**inputs), exact[0], eager[0], "output without gradients")
    assert report(model).rewritten == NAMES[:layers]
    assert "for heads 0 of 2" in report(model).show()
    restore(model)
    with torch.no_grad():
        dense = model(**inputs)
    # One rule for all heads is far from it: the bounds above prove something.
    assert (dense - exact[0]).norm() > 1e-3 * exact[0].norm()


def test_a_plan_given_to_the_backend_finds_its_sites_by_name() -> None:
    model, inputs = toy(2), toy_inputs()
    plan = two_rules(make_plan(model, toy_rules(2)))
    exact, eager = (right(model, inputs, dtype)[0] for dtype in (torch.float64, torch.float32))
    compiled = torch.compile(model, backend="evdit", options={"plan": plan, "inner": "eager"})
    with torch.no_grad():
        assert_close_to_fp64(compiled(**inputs), exact, eager)


def test_half_precision() -> None:
    model, inputs = toy(2), toy_inputs()
    plan = two_rules(make_plan(model, toy_rules(2)))
    half = copy.deepcopy(model).bfloat16()
    inputs = {name: value.bfloat16() for name, value in inputs.items()}
    exact, eager = (right(half, inputs, dtype)[0] for dtype in (torch.float64, torch.bfloat16))
    apply_plan(half, plan, inner="eager")
    with torch.no_grad():
        assert_close_to_fp64(half(**inputs), exact, eager)


def test_layers_that_share_a_graph_and_are_cut_apart_keep_their_own_heads() -> None:
    inputs = toy_inputs()
    model = toy(2, breaks=True)
    rules = dict.fromkeys(NAMES, Rule(1))
    plan = make_plan(model, rules, fullgraph=False)
    other = Rule(0, window=1)
    outputs = []
    for heads in ((0, 0), (1, 1), (0, 1)):
        sites = tuple(
            replace(site, second=SecondRule(rule=other, heads=(head,), total=2))
            for site, head in zip(plan.sites, heads, strict=True)
        )
        apply_plan(model, replace(plan, sites=sites), inner="eager")
        per_head: Any = {
            site.name: PerHead(Rule(1), site.second) for site in sites if site.second is not None
        }
        with torch.no_grad():
            out = model(**inputs)
        restore(model)
        expected = []
        for dtype in (torch.float64, torch.float32):
            plain = copy.deepcopy(model).to(dtype)
            given = {name: value.to(dtype) for name, value in inputs.items()}
            with torch.no_grad(), masked_attention(plain, per_head, TokenLayout(GRID)):
                expected.append(plain(**given))
        assert_close_to_fp64(out, *expected)
        outputs.append(out)
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-4)
    assert not torch.allclose(outputs[0], outputs[2], atol=1e-4)


@pytest.mark.parametrize("outside", [False, True], ids=["traced", "outside"])
def test_a_scope_computes_what_a_mark_does(outside: bool) -> None:
    model, inputs = branching(2, outside), toy_inputs()
    exact, eager = (right(toy(2), inputs, dtype)[0] for dtype in (torch.float64, torch.float32))
    apply_plan(model, two_rules(scope_plan(model, dict(toy_rules(2)))), inner="eager")
    with torch.no_grad():
        assert_close_to_fp64(model(**inputs), exact, eager)
    assert report(model).rewritten == NAMES
    assert {site.way for site in report(model).sites} == {"scope"}


def test_a_guard_gets_the_whole_output() -> None:
    model, inputs = toy(2), toy_inputs()
    plan = two_rules(make_plan(model, toy_rules(2)))
    apply_plan(model, plan, inner="eager")
    with torch.no_grad():
        unchecked = model(**inputs)
    restore(model)
    apply_plan(model, plan, inner="eager", guard=Guard(every=1, checks=4))
    with torch.no_grad():
        assert torch.equal(model(**inputs), unchecked)
    found: Any = model._compiled_call_impl
    while not hasattr(found, "_seen"):
        found = getattr(found, "__wrapped__", None) or found.func
    for name in NAMES:
        ((wrong, whole),) = found._seen[name]
        assert 0.0 < wrong < whole


@pytest.mark.parametrize("standard", [False, True], ids=["operator", "standard"])
def test_an_exported_program_computes_the_same(standard: bool) -> None:
    model, inputs = toy(2), toy_inputs()
    plan = two_rules(make_plan(model, toy_rules(2)))
    plan = replace(plan, model_config_hash=config_hash(model))
    exact, eager = (right(model, inputs, dtype)[0] for dtype in (torch.float64, torch.float32))
    program = export_program(model, inputs, plan, standard_ops=standard)
    with torch.no_grad():
        assert_close_to_fp64(program.module()(**inputs), exact, eager)
    assert ("evdit" in str(program.graph)) is not standard


def test_heads_that_the_model_lacks_are_an_error_with_the_sites_name() -> None:
    model = toy(2)
    plan = two_rules(make_plan(model, toy_rules(2)))
    wrong = SecondRule(rule=Rule(2), heads=(3,), total=4)
    plan = replace(plan, sites=(plan.sites[0], replace(plan.sites[1], second=wrong)))
    apply_plan(model, plan, inner="eager")
    with pytest.raises(BackendCompilerFailed) as caught:
        model(**toy_inputs())
    assert isinstance(caught.value.inner_exception, PlanMismatchError)
    assert f"at {NAMES[1]} 4 heads" in str(caught.value.inner_exception)
