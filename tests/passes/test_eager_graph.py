"""The graph of an eager call says the same as Dynamo's where Dynamo makes one."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evdit_opt.passes.eager_graph import eager_graph
from evdit_opt.passes.find_attention import classify_eager, find_attention
from evdit_opt.passes.graph import SDPA, layer_fqn, value_of
from evdit_opt.passes.trace_origin import Origin
from tests.models.small_models import CASES, Case
from tests.models.toy_dit import toy, toy_inputs
from tests.often import often

WHOLE = {case.name: case for case in CASES if case.fullgraph and case.source is not None}


@pytest.mark.parametrize("case", often(["wan", "mochi", "hunyuan", "ltx2"], WHOLE))
def test_attention_is_classified_as_from_dynamos_graph(case: Case) -> None:
    model, call = case.model(), case.inputs()
    seen = classify_eager(model, (), call)
    known = {"q_len": None, "kv_len": None}  # Dynamo may know a length at run time only
    found = find_attention(model, (), call)
    assert [dataclasses.replace(attention, **known) for attention in seen] == [
        dataclasses.replace(attention, **known) for attention in found.attentions
    ]


def test_nodes_have_shapes_without_data_and_the_modules_they_ran_in() -> None:
    model, inputs = toy(), toy_inputs()
    names = {id(module): name for name, module in model.named_modules()}
    graph = eager_graph(model, (inputs["hidden_states"],), {"text": inputs["text"]})
    calls = graph.find_nodes(op="call_function", target=SDPA)
    layers = ["blocks.0.attn1", "blocks.0.attn2", "blocks.1.attn1", "blocks.1.attn2"]
    assert [layer_fqn(call, names) for call in calls] == layers
    assert [tuple(value_of(call).shape) for call in calls] == [(1, 2, 24, 8)] * 4
    assert {value_of(call).device.type for call in calls} == {"meta"}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        out = torch.empty(2, 2, 4)
        out[0] = self.a(x)
        out[1].copy_(self.b(y))  # through a view
        return F.relu(out.mT).mT.unflatten(-1, (2, 2))


@torch.no_grad()
def test_what_is_written_in_place_is_followed_too() -> None:
    graph = eager_graph(InPlace(), (torch.ones(2, 4),), {"y": torch.ones(2, 4)})
    *_, last, end = graph.nodes
    assert end.args == ((last,),)
    assert (last.op, last.target) == ("call_method", "unflatten")
    inputs = set(graph.find_nodes(op="placeholder"))
    assert Origin(last).roots & inputs == {n for n in inputs if n.target == "input"}


class Wrapped:
    """What a model may return instead of a tensor."""

    def __init__(self, sample: Tensor) -> None:
        self.sample = sample


@pytest.mark.parametrize("wrap", [lambda x: (x,), Wrapped], ids=["tuple", "object"])
@torch.no_grad()
def test_what_is_returned_is_the_output(wrap: Any) -> None:
    model = nn.Linear(4, 4)
    model.register_forward_hook(lambda _module, _args, out: wrap(out))
    *_, last, end = eager_graph(model, (torch.ones(2, 4),), {}).nodes
    assert last.target is F.linear
    assert last in end.all_input_nodes


def test_a_compiled_call_is_bypassed_and_an_exception_leaves_nothing_behind() -> None:
    model = toy()
    model.compile(backend=lambda *_: pytest.fail("compiled"))
    eager_graph(model, (), toy_inputs())
    model.blocks[1].forward = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        eager_graph(model, (), toy_inputs())
    assert torch._C._len_torch_function_stack() == 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
