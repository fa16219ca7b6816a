"""Stand-ins: one may stand in for another; what is taken goes, what is not comes back."""

import torch
import torch.nn.functional as F
from torch import fx

from evdit_opt.passes.graph import attention_calls, insert_call
from evdit_opt.passes.stand_in import StandIn, settle, stand_in
from tests.passes.graph_builder import GraphBuilder


def replaced(call: fx.Node, scale: float) -> StandIn:
    """``sdpa(q, q, q) -> neg(sdpa(q, q, q, scale=...))``"""
    with call.graph.inserting_before(call):
        other = insert_call(
            call.graph, F.scaled_dot_product_attention, call.args, call, scale=scale
        )
        result = insert_call(call.graph, torch.neg, (other,), call)
    return stand_in(other, [other, result], [call])


def chain() -> tuple[fx.GraphModule, list[StandIn]]:
    build = GraphBuilder()
    q = build.input("l_q_", 1, 2, 4, 8)
    call = build.call(F.scaled_dot_product_attention, q, q, q)
    gm = build.module(build.call(torch.abs, call))
    first = replaced(call, 0.1)
    return gm, [first, replaced(first.attention, 0.2)]


def names(gm: fx.GraphModule) -> list[str]:
    return [getattr(node.target, "__name__", node.op) for node in gm.graph.nodes]


def test_only_the_last_of_a_chain_is_an_attention() -> None:
    gm, (first, second) = chain()
    assert attention_calls(gm.graph) == [second.attention]
    assert first.attention not in attention_calls(gm.graph)


def test_nobody_took_it() -> None:
    gm, stand_ins = chain()
    settle(stand_ins)
    gm.graph.lint()
    assert names(gm) == ["placeholder", "scaled_dot_product_attention", "abs", "output"]
    assert not any("scale" in node.kwargs for node in gm.graph.nodes)
    assert len(attention_calls(gm.graph)) == 1


def test_somebody_used_it() -> None:
    gm, stand_ins = chain()
    last = stand_ins[-1].attention
    with gm.graph.inserting_after(last):
        residual = insert_call(gm.graph, torch.cos, (last,), last)
    gm.graph.output_node().args = ((*gm.graph.output_node().args[0], residual),)
    settle(stand_ins)
    gm.graph.lint()
    assert names(gm).count("scaled_dot_product_attention") == 1
    assert attention_calls(gm.graph) == [last], "both results are of the same call"


def test_somebody_took_it() -> None:
    gm, stand_ins = chain()
    last = stand_ins[-1].attention
    with gm.graph.inserting_before(last):
        sparse = insert_call(gm.graph, torch.cos, (last.args[0],), last)
    last.replace_all_uses_with(sparse)
    gm.graph.erase_node(last)
    settle(stand_ins)
    gm.graph.lint()
    assert names(gm) == ["placeholder", "cos", "neg", "neg", "abs", "output"]
