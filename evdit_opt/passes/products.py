"""Matrix products of two activations in one notation, however they are written."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from evdit_opt.passes.attention_letters import Product
from evdit_opt.passes.graph import operation, same_size, value_of
from evdit_opt.passes.lowered_einsum import read_lowered_einsum
from evdit_opt.passes.stand_in import Draft

__all__ = ["arrange", "read_product"]

BATCH = "abcdefg"


def read_product(node: fx.Node) -> Product | None:
    """``node`` as a product of two tensors of at least three dimensions; None if it is none.

    Batch dimensions that are broadcast, and letters that occur once only, are not understood.
    """
    name = operation(node)
    if name in ("matmul", "bmm"):
        return _matmul(node.args, 1.0, None)
    if name == "baddbmm":
        beta, alpha = (node.kwargs.get(key, 1) for key in ("beta", "alpha"))
        bias = node.args[0] if beta else None
        if beta not in (0, 1) or not isinstance(alpha, (int, float)):
            return None
        return _matmul(node.args[1:], float(alpha), bias)
    if name == "einsum" and isinstance(node.args[0], str):
        operands: Sequence[Any] = node.args[1:]
        if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
            operands = operands[0]
        return _einsum(node.args[0], operands)
    return read_lowered_einsum(node)


def _matmul(operands: Sequence[Any], scale: float, bias: Any) -> Product | None:
    if len(operands) != 2 or not all(isinstance(x, fx.Node) for x in operands):
        return None
    left, right = (value_of(x).shape for x in operands)
    if len(left) != len(right) or len(left) < 3:
        return None
    if not all(same_size(a, b) for a, b in zip(left[:-2], right[:-2], strict=True)):
        return None
    batch = BATCH[: len(left) - 2]
    letters = (f"{batch}im", f"{batch}mj", f"{batch}ij")
    return Product(operands[0], operands[1], letters, scale, bias)


def _einsum(equation: str, operands: Sequence[Any]) -> Product | None:
    equation = equation.replace(" ", "")
    if len(operands) != 2 or "->" not in equation or "." in equation:
        return None
    inputs, result = equation.split("->")
    left, right = inputs.split(",")
    if any(len(set(letters)) != len(letters) for letters in (left, right, result)):
        return None  # a diagonal
    sizes = [
        dict(zip(letters, value_of(x).shape, strict=True))
        for letters, x in zip((left, right), operands, strict=True)
    ]
    shared = set(left) & set(right)
    if not all(same_size(sizes[0][letter], sizes[1][letter]) for letter in shared):
        return None
    if set(left) ^ set(right) != set(result) - shared:
        return None  # a letter that is summed over in one operand only
    return Product(operands[0], operands[1], (left, right, result))


def arrange(draft: Draft, node: fx.Node, letters: str, wanted: str) -> fx.Node:
    """``node`` with its dimensions in another order; what was transposed to it, if that has it.

    Args:
        draft: where nodes are added.
        node: a tensor.
        letters: its dimensions.
        wanted: the same letters in the order asked for.
    """
    if letters == wanted:
        return node
    dims = _transposed(node)
    if dims is not None:
        first, second = (dim % len(letters) for dim in dims)
        before = list(letters)
        before[first], before[second] = before[second], before[first]
        if "".join(before) == wanted:
            return node.all_input_nodes[0]
    order = tuple(letters.index(letter) for letter in wanted)
    return draft.add(torch.permute, node, order)


def _transposed(node: fx.Node) -> tuple[int, int] | None:
    """The two dimensions that ``node`` swaps, if it does nothing else."""
    if operation(node) == "getattr" and node.args[1:] == ("mT",):
        return -2, -1
    if operation(node) in ("transpose", "swapaxes", "swapdims") and len(node.args) == 3:
        first, second = node.args[1:]
        if isinstance(first, int) and isinstance(second, int):
            return first, second
    return None
