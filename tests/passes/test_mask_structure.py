"""What is proven constant is constant, and what may vary is never said to be constant."""

import operator

import pytest
import torch
from torch import fx

from evdit_opt.passes.mask_structure import constant_dims, mutated_storages
from tests.passes.graph_builder import GraphBuilder

SEQ = 5


def start() -> tuple[GraphBuilder, fx.Node]:
    """A padding mask ``[2, SEQ]``."""
    build = GraphBuilder()
    return build, build.input("l_padding_", 2, SEQ, dtype=torch.bool)


def constant(build: GraphBuilder, node: fx.Node) -> set[int]:
    return set(constant_dims(node, mutated_storages(build.graph.nodes)))


def keys(build: GraphBuilder, padding: fx.Node) -> fx.Node:
    """``[2, 1, SEQ, SEQ]``, the same keys for every query."""
    row = build.call(torch.Tensor.view, padding, 2, 1, 1, SEQ)
    return build.call(torch.Tensor.expand, row, -1, -1, SEQ, -1)


def test_an_expanded_dimension_is_constant() -> None:
    build, padding = start()
    assert constant(build, padding) == set()
    assert constant(build, keys(build, padding)) == {1, 2}


@pytest.mark.parametrize(
    ("target", "arguments", "expected"),
    [
        (torch.transpose, (2, 3), {1, 3}),
        (torch.permute, ((0, 2, 3, 1),), {1, 3}),
        (torch.Tensor.float, (), {1, 2}),
        (torch.logical_not, (), {1, 2}),
        (operator.getitem, ((slice(None), 0, slice(1, 3)),), {1}),
        (operator.getitem, ((..., None, slice(None)),), {1, 2, 3}),
        (torch.squeeze, (1,), {1}),
        (torch.unsqueeze, (0,), {0, 2, 3}),
        (torch.Tensor.repeat, (1, 3, 2, 2), {1, 2}),
        (torch.repeat_interleave, (3, 0), {1, 2}),
        (torch.nn.functional.pad, ((2, 0),), {1, 2}),
        (torch.nn.functional.pad, ((0, 0, 2, 0),), {1}),
        (torch.flatten, (0, 1), {1}),
        (torch.flatten, (), set()),
        (torch.cumsum, (3,), {1}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),  # str holds an address
)
def test_operations(target: object, arguments: tuple, expected: set[int]) -> None:
    build, padding = start()
    assert constant(build, build.call(target, keys(build, padding), *arguments)) == expected


def test_both_inputs_must_be_constant() -> None:
    build, padding = start()
    row = keys(build, padding)
    column = build.call(torch.transpose, row, 2, 3)
    assert constant(build, build.call(operator.and_, row, row)) == {1, 2}
    assert constant(build, build.call(operator.and_, row, column)) == {1}
    value = build.call(torch.zeros, 2, 1, SEQ, SEQ)
    assert constant(build, value) == {0, 1, 2, 3}
    assert constant(build, build.call(torch.masked_fill, value, row, -1.0)) == {1, 2}


@pytest.mark.parametrize("write", ["setitem", "add_", "view", "iadd"])
def test_a_tensor_that_is_written_to_proves_nothing(write: str) -> None:
    build, padding = start()
    mask = build.call(torch.Tensor.clone, keys(build, padding))
    assert constant(build, mask) == {1, 2}
    if write == "setitem":
        build.call(operator.setitem, mask, (slice(None), 0, 0), True)
    elif write == "add_":
        build.call(torch.Tensor.logical_not_, mask)
    elif write == "view":
        build.call(torch.Tensor.fill_, build.call(operator.getitem, mask, 0), True)
    else:
        build.call(operator.iand, mask, mask)
    assert constant(build, mask) == {1}, "its size is still 1 there"
    row = build.call(operator.getitem, mask, (slice(None), slice(None), slice(0, 1)))
    again = build.call(torch.Tensor.expand, row, -1, -1, SEQ, -1)
    assert constant(build, again) == {1, 2}, "one row in memory is one row, whoever writes to it"


def test_random_masks_are_what_is_said_of_them() -> None:
    build, padding = start()
    row = keys(build, padding)
    column = build.call(torch.transpose, row, 2, 3)
    nodes = [row, column, build.call(operator.and_, row, column)]
    for node in [*nodes]:
        nodes.append(build.call(torch.Tensor.reshape, node, 2, SEQ, SEQ))
        nodes.append(build.call(torch.Tensor.reshape, node, 2 * SEQ, SEQ))
        nodes.append(build.call(operator.getitem, node, (slice(None), 0, slice(1, 4), None)))
    gm = build.module(*nodes)
    values = gm(torch.rand(2, SEQ, generator=torch.Generator().manual_seed(0)) > 0.5)
    for node, value in zip(nodes, values, strict=True):
        for dim in constant(build, node):
            first = value.narrow(dim, 0, 1)
            assert torch.equal(first.expand_as(value), value), (node.name, dim)
