"""Graphs that were exported before."""

import torch
import torch.nn.functional as F

from evdit_opt.passes.canonicalize_aten import canonicalize_aten
from evdit_opt.passes.graph import attention_calls, read_attention
from evdit_opt.passes.stand_in import settle
from tests.passes.graph_builder import GraphBuilder

ATEN = torch.ops.aten.scaled_dot_product_attention.default


def test_the_operator_becomes_the_function_with_the_same_arguments() -> None:
    build = GraphBuilder()
    q, mask = build.input("l_q_", 1, 2, 4, 8), build.input("l_m_", 1, 1, 1, 4)
    gm = build.module(build.call(ATEN, q, q, q, mask, 0.0, False, scale=0.5))
    torch.manual_seed(0)
    inputs = torch.randn(1, 2, 4, 8), torch.randn(1, 1, 1, 4)
    before = gm(*inputs)
    stand_ins = list(canonicalize_aten(gm.graph))
    gm.recompile()
    (call,) = attention_calls(gm.graph)
    assert call.target is F.scaled_dot_product_attention
    attention = read_attention(call)
    assert (attention.q, attention.attn_mask, attention.scale) == (q, mask, 0.5)
    assert torch.equal(gm(*inputs)[0], before[0])
    settle(stand_ins)
    assert attention_calls(gm.graph) == []
    assert [node.target for node in gm.graph.nodes if node.op == "call_function"] == [ATEN]


def test_other_operators_stay() -> None:
    build = GraphBuilder()
    q = build.input("l_q_", 1, 2, 4, 8)
    build.module(build.call(torch.ops.aten.softmax.int, q, -1))
    assert list(canonicalize_aten(build.graph)) == []
