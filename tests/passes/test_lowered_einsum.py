"""An einsum that became a product of matrices between views is read as the einsum it was."""

import pytest
import torch
from torch import Tensor, fx, nn

from evdit_opt.passes.graph import live_nodes
from evdit_opt.passes.lowered_einsum import nodes_to_lowered_einsum, read_lowered_einsum

SIZES = {"b": 2, "h": 3, "i": 5, "j": 7, "d": 4}


class Product(nn.Module):
    """An einsum, or what else ``function`` is, of two tensors that are not inputs themselves."""

    def __init__(self, equation: str) -> None:
        super().__init__()
        self.equation = equation

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.einsum(self.equation, x * 2.0, y * 3.0) + 1.0


def lowered(module: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    return torch.export.export(module, inputs).run_decompositions().module()


def result_of(gm: fx.GraphModule) -> fx.Node:
    """What 1 is added to."""
    (last,) = (node for node in gm.graph.nodes if str(node.target) == "aten.add.Tensor")
    return last.args[0]


def operands(letters: str, sizes: dict[str, int] = SIZES) -> list[Tensor]:
    torch.manual_seed(0)
    inputs = letters.split("->")[0].split(",")
    return [torch.randn([sizes[letter] for letter in part]) for part in inputs]


@pytest.mark.parametrize(
    "equation",
    ["bhid,bhjd->bhij", "bihd,bjhd->bhij", "bhij,bhjd->bihd", "bhid,bhjd->bijh", "bid,bjd->bij",
     "bhjd,bijh->bhid"],
)  # fmt: skip
@pytest.mark.parametrize("batch", [1, 2])
def test_the_letters_are_those_of_the_einsum(equation: str, batch: int) -> None:
    x, y = operands(equation, {**SIZES, "b": batch})
    gm = lowered(Product(equation), x, y)
    result = result_of(gm)
    einsum = read_lowered_einsum(result)
    assert einsum is not None
    left, right, out = einsum.letters
    # The lowering may swap the operands.
    given = {"mul": x * 2.0, "mul_1": y * 3.0}
    again = torch.einsum(
        f"{left},{right}->{out}", given[einsum.left.name], given[einsum.right.name]
    )
    torch.testing.assert_close(again, torch.einsum(equation, x * 2.0, y * 3.0))
    assert {str(node.target) for node in einsum.nodes} >= {"aten.bmm.default"}
    nodes = nodes_to_lowered_einsum(einsum.left, live_nodes(gm.graph))
    assert nodes[-1] is result
    assert set(einsum.nodes) <= set(nodes)


def test_a_product_of_matrices_between_other_views_is_none() -> None:
    class Matmul(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return (x * 2.0) @ (y * 3.0).transpose(-1, -2) + 1.0

    result = result_of(lowered(Matmul(), *operands("bhid,bhjd")))
    assert read_lowered_einsum(result) is None


def test_an_operand_that_is_read_twice_leads_nowhere() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            x, y = x * 2.0, y * 3.0
            return torch.einsum("bhid,bhjd->bhij", x, y) + 1.0 - x.sum()

    gm = lowered(Twice(), *operands("bhid,bhjd"))
    einsum = read_lowered_einsum(result_of(gm))
    assert einsum is not None
    assert nodes_to_lowered_einsum(einsum.left, live_nodes(gm.graph)) == []


def test_a_view_that_splits_a_dimension_of_the_operand_is_not_looked_behind() -> None:
    class Split(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            x = (x * 2.0).flatten(1, 2).unflatten(1, (5, 3))  # not the dimensions of before
            return torch.einsum("bihd,bjhd->bhij", x, y * 3.0) + 1.0

    x, y = operands("bhid,bjhd")
    einsum = read_lowered_einsum(result_of(lowered(Split(), x, y)))
    assert einsum is not None
    assert einsum.left.meta["val"].shape == (2, 5, 3, 4)
