"""Scopes: sites whose mark and attention land in different graphs. Each hazard has its test."""

import copy
import pickle
import threading
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from evdit_opt.apply import apply_plan, report, restore
from evdit_opt.errors import PlanMismatchError, UnsupportedInputError
from evdit_opt.grid import TokenLayout, VideoGrid
from evdit_opt.masks import Rule
from evdit_opt.passes.find_attention import find_attention
from evdit_opt.passes.infer_layout import infer_layout
from evdit_opt.passes.observe_attention import observe
from tests.models.branching_dit import branching, scope_plan
from tests.models.masked import masked_attention
from tests.models.toy_dit import GRID, SOURCE, ToyDiT, make_plan, toy, toy_inputs, toy_rules

# float32 rounding of a different summation order; dense and sparse differ by more than 1e-2.
CLOSE = 2e-6

outside = pytest.mark.parametrize("outside", [False, True], ids=["in-graph", "outside-graphs"])


@pytest.fixture(autouse=True)
def _no_scope_is_left_behind() -> Iterator[None]:
    builtin = F.scaled_dot_product_attention
    yield
    assert torch._C._len_torch_function_stack() == 0
    assert F.scaled_dot_product_attention is builtin


def reference(model: nn.Module, rules: dict[str, Rule], grid: VideoGrid = GRID) -> torch.Tensor:
    with torch.no_grad(), masked_attention(model, rules, TokenLayout(grid)):
        return model(**toy_inputs(grid))


def run(model: nn.Module, grid: VideoGrid = GRID) -> torch.Tensor:
    with torch.no_grad():
        return model(**toy_inputs(grid))


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return (actual - expected).abs().max().item()


@outside
def test_planning_chooses_scopes_and_finds_the_layout(outside: bool) -> None:
    model = branching(outside=outside)
    dense = run(model)
    sites = find_attention(model, (), toy_inputs())
    assert sites.names == sites.scoped == tuple(toy_rules())
    assert not sites.fullgraph
    found = infer_layout(model, sites, (), toy_inputs())
    assert dict(found.layouts) == dict.fromkeys(sites.names, TokenLayout(GRID))
    assert set(found.evidence.values()) == {"probe"}
    assert torch.equal(run(model), dense)


def test_planning_keeps_marks_where_they_reach_the_attention() -> None:
    sites = find_attention(toy(breaks=True), (), toy_inputs())
    assert sites.names == tuple(toy_rules())
    assert not sites.fullgraph
    assert sites.scoped == ()


def test_a_module_with_two_attentions_gets_no_scope() -> None:
    class Twice(type(branching(1).blocks[0].attn1)):  # type: ignore[misc]
        def forward(self, hidden_states):
            return super().forward(hidden_states) + super().forward(hidden_states, self.context)

    model = branching(1)
    model.blocks[0].attn1.__class__ = Twice
    model.blocks[0].attn1.context = torch.randn(1, 5, 16)
    sites = find_attention(model, (), toy_inputs())
    assert sites.names == ()
    (reason,) = [found.reason for found in sites.attentions if found.q_len == found.kv_len]
    assert "holds another attention" in reason


def test_what_is_spelled_out_gets_no_scope() -> None:
    class Spelled(type(branching(1).blocks[0].attn1)):  # type: ignore[misc]
        def attend(self, q, k, v):
            return (q @ k.mT).softmax(-1) @ v

    model = branching(1)
    model.blocks[0].attn1.__class__ = Spelled
    sites = find_attention(model, (), toy_inputs())
    assert sites.names == ()
    assert "does not call scaled_dot_product_attention" in sites.refused["blocks.0.attn1"]


@outside
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_every_layer_gets_its_own_mask_and_restore_is_exact(outside: bool, inner: str) -> None:
    model, rules = branching(4, outside), toy_rules(4)
    dense, expected = run(model), reference(model, rules)
    attributes = set(vars(model))
    apply_plan(model, scope_plan(model, rules), inner=inner)
    for _ in range(2):
        assert error(run(model), expected) < CLOSE
    assert error(dense, expected) > 1e-2
    done = report(model)
    assert done.rewritten == tuple(rules)
    assert "blocks.1.attn1  0 references + window 1, density 0.625, in a scope" in done.show()
    graphs = done.graphs
    run(model)
    assert report(model).graphs == graphs

    restore(model)
    assert torch.equal(run(model), dense)
    assert set(vars(model)) == attributes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_layers_with_equal_rules_share_their_graphs() -> None:
    def graphs(layers: int) -> int:
        model = branching(layers)
        rules = {f"blocks.{n}.attn1": Rule(n % 2) for n in range(layers)}
        expected = reference(model, rules)
        apply_plan(model, scope_plan(model, rules), inner="eager")
        assert error(run(model), expected) < CLOSE
        assert report(model).rewritten == tuple(rules)
        return report(model).graphs

    assert graphs(2) == graphs(6)


@outside
def test_the_grid_is_read_live(outside: bool) -> None:
    model, rules = branching(outside=outside), toy_rules()
    grids = [VideoGrid(*s) for s in ((6, 4, 5), (5, 4, 6), (6, 4, 5), (4, 5, 6))]  # 120 tokens each
    expected = [reference(model, rules, grid) for grid in grids]
    apply_plan(model, scope_plan(model, rules), inner="eager")
    for grid, right in zip(grids, expected, strict=True):
        assert error(run(model, grid), right) < CLOSE, grid


