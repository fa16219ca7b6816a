"""Two products of one attention."""

import pytest
import torch
from torch import fx

from evdit_opt.passes.attention_letters import NotSDPA, Operands, match_letters
from evdit_opt.passes.products import read_product
from tests.passes.graph_builder import GraphBuilder

SIZES = {"b": 2, "h": 3, "i": 5, "j": 4, "d": 8, "e": 6, "f": 7}


def match(first: str, second: str, keys: int = -1, right: bool = False) -> Operands:
    """Operands of two einsums; the left (or right) operand of the second is the weights."""
    build = GraphBuilder()

    def tensor(letters: str) -> fx.Node:
        count = len(build.graph.nodes)
        return build.input(f"l_{count}_", *(SIZES[letter] for letter in letters))

    q, k = (tensor(letters) for letters in first.split("->")[0].split(","))
    weights = build.call(torch.softmax, build.call(torch.einsum, first, q, k), keys)
    names = second.split("->")[0].split(",")
    if right:
        product = build.call(torch.einsum, second, tensor(names[0]), weights)
    else:
        product = build.call(torch.einsum, second, weights, tensor(names[1]))
    scores, values = (
        read_product(node)
        for node in (weights.args[0], product)  # type: ignore[arg-type]
    )
    assert scores is not None
    assert values is not None
    return match_letters(scores, values, weights, keys)


@pytest.mark.parametrize(
    ("first", "second", "keys", "right", "expected"),
    [
        ("bhid,bhjd->bhij", "bhij,bhje->bhie", -1, False, "bhid bhjd bhje bhie"),
        ("bihd,bjhd->bhij", "bhij,bjhe->bihe", -1, False, "bhid bhjd bhje bhie"),
        ("bhjd,bhid->bhij", "bhij,bhje->bhie", -1, False, "bhid bhjd bhje bhie"),
        ("bhid,bhjd->bijh", "bhje,bijh->bhie", -2, True, "bhid bhjd bhje bhie"),
        ("bid,bjd->bij", "bij,bje->bie", -1, False, "bid bjd bje bie"),
    ],
    ids=["usual", "sequence-first", "keys-first", "keys-in-the-middle", "one-head"],
)
def test_orders(first: str, second: str, keys: int, right: bool, expected: str) -> None:
    found = match(first, second, keys, right)
    assert [x.wanted for x in (found.q, found.k, found.v, found.out)] == expected.split()
    assert found.scores == first.split("->")[1]


@pytest.mark.parametrize(
    ("first", "second", "keys", "message"),
    [
        ("bhid,bhjd->bhij", "bhij,bhje->bhie", -2, "another dimension"),
        ("bhid,bhjd->bhij", "bhij,bhje->bhie", 1 - 4, "another dimension"),
        ("bhid,bhjd->bhij", "bhij,bhie->bhje", -1, "another dimension"),
        ("bhidf,bhjdf->bhij", "bhij,bhje->bhie", -1, "another dimension"),
    ],
    ids=["over-queries", "over-heads", "weights-transposed", "two-channels"],
)
def test_what_does_not_fit(first: str, second: str, keys: int, message: str) -> None:
    with pytest.raises(NotSDPA, match=message):
        match(first, second, keys)
