"""Every way to spell attention becomes one SDPA call; what is no attention is left alone."""

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from evdit_opt.passes.canonicalize_softmax import canonicalize_softmax
from evdit_opt.passes.graph import LEFT_ALONE, attention_calls, read_attention, value_of
from evdit_opt.passes.stand_in import settle
from tests.passes.spelled import (
    BATCH,
    HEADS,
    SEQ,
    WAYS,
    graph_of,
    heads_in_the_batch,
    inputs,
    matmul,
    one_head,
    padding,
    run,
    upcast,
)
from tests.tolerance import assert_close_to_fp64

ways = pytest.mark.parametrize("way", WAYS, ids=[way.__name__ for way in WAYS])


def rewritten(
    way: Callable[..., object], dtype: torch.dtype = torch.float32
) -> tuple[fx.GraphModule, list]:
    gm = graph_of(way, dtype)
    stand_ins = list(canonicalize_softmax(gm.graph))
    gm.graph.lint()
    gm.recompile()
    return gm, stand_ins


@ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_one_call_takes_its_place(way: Callable[..., Tensor], dtype: torch.dtype) -> None:
    q, k, v = inputs(dtype)
    gm, stand_ins = rewritten(way, dtype)
    assert len(stand_ins) == 1
    assert attention_calls(gm.graph) == [stand_ins[0].attention]
    eager, actual = way(q, k, v), run(gm, q, k, v)
    assert actual.is_contiguous() or not eager.is_contiguous()
    assert_close_to_fp64(actual, way(*(x.double() for x in (q, k, v))).double(), eager)


@ways
def test_what_is_taken_leaves_nothing_behind(way: Callable[..., Tensor]) -> None:
    gm, (entry,) = rewritten(way)
    with gm.graph.inserting_before(entry.attention):
        zeros = gm.graph.call_function(torch.zeros_like, (entry.attention.args[0],))
    entry.attention.replace_all_uses_with(zeros)
    gm.graph.erase_node(entry.attention)
    settle([entry])
    gm.graph.lint()
    assert all(node._erased for node in entry.original)
    assert "softmax" not in str(gm.graph)


@ways
def test_what_is_not_taken_comes_back(way: Callable[..., Tensor]) -> None:
    gm = graph_of(way)
    before = gm.graph.python_code("self").src
    settle(list(canonicalize_softmax(gm.graph)))
    assert gm.graph.python_code("self").src == before


def shapes(way: Callable[..., Tensor], dtype: torch.dtype = torch.float32) -> list[tuple]:
    _, (entry,) = rewritten(way, dtype)
    attention = read_attention(entry.attention)
    return [
        (tuple(value_of(x).shape), value_of(x).dtype)
        for x in (attention.q, attention.attn_mask)
        if x is not None
    ]


def test_heads_are_split_where_their_number_shows() -> None:
    assert shapes(matmul)[0][0] == (BATCH, HEADS, SEQ, 8)
    assert shapes(heads_in_the_batch)[0][0] == (BATCH * HEADS, 1, SEQ, 8)
    assert shapes(WAYS[8])[0][0] == (BATCH, HEADS, SEQ, 8)
    assert shapes(one_head)[0][0] == (BATCH, 1, SEQ, 8)


def test_upcasts_around_it_are_undone() -> None:
    assert shapes(upcast, torch.bfloat16)[0][1] == torch.bfloat16


def over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-2) @ v


def over_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(1) @ v


def returns_weights(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = (q @ k.mT).softmax(-1)
    return weights @ v, weights


def reads_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    return scores.softmax(-1) @ v + scores.mean()


def drops(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout((q @ k.mT).softmax(-1), 0.2) @ v


def soft_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(padding(), -3.0).softmax(-1) @ v


def scaled_by_a_tensor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * q.mean()).softmax(-1) @ v


def scaled_behind_its_back(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores.mul_(2.0)
    return scores.softmax(-1) @ v


def values_change(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    v = v.clone()
    keys = k.clone()
    scores = q @ keys.mT
    keys.add_(1.0)
    return scores.softmax(-1) @ v + keys


def top_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1)
    return torch.where(weights > 0.1, weights, 0.0) @ v


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        (over_queries, "another dimension than the keys"),
        (over_heads, "another dimension than the keys"),
        (returns_weights, "used elsewhere"),
        (reads_scores, "used elsewhere"),
        (drops, r"dropout 0\.2"),
        (soft_mask, "does not hide"),
        (scaled_by_a_tensor, "multiplied by a tensor"),
        (scaled_behind_its_back, "used elsewhere"),
        (values_change, "in-place"),
        (top_weights, "used elsewhere"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_one_call_cannot_compute_is_left_alone(
    way: Callable[..., object], reason: str
) -> None:
    gm = graph_of(way)
    before = gm.graph.python_code("self").src
    assert list(canonicalize_softmax(gm.graph)) == []
    assert gm.graph.python_code("self").src == before
    (found,) = [node.meta[LEFT_ALONE] for node in gm.graph.nodes if LEFT_ALONE in node.meta]
    assert re.search(reason, found), found


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)


def gate(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = F.linear(q, k[0, 0]).softmax(-1)
    return torch.einsum("bhie,ed->bhid", weights, v[0, 0])


@pytest.mark.parametrize("way", [linear_attention, gate])
def test_a_softmax_of_something_else_is_nobodys_business(way: Callable[..., Tensor]) -> None:
    gm = graph_of(way)
    assert list(canonicalize_softmax(gm.graph)) == []
    assert not any(LEFT_ALONE in node.meta for node in gm.graph.nodes)
