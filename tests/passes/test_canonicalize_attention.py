"""All forms together, in subgraphs too; each form has its own test."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from evdit_opt.passes.canonicalize_attention import canonicalize_attention
from evdit_opt.passes.graph import attention_calls, read_attention, subgraphs, value_of
from evdit_opt.passes.stand_in import settle
from tests.passes.spelled import BATCH, HEADS, SEQ, dynamo_graph, inputs, padding, run


def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = padding().expand(-1, HEADS, SEQ, -1)
    return (q @ k.mT).masked_fill(hidden, float("-inf")).softmax(-1) @ v


def test_a_mask_in_spelled_attention_is_reduced_too() -> None:
    gm = dynamo_graph(padded, *inputs())
    before = gm.graph.python_code("self").src
    stand_ins = canonicalize_attention(gm)
    assert len(stand_ins) == 2
    (call,) = attention_calls(gm.graph)
    assert tuple(value_of(read_attention(call).attn_mask).shape) == (BATCH, HEADS, 1, SEQ)
    gm.recompile()
    torch.testing.assert_close(run(gm, *inputs()), padded(*inputs()))
    settle(stand_ins)
    assert gm.graph.python_code("self").src == before


def test_what_is_checkpointed_is_looked_into() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return checkpoint(padded, q, k, v, use_reentrant=False)

    gm = dynamo_graph(fn, *(x.requires_grad_() for x in inputs()))
    assert len(canonicalize_attention(gm)) == 2
    assert sum(len(attention_calls(body.graph)) for body in subgraphs(gm)) == 1
