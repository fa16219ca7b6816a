"""What is written out twice is one thing, unless it changed in between or is random."""

import operator

import torch
import torch.nn.functional as F

from evdit_opt.passes.same_value import same_value
from tests.passes.graph_builder import GraphBuilder


def start() -> tuple[GraphBuilder, torch.fx.Node, torch.fx.Node]:
    build = GraphBuilder()
    return build, build.input("l_x_", 2, 6, 4), build.input("l_y_", 2, 6, 4)


def normalised(build: GraphBuilder, x: torch.fx.Node, eps: float = 1e-6) -> torch.fx.Node:
    squares = build.call(torch.mean, build.call(torch.square, x), -1, keepdim=True)
    return build.call(operator.mul, x, build.call(torch.rsqrt, build.call(torch.add, squares, eps)))


def test_the_same_calls_on_the_same_input() -> None:
    build, x, y = start()
    assert same_value(x, x)
    assert not same_value(x, y)
    first, second = (build.call(torch.transpose, x, 0, 1) for _ in range(2))
    assert same_value(first, second)
    assert not same_value(first, build.call(torch.transpose, x, 1, 2))
    assert not same_value(first, build.call(torch.transpose, y, 0, 1))
    assert same_value(normalised(build, first), normalised(build, second))
    assert not same_value(normalised(build, x), normalised(build, x, eps=1e-5))


def test_lists_of_inputs_are_compared_entry_by_entry() -> None:
    build, x, y = start()
    joined = build.call(torch.cat, [x, y], 1)
    assert same_value(joined, build.call(torch.cat, [x, y], 1))
    assert not same_value(joined, build.call(torch.cat, [y, x], 1))
    assert not same_value(joined, build.call(torch.cat, [x], 1))


def test_what_changed_in_between_differs() -> None:
    build, x, y = start()
    first = build.call(torch.transpose, x, 0, 1)
    build.call(operator.iadd, x, y)
    assert not same_value(first, build.call(torch.transpose, x, 0, 1))


def test_a_change_through_a_view_is_seen() -> None:
    build, x, y = start()
    first = build.call(torch.neg, x)
    build.call(operator.iadd, build.call(torch.flatten, x), build.call(torch.flatten, y))
    assert not same_value(first, build.call(torch.neg, x))


def test_a_change_afterwards_does_not_matter() -> None:
    build, x, y = start()
    first, second = (build.call(torch.neg, x) for _ in range(2))
    build.call(operator.iadd, x, y)
    assert same_value(first, second)


def test_random_numbers_differ() -> None:
    build, x, _ = start()
    assert not same_value(*(build.call(F.dropout, x, 0.5, True) for _ in range(2)))
