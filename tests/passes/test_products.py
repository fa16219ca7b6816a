"""Products in one notation."""

import operator

import pytest
import torch
from torch import fx

from evdit_opt.passes.products import arrange, read_product
from evdit_opt.passes.stand_in import Draft
from tests.passes.graph_builder import GraphBuilder, calls


def two(*shapes: tuple[int, ...]) -> tuple[GraphBuilder, fx.Node, fx.Node]:
    build = GraphBuilder()
    x, y = (build.input(f"l_{n}_", *shape) for n, shape in enumerate(shapes))
    return build, x, y


@pytest.mark.parametrize("target", [torch.matmul, operator.matmul])
def test_matmul(target: object) -> None:
    build, x, y = two((2, 3, 5, 8), (2, 3, 8, 4))
    product = read_product(build.call(target, x, y))
    assert product is not None
    assert (product.left, product.right) == (x, y)
    assert product.letters == ("abim", "abmj", "abij")


def test_a_fused_product_has_a_scale_and_a_bias() -> None:
    build, x, y = two((6, 5, 8), (6, 8, 4))
    bias = build.input("l_bias_", 6, 5, 4)
    product = read_product(build.call(torch.baddbmm, bias, x, y, alpha=0.5))
    assert product is not None
    assert (product.scale, product.bias) == (0.5, bias)
    product = read_product(build.call(torch.baddbmm, bias, x, y, beta=0))
    assert product is not None
    assert product.bias is None
    assert read_product(build.call(torch.baddbmm, bias, x, y, beta=2)) is None


def test_einsum_with_spaces_and_a_list() -> None:
    build, x, y = two((2, 5, 3, 8), (2, 4, 3, 8))
    product = read_product(build.call(torch.einsum, "b i h d, b j h d -> b h i j", [x, y]))
    assert product is not None
    assert product.letters == ("bihd", "bjhd", "bhij")


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("bij,bjk", ((2, 3, 4), (2, 4, 5))),
        ("...ij,...jk->...ik", ((2, 3, 4), (2, 4, 5))),
        ("bii,bij->bij", ((2, 3, 3), (2, 3, 5))),
        ("bij,bjk->bk", ((2, 3, 4), (2, 4, 5))),
        ("bij,bjk->bik", ((1, 3, 4), (2, 4, 5))),
    ],
    ids=["implicit", "dots", "diagonal", "summed-alone", "broadcast"],
)
def test_other_sums_are_not_understood(equation: str, shapes: tuple) -> None:
    build, x, y = two(*shapes)
    assert read_product(build.call(torch.einsum, equation, x, y)) is None


@pytest.mark.parametrize(
    "shapes",
    [((3, 5, 8), (8, 4)), ((2, 3, 5, 8), (2, 1, 8, 4)), ((5, 8), (8, 4))],
    ids=["projection", "broadcast", "matrices"],
)
def test_other_matmuls_are_not_understood(shapes: tuple) -> None:
    build, x, y = two(*shapes)
    assert read_product(build.call(torch.matmul, x, y)) is None


def test_what_was_transposed_is_taken_instead_of_transposed_again() -> None:
    build, x, y = two((2, 3, 5, 8), (2, 3, 4, 8))
    transposed = build.call(torch.transpose, y, -2, -1)
    result = build.call(torch.matmul, x, transposed)
    draft = Draft(result)
    assert arrange(draft, transposed, "abmj", "abjm") is y
    assert arrange(draft, x, "abim", "abim") is x
    assert draft.made == []
    moved = arrange(draft, x, "abim", "aibm")
    assert draft.made == [moved]
    gm = build.module(moved)
    (order,) = calls(gm, "permute")
    assert order.args[1] == (0, 2, 1, 3)
