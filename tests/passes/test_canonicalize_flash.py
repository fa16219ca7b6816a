"""What diffusers' flash-attention 3 backend leaves in a graph; CUDA only, so nothing is run here.

tests/runtime/test_attention_backend.py runs it, with an operator for the CPU.
"""

from operator import getitem
from typing import Any

import diffusers.models.attention_dispatch  # noqa: F401  registers the operator
import pytest
import torch

from evdit_opt.passes.canonicalize_flash import canonicalize_flash
from evdit_opt.passes.graph import LEFT_ALONE, attention_calls, read_attention, value_of
from evdit_opt.passes.stand_in import settle
from tests.passes.graph_builder import GraphBuilder

FLASH = torch.ops._diffusers_flash_attn_3._flash_attn_forward.default
ROWS = (1, 4, 2, 8)  # [batch, seq, heads, head_dim]


def start(kv_heads: int = 2, **options: Any) -> tuple[GraphBuilder, Any]:
    build = GraphBuilder()
    q = build.input("l_q_", *ROWS)
    k, v = (build.input(name, 1, 4, kv_heads, 8) for name in ("l_k_", "l_v_"))
    return build, build.call(FLASH, q=q, k=k, v=v, **options)


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_it_becomes_the_function_with_heads_before_tokens(kv_heads: int) -> None:
    build, both = start(kv_heads, softmax_scale=0.5, causal=False, num_splits=2)
    gm = build.module(build.call(getitem, both, 0))
    code = gm.code
    stand_ins = list(canonicalize_flash(gm.graph))
    (call,) = attention_calls(gm.graph)
    attention = read_attention(call)
    inputs = [value_of(x).shape for x in (attention.q, attention.k, attention.v)]
    assert inputs == [(1, 2, 4, 8), *[(1, kv_heads, 4, 8)] * 2]
    assert (attention.scale, attention.is_causal) == (0.5, False)
    assert attention.enable_gqa == (kv_heads == 1)
    assert attention.attn_mask is None
    result = gm.graph.output_node().args[0][0]
    assert value_of(result).shape == ROWS
    assert result.args == (call, 1, 2)
    settle(stand_ins)
    gm.recompile()
    assert gm.code == code


@pytest.mark.parametrize(
    ("option", "reason"),
    [({"softcap": 3.0}, "with softcap 3.0"), ({"attention_chunk": 2}, "with attention_chunk 2")],
    ids=["softcap", "chunks"],
)
def test_what_computes_something_else_stays(option: dict[str, Any], reason: str) -> None:
    build, both = start(**option)
    build.module(build.call(getitem, both, 0))
    assert list(canonicalize_flash(build.graph)) == []
    assert reason in both.meta[LEFT_ALONE]


def test_a_logsumexp_that_is_read_stays() -> None:
    build, both = start()
    build.module(*(build.call(getitem, both, n) for n in range(2)))
    assert list(canonicalize_flash(build.graph)) == []
    assert both.meta[LEFT_ALONE] == "its logsumexp is used elsewhere"
