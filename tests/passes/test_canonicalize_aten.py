"""Graphs that were lowered before."""

from operator import getitem
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from evdit_opt.passes.canonicalize_aten import PARTS, WHOLE, canonicalize_aten
from evdit_opt.passes.graph import LEFT_ALONE, attention_calls, read_attention
from evdit_opt.passes.stand_in import settle
from tests.passes.graph_builder import GraphBuilder

aten = torch.ops.aten
CPU, MATH = PARTS[0], PARTS[-1]
MASK = object()


def run(gm: fx.GraphModule) -> torch.Tensor:
    torch.manual_seed(0)
    gm.recompile()
    return gm(torch.randn(1, 2, 4, 8), torch.randn(1, 1, 1, 4))[0]


def start() -> tuple[GraphBuilder, fx.Node, fx.Node]:
    build = GraphBuilder()
    return build, build.input("l_q_", 1, 2, 4, 8), build.input("l_m_", 1, 1, 1, 4)


@pytest.mark.parametrize("operator", [WHOLE, CPU, MATH], ids=["whole", "cpu", "math"])
def test_the_operator_becomes_the_function_with_the_same_arguments(operator: Any) -> None:
    build, q, mask = start()
    if operator is CPU:
        out = build.call(operator, q, q, q, 0.0, False, attn_mask=mask, scale=0.5)
    else:
        out = build.call(operator, q, q, q, mask, 0.0, False, scale=0.5)
    if operator is not WHOLE:
        out = build.call(getitem, out, 0)
    gm = build.module(out)
    before, code = run(gm), gm.code
    stand_ins = list(canonicalize_aten(gm.graph))
    (call,) = attention_calls(gm.graph)
    assert call.target is F.scaled_dot_product_attention
    attention = read_attention(call)
    assert (attention.q, attention.attn_mask, attention.scale) == (q, mask, 0.5)
    torch.testing.assert_close(run(gm), before)
    settle(stand_ins)
    assert attention_calls(gm.graph) == []
    gm.recompile()
    assert gm.code == code


CUDA = {
    "flash": (aten._scaled_dot_product_flash_attention.default, (0.0, False, False), None),
    "efficient": (aten._scaled_dot_product_efficient_attention.default, (MASK, False), MASK),
    "cudnn": (aten._scaled_dot_product_cudnn_attention.default, (MASK, False), MASK),
    "other": (aten._scaled_dot_product_fused_attention_overrideable.default, (MASK,), MASK),
}


@pytest.mark.parametrize(("operator", "rest", "mask"), CUDA.values(), ids=CUDA)
def test_operators_of_other_devices(operator: Any, rest: tuple[Any, ...], mask: Any) -> None:
    assert operator in PARTS
    build, q, m = start()
    given = tuple(m if value is MASK else value for value in rest)
    both = build.graph.call_function(operator, (q, q, q, *given), {"scale": 0.5})
    out = build.graph.call_function(getitem, (both, 0))
    gm = build.module(out)
    assert len(list(canonicalize_aten(gm.graph))) == 1
    (call,) = attention_calls(gm.graph)
    attention = read_attention(call)
    assert (attention.k, attention.attn_mask, attention.scale) == (q, m if mask else None, 0.5)
    assert (attention.dropout_p, attention.is_causal) == (0.0, False)


def test_what_a_backward_needs_stays() -> None:
    build, q, _ = start()
    both = build.call(CPU, q, q, q)
    gm = build.module(*(build.call(getitem, both, n) for n in range(2)))
    assert list(canonicalize_aten(gm.graph)) == []
    assert both.meta[LEFT_ALONE] == "its logsumexp is used elsewhere"


def test_other_operators_stay() -> None:
    build, q, _ = start()
    build.module(build.call(aten.softmax.int, q, -1))
    assert list(canonicalize_aten(build.graph)) == []
