"""Reading Dynamo's graphs."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from evdit_opt.passes.graph import (
    copy_graph,
    is_attention,
    layer_fqn,
    read_attention,
    subgraphs,
    walk_back,
)
from tests.passes.graph_builder import GraphBuilder


def test_arguments_are_read_by_position_and_by_name() -> None:
    build = GraphBuilder()
    q, k, v, mask = (build.input(f"l_{n}_", 1, 2, 4, 8) for n in "qkvm")
    positional = build.graph.call_function(F.scaled_dot_product_attention, (q, k, v, mask, 0.1))
    named = build.graph.call_function(
        F.scaled_dot_product_attention,
        (),
        {"query": q, "key": k, "value": v, "attn_mask": mask, "dropout_p": 0.1},
    )
    assert read_attention(positional) == read_attention(named)
    assert read_attention(named)[:5] == (q, k, v, mask, 0.1)


@pytest.mark.parametrize(
    "path",
    [
        "L['self'].blocks.0.attn1",
        "L['self'].blocks[0].attn1",
        "L['args'][0]._modules['blocks']._modules['0'].attn1",
        "L['self'].__dict__['_modules']['blocks'].0.attn1",
    ],
)
def test_module_paths_are_read_from_what_dynamo_writes(path: str) -> None:
    node = fx.Graph().placeholder("x")
    node.meta["nn_module_stack"] = {"123@1": (path, nn.Module)}
    assert layer_fqn(node, None) == "blocks.0.attn1"
    assert layer_fqn(node, {123: "the.true.name"}) == "the.true.name"
    assert layer_fqn(node, {}) is None


def test_walking_back_ignores_sizes() -> None:
    build = GraphBuilder()
    x, y = build.input("l_x_", 4), build.input("l_y_", 4)
    size = build.call(operator.getitem, build.call(torch.Tensor.size, x), 0)
    out = build.call(operator.mul, y, size)
    assert set(walk_back([out], lambda node: False)) == {out, y}


def test_copies_are_independent_and_share_weights() -> None:
    inner = fx.symbolic_trace(nn.Identity())
    outer = nn.Module()
    outer.body, outer.weight = inner, nn.Parameter(torch.ones(2))
    graph = fx.Graph()
    x, body, weight = graph.placeholder("x"), graph.get_attr("body"), graph.get_attr("weight")
    called = graph.call_function(torch.ops.higher_order.tag_activation_checkpoint, (body, x))
    graph.output(graph.call_function(torch.add, (called, weight)))
    gm = fx.GraphModule(outer, graph)
    copied = copy_graph(gm)
    assert copied.weight is gm.weight
    assert copied.body is not gm.body
    assert len(list(subgraphs(copied))) == 2
    assert len(copied.graph.nodes) == len(gm.graph.nodes)
    assert not any(is_attention(node) for node in copied.graph.nodes)
    attention = copied.body.graph
    with attention.inserting_before(next(iter(attention.find_nodes(op="output")))):
        attention.call_function(F.scaled_dot_product_attention, ())
    assert any(is_attention(node) for node in copied.graph.nodes)
    assert not any(is_attention(node) for node in gm.graph.nodes)
