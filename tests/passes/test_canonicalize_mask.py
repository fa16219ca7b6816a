"""Masks that repeat one row are reduced to it; masks that do not are left alone."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from evdit_opt.passes.canonicalize_mask import canonicalize_mask
from evdit_opt.passes.graph import attention_calls, read_attention, value_of
from evdit_opt.passes.stand_in import settle
from tests.passes.graph_builder import GraphBuilder, calls

BATCH, SEQ = 2, 6


def start() -> tuple[GraphBuilder, fx.Node, fx.Node]:
    build = GraphBuilder()
    q = build.input("l_q_", BATCH, 2, SEQ, 8)
    padding = build.input("l_padding_", BATCH, SEQ, dtype=torch.bool)
    return build, q, padding


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    padding = torch.ones(BATCH, SEQ, dtype=torch.bool)
    padding[0, 4:] = False
    padding[1, 5:] = False
    return torch.randn(BATCH, 2, SEQ, 8), padding


def expanded(build: GraphBuilder, padding: fx.Node) -> fx.Node:
    row = build.call(torch.Tensor.view, padding, BATCH, 1, 1, SEQ)
    return build.call(torch.Tensor.repeat, row, 1, 1, SEQ, 1)


def compare(build: GraphBuilder, call: fx.Node, rewritten: int) -> fx.GraphModule:
    """Check numbers and count; what is not rewritten must stay the very same node."""
    gm = build.module(call)
    before = gm(*inputs())
    stand_ins = list(canonicalize_mask(gm.graph))
    gm.recompile()
    assert len(stand_ins) == rewritten
    assert len(attention_calls(gm.graph)) == 1
    torch.testing.assert_close(gm(*inputs()), before)
    gm.graph.lint()
    return gm


def mask_shape(gm: fx.GraphModule) -> tuple[int, ...]:
    (call,) = attention_calls(gm.graph)
    return tuple(value_of(read_attention(call).attn_mask).shape)


def test_an_expanded_mask_is_reduced_to_its_row() -> None:
    build, q, padding = start()
    mask = expanded(build, padding)
    gm = compare(build, build.call(F.scaled_dot_product_attention, q, q, q, mask), 1)
    assert mask_shape(gm) == (BATCH, 1, 1, SEQ)
    assert not calls(gm, "where")


def test_an_additive_mask_too() -> None:
    build, q, padding = start()
    hidden = build.call(torch.logical_not, expanded(build, padding))
    zeros = build.call(torch.zeros, BATCH, 1, SEQ, SEQ)
    bias = build.call(torch.masked_fill, zeros, hidden, float("-inf"))
    gm = compare(build, build.call(F.scaled_dot_product_attention, q, q, q, bias, scale=0.5), 1)
    assert mask_shape(gm) == (BATCH, 1, 1, SEQ)
    (call,) = attention_calls(gm.graph)
    assert read_attention(call).scale == 0.5


def test_hidden_rows_become_zeros() -> None:
    build, q, padding = start()
    rows = expanded(build, padding)
    both = build.call(operator.and_, rows, build.call(torch.transpose, rows, 2, 3))
    mask = build.call(torch.Tensor.bool, both)
    gm = compare(build, build.call(F.scaled_dot_product_attention, q, q, q, attn_mask=mask), 1)
    assert mask_shape(gm) == (BATCH, 1, 1, SEQ)
    assert gm(*inputs())[0][0, :, 4:].abs().max() == 0


def test_a_mask_with_fewer_dimensions_gets_four() -> None:
    build, q, padding = start()
    row = build.call(operator.getitem, padding, slice(0, 1))
    gm = compare(build, build.call(F.scaled_dot_product_attention, q, q, q, row), 1)
    assert mask_shape(gm) == (1, 1, 1, SEQ)


@pytest.mark.parametrize("kind", ["none", "reduced", "causal", "or", "float", "unknown", "written"])
def test_other_masks_stay_as_they_are(kind: str) -> None:
    build, q, padding = start()
    rows = expanded(build, padding)
    if kind == "none":
        mask = None
    elif kind == "reduced":
        mask = build.call(torch.Tensor.view, padding, BATCH, 1, 1, SEQ)
    elif kind == "causal":
        ones = build.call(torch.ones, SEQ, SEQ, dtype=torch.bool)
        mask = build.call(operator.and_, rows, build.call(torch.tril, ones))
    elif kind == "or":
        mask = build.call(operator.or_, rows, build.call(torch.transpose, rows, 2, 3))
    elif kind == "float":  # rows cannot be told from their sum
        bias = build.call(torch.Tensor.float, rows)
        mask = build.call(operator.mul, bias, build.call(torch.transpose, bias, 2, 3))
    elif kind == "unknown":
        mask = build.call(torch.cumsum, build.call(torch.Tensor.float, rows), 2)
    else:
        build.call(operator.setitem, rows, (slice(None), 0, 0, 0), True)
        mask = rows
    call = build.call(F.scaled_dot_product_attention, q, q, q, mask)
    gm = compare(build, call, 0)
    assert attention_calls(gm.graph) == [call]


def test_what_nobody_takes_is_put_back_as_it_was() -> None:
    build, q, padding = start()
    rows = expanded(build, padding)
    mask = build.call(operator.and_, rows, build.call(torch.transpose, rows, 2, 3))
    gm = build.module(build.call(F.scaled_dot_product_attention, q, q, q, mask))
    before = [str(node) for node in gm.graph.nodes]
    settle(list(canonicalize_mask(gm.graph)))
    assert [str(node) for node in gm.graph.nodes] == before
