"""The tail of a softmax that PyTorch writes when it lowers attention."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from evdit_opt.passes.graph import live_nodes, operation
from evdit_opt.passes.safe_softmax import zeroed_rows

aten = torch.ops.aten


def lowered(limit: float = float("-inf"), dim: int = -1, fill: float = 0.0) -> fx.Graph:
    graph = fx.Graph()
    scores = graph.placeholder("scores")
    weights = graph.call_function(aten._softmax.default, (scores, -1, False))
    infinite = graph.call_function(aten.eq.Scalar, (scores, limit))
    finite = graph.call_function(aten.logical_not.default, (infinite,))
    shown = graph.call_function(aten.any.dim, (finite, dim, True))
    hidden = graph.call_function(aten.logical_not.default, (shown,))
    filled = graph.call_function(aten.full_like.default, (weights, fill))
    graph.output(graph.call_function(aten.where.self, (hidden, filled, weights)))
    return graph


def found(graph: fx.Graph) -> list[str]:
    (softmax,) = (node for node in graph.nodes if "softmax" in operation(node))
    return [operation(node) for node in zeroed_rows(softmax, live_nodes(graph))]


def test_all_of_it_is_found() -> None:
    names = ["eq", "logical_not", "any", "logical_not", "full_like", "where"]
    assert found(lowered()) == names


def test_pytorch_writes_it_so() -> None:
    class Attention(torch.nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, q, q)

    exported = torch.export.export(Attention(), (torch.randn(1, 2, 4, 8),)).run_decompositions()
    assert found(exported.graph) == found(lowered())


@pytest.mark.parametrize("other", [{"limit": 0.0}, {"dim": -2}, {"fill": 1.0}], ids=str)
def test_what_does_something_else_is_not(other: dict) -> None:
    assert found(lowered(**other)) == []


def test_a_plain_softmax_has_none() -> None:
    graph = fx.Graph()
    graph.output(graph.call_method("softmax", (graph.placeholder("scores"), -1)))
    assert found(graph) == []
