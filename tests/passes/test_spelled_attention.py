"""What is read from attention that is spelled out; the rest is in test_canonicalize_softmax."""

import math

import pytest

from evdit_opt.passes.graph import live_nodes, operation
from evdit_opt.passes.spelled_attention import Spelled, read_spelled
from tests.passes.spelled import (
    DIM,
    HEADS,
    SCALE,
    SEQ,
    WAYS,
    added_mask,
    average_nobody_reads,
    einsum,
    graph_of,
    in_several_steps,
    mask_with_heads_split,
    masked_by_a_number,
    masked_by_infinity,
    matmul,
)


def read(way) -> Spelled:
    graph = graph_of(way).graph
    live = live_nodes(graph)
    (found,) = [x for node in graph.nodes if node in live and (x := read_spelled(node, live))]
    return found


@pytest.mark.parametrize(
    ("way", "scale"), [(matmul, DIM**-0.5), (einsum, SCALE), (added_mask, SCALE)]
)
def test_scale(way, scale: float) -> None:
    assert math.isclose(read(way).scale, scale)


@pytest.mark.parametrize(
    ("way", "kind", "number"),
    [
        (added_mask, "add", SCALE),  # added before scaling
        (masked_by_infinity, "hide", -math.inf),
        (masked_by_a_number, "show", -1e9),
    ],
)
def test_masks(way, kind: str, number: float) -> None:
    (mask,) = read(way).masks
    assert (mask.kind, mask.number, mask.ndim) == (kind, number, 4)


def test_shapes_on_the_way_show_the_heads() -> None:
    assert any(
        tuple(shape)[1:] == (HEADS, SEQ, SEQ) for shape in read(mask_with_heads_split).shapes
    )


def test_everything_in_between_belongs_to_it() -> None:
    names = [operation(node) for node in read(in_several_steps).nodes]
    assert names == ["matmul", "amax", "sub", "exp", "sum", "truediv", "matmul"]
    names = [operation(node) for node in read(average_nobody_reads).nodes]
    assert sorted(names) == ["matmul", "matmul", "mean", "softmax"]
    assert names[-1] == "matmul", "the result comes last"


@pytest.mark.parametrize("way", WAYS)
def test_the_result_is_what_leaves_it(way) -> None:
    spelled = read(way)
    inside = set(spelled.nodes)
    live = live_nodes(spelled.nodes[0].graph)
    for node in spelled.nodes[:-1]:
        assert all(user in inside or user not in live for user in node.users), node