@outside
def test_threads_do_not_see_one_another(outside: bool) -> None:
    model, rules = branching(outside=outside), toy_rules()
    other = toy()
    grids = (VideoGrid(6, 4, 5), VideoGrid(5, 4, 6))
    expected = [reference(model, rules, grid) for grid in grids]
    dense = [run(other, grid) for grid in grids]
    apply_plan(model, scope_plan(model, rules), inner="eager")
    inputs = [toy_inputs(grid) for grid in grids]  # the seed is everybody's
    failures: list[str] = []

    @torch.no_grad()
    def work(number: int) -> None:
        for _ in range(20):
            if error(model(**inputs[number]), expected[number]) >= CLOSE:
                failures.append(f"sparse {number}")
            if not torch.equal(other(**inputs[number]), dense[number]):
                failures.append(f"dense {number}")

    for number in range(2):
        work(number)  # compiles
    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@outside
def test_an_exception_leaves_nothing_behind(outside: bool) -> None:
    model, rules = branching(outside=outside), toy_rules()
    dense = run(toy())
    expected = reference(model, rules)
    apply_plan(model, scope_plan(model, rules), inner="eager")
    run(model)
    inputs = toy_inputs()
    inputs["hidden_states"].fill_(float("nan"))
    with torch.no_grad(), pytest.raises(ArithmeticError, match="not a number"):
        model(**inputs)
    assert torch._C._len_torch_function_stack() == 0
    assert torch.equal(run(toy()), dense)
    assert error(run(model), expected) < CLOSE


@outside
def test_gradients_with_and_without_checkpointing(outside: bool) -> None:
    model, rules = branching(outside=outside), toy_rules()
    with masked_attention(model, rules, TokenLayout(GRID)):
        model(**toy_inputs()).square().mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for checkpoint in (False, True):
        model.checkpoint = checkpoint
        model.zero_grad()
        apply_plan(model, scope_plan(model, rules), inner="eager")
        model(**toy_inputs()).square().mean().backward()
        restore(model)
        for name, parameter in model.named_parameters():
            assert error(parameter.grad, expected[name]) < CLOSE, (name, checkpoint)


def test_a_module_that_does_not_attend_is_an_error_with_its_name() -> None:
    model = branching()
    model.blocks[1].attn1.attend = lambda q, k, v: v
    apply_plan(model, scope_plan(model, toy_rules()), inner="eager")
    with pytest.raises(PlanMismatchError, match=r"blocks\.1\.attn1 to call .* not rewritten"):
        run(model)


def test_a_part_of_the_model_called_alone_is_an_error_with_its_name() -> None:
    model = branching(outside=True)
    apply_plan(model, scope_plan(model, toy_rules()), inner="eager")
    run(model)
    with pytest.raises(PlanMismatchError, match=r"blocks\.0\.attn1 .* call the whole model"):
        model.blocks[0](torch.randn(1, 24, 16), torch.randn(1, 5, 16))


def test_marks_instead_of_scopes_are_an_error_with_the_names() -> None:
    model = branching(4)
    rules = {f"blocks.{n}.attn1": Rule(n % 2) for n in range(4)}
    apply_plan(model, make_plan(model, rules, fullgraph=False), inner="eager")
    with pytest.raises(Exception, match=r"blocks\.0\.attn1.*not rewritten") as failure:
        run(model)
    assert isinstance(failure.value.inner_exception, PlanMismatchError)


def test_a_whole_graph_and_scopes_exclude_each_other() -> None:
    model = branching()
    with pytest.raises(UnsupportedInputError, match=r"blocks\.0\.attn1 in a scope"):
        apply_plan(model, scope_plan(model, toy_rules()), fullgraph=True)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_run_on_their_own(way: str) -> None:
    model, rules = branching(), toy_rules()
    expected = reference(model, rules)
    apply_plan(model, scope_plan(model, rules), inner="eager")
    twin: ToyDiT = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert error(run(twin), expected) < CLOSE  # uncompiled, still sparse
    restore(twin)
    assert error(run(model), expected) < CLOSE


@outside
def test_observing_shows_every_site_and_changes_nothing(outside: bool) -> None:
    model, seen = branching(3, outside), []
    names = tuple(toy_rules(3))
    dense = run(model)

    def look(name, q, k, v, attn_mask, scale):
        seen.append((name, tuple(q.shape), q.requires_grad, attn_mask, scale))

    with observe(model, names, look, scoped=names):
        assert torch.equal(model(**toy_inputs()), dense)
    assert seen == [(name, (1, 2, 24, 8), False, None, None) for name in names]


@outside
def test_observing_marked_and_scoped_sites_together(outside: bool) -> None:
    model, seen = branching(outside=outside), []
    model.blocks[0].attn1.__class__ = type(toy().blocks[0].attn1)  # no branch: a mark will do
    names = tuple(toy_rules())
    dense = run(model)
    with torch.no_grad(), observe(model, names, lambda n, *_: seen.append(n), scoped=names[1:]):
        assert torch.equal(model(**toy_inputs()), dense)
    assert tuple(seen) == names

    def moved() -> torch.Tensor:
        return model(**inputs)

    inputs = toy_inputs()
    with torch.no_grad(), observe(model, names, lambda *_: None, scoped=names[1:], mute=True):
        before = moved()
        inputs["hidden_states"][:, :, 0, 0, 0] += 1
        after = moved()
    assert (after != before).any(-1)[0].nonzero().flatten().tolist() == [0]


def test_the_plan_s_source_is_what_scopes_read() -> None:
    model = branching(outside=True)
    wrong = type(SOURCE)(kind="patch", input="hidden_states", patch=(1, 2, 1), dims=(2, 3, 4))
    apply_plan(model, scope_plan(model, toy_rules(), source=wrong), inner="eager")
    with pytest.raises(Exception, match=r"blocks\.0\.attn1 .* got a sequence of 24"):
        run(model)
