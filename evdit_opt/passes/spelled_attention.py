"""Read attention that is spelled out: product, scale, mask, softmax, product."""

from collections.abc import Iterable, Set
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx

from evdit_opt.passes.attention_letters import NotSDPA, Operands, Product, match_letters
from evdit_opt.passes.graph import operation, same_size, value_of, written_inputs
from evdit_opt.passes.lowered_einsum import nodes_to_lowered_einsum
from evdit_opt.passes.mask_structure import mutated_storages, storage_of
from evdit_opt.passes.products import read_product
from evdit_opt.passes.safe_softmax import zeroed_rows
from evdit_opt.passes.trace_origin import is_parameter

__all__ = ["Mask", "Spelled", "read_spelled"]

HIDES = -1e4
"""A score this low has no weight in any dtype, so filling with it hides a key."""

CASTS = frozenset(
    "bfloat16 clone contiguous detach double float half to _to_copy type type_as".split()
)
RESHAPES = frozenset("expand flatten reshape unflatten view _unsafe_view".split())
SPELLINGS = {"iadd": "add", "imul": "mul", "isub": "sub", "itruediv": "div", "truediv": "div"}


@dataclass(frozen=True)
class Mask:
    """One mask.

    Attributes:
        node: the mask.
        kind: "add": it is added; "hide", "show": the score is replaced where it is True, or False.
        number: what an additive mask is multiplied by, or what the score is replaced by.
        ndim: dimensions of the scores it is applied to.
    """

    node: fx.Node
    kind: Literal["add", "hide", "show"]
    number: float
    ndim: int


@dataclass
class Spelled:
    """An attention, read from its softmax.

    Attributes:
        operands: queries, keys, values and the result.
        scale: number the scores are multiplied by.
        masks: what is done to scores by masks, in any order.
        shapes: shapes of the scores and weights on the way.
        nodes: all its nodes, in graph order, and what nothing depends on; the last is the result.
    """

    operands: Operands
    scale: float
    masks: list[Mask]
    shapes: list[torch.Size]
    nodes: list[fx.Node]


def read_spelled(softmax: fx.Node, live: Set[fx.Node]) -> Spelled | None:
    """The attention around a softmax; None if it is a softmax of something else.

    Args:
        softmax: the node, or the division that ends a softmax in several steps.
        live: ``live_nodes`` of its graph.

    Raises:
        NotSDPA: if it is attention, but not such that one SDPA call can take its place.
    """
    read = _softmax(softmax)
    if read is None:
        return None
    start, dim, inner = read
    walk = _Walk()
    if not walk.back(start, 1.0):
        return None
    assert walk.product is not None
    keys = dim if dim < 0 else dim - value_of(start).ndim
    values, weights, after = _forward(softmax, walk, live)
    operands = match_letters(walk.product, values, weights, keys)
    nodes = {*walk.nodes, *inner, softmax, *after}
    order = [node for node in softmax.graph.nodes if node in nodes]
    if any(user not in nodes and user in live for node in order[:-1] for user in node.users):
        raise NotSDPA("its scores or attention weights are used elsewhere")
    inputs = [x.node for x in (operands.q, operands.k, operands.v)]
    for x in (*inputs, *(mask.node for mask in walk.masks)):
        _require_unwritten(x, order)
    *before, result = order
    dead = _dead_ends(before, live)
    return Spelled(operands, walk.scale, walk.masks, walk.shapes, [*before, *dead, result])


def spelling(node: fx.Node) -> str:
    """The operation, whether it is done in place or not."""
    name = operation(node)
    return SPELLINGS.get(name, name.removesuffix("_") if written_inputs(node) else name)


def _softmax(node: fx.Node) -> tuple[fx.Node, int, list[fx.Node]] | None:
    """What a softmax is taken of, along which dimension, and the nodes it consists of."""
    name = operation(node)
    if name in ("softmax", "_softmax", "_safe_softmax", "special_softmax"):
        source = node.args[0] if node.args else node.kwargs.get("input")
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        if isinstance(source, fx.Node) and isinstance(dim, int):
            return source, dim, []
    if name in ("div", "truediv") and len(node.args) == 2:
        powers, total = node.args
        if not (isinstance(powers, fx.Node) and isinstance(total, fx.Node)):
            return None
        if operation(powers) == "exp" and operation(total) == "sum" and total.args[0] is powers:
            dim = _only_dim(total)
            source = powers.args[0]
            if dim is not None and isinstance(source, fx.Node):
                return source, dim, [powers, total]
    return None


def _only_dim(node: fx.Node) -> int | None:
    """The dimension a reduction reduces, if it is one and stays."""
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    keep = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    if isinstance(dim, (list, tuple)) and len(dim) == 1:
        (dim,) = dim
    return dim if isinstance(dim, int) and keep is True else None


@dataclass
class _Walk:
    """From a softmax back to the product of queries and keys."""

    product: Product | None = None
    scale: float = 1.0
    masks: list[Mask] = field(default_factory=list)
    shapes: list[torch.Size] = field(default_factory=list)
    nodes: list[fx.Node] = field(default_factory=list)

    def back(self, node: Any, scale: float) -> bool:
        """Follow the scores from ``node``, which is multiplied by ``scale`` further on."""
        if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
            return False
        product = read_product(node)
        if product is not None:
            if is_parameter(product.left) or is_parameter(product.right):
                return False
            if product.bias is not None:
                self.masks.append(Mask(product.bias, "add", scale, value_of(node).ndim))
            self.product, self.scale = product, scale * product.scale
            self.nodes += product.nodes
        elif not self._through(node, scale):
            return False
        self.nodes.append(node)
        self.shapes.append(value_of(node).shape)
        return True

    def _through(self, node: fx.Node, scale: float) -> bool:
        name, args = spelling(node), node.args
        if name in CASTS or (name in RESHAPES and _keeps_scores(node)):
            return self.back(args[0], scale)
        if name in ("mul", "div") and len(args) == 2:
            return self._times(name, args[0], args[1], scale)
        if name == "masked_fill" and len(args) == 3:
            return self._hide(args[0], args[1], "hide", args[2], scale)
        if name == "where" and len(args) == 3:
            if isinstance(args[2], (int, float)):
                return self._hide(args[1], args[0], "show", args[2], scale)
            return self._hide(args[2], args[0], "hide", args[1], scale)
        if name in ("add", "sub") and len(args) == 2 and not node.kwargs:
            return self._add(args[0], args[1], scale, -1.0 if name == "sub" else 1.0)
        return False

    def _times(self, name: str, first: Any, second: Any, scale: float) -> bool:
        if isinstance(second, (int, float)):
            factor = second if name == "mul" else 1 / second
            return self.back(first, scale * factor)
        if isinstance(first, (int, float)) and name == "mul":
            return self.back(second, scale * first)
        if self.back(first, scale) or (name == "mul" and self.back(second, scale)):
            raise NotSDPA("its scores are multiplied by a tensor; scale the queries instead")
        return False

    def _hide(
        self, scores: Any, mask: Any, kind: Literal["hide", "show"], value: Any, scale: float
    ) -> bool:
        if not isinstance(value, (int, float)) or not isinstance(mask, fx.Node):
            return False
        if not self.back(scores, scale):
            return False
        if value * scale > HIDES:
            raise NotSDPA(f"scores of hidden keys are set to {value}, which does not hide them")
        self.masks.append(Mask(mask, kind, value * scale, value_of(scores).ndim))
        return True

    def _add(self, scores: Any, mask: Any, scale: float, sign: float) -> bool:
        if isinstance(mask, fx.Node) and _is_maximum_of(mask, scores):
            self.nodes.append(mask)  # softmax does not change
            return self.back(scores, scale)
        if isinstance(mask, fx.Node) and self.back(scores, scale):
            self.masks.append(Mask(mask, "add", sign * scale, value_of(scores).ndim))
            return True
        if sign > 0 and isinstance(scores, fx.Node) and self.back(mask, scale):
            self.masks.append(Mask(scores, "add", scale, value_of(mask).ndim))
            return True
        return False


def _is_maximum_of(node: fx.Node, scores: Any) -> bool:
    if operation(node) == "getitem":  # max(dim) returns values and indices
        node = node.all_input_nodes[0]
    named = operation(node) in ("amax", "max")
    return named and node.args[0] is scores and _only_dim(node) is not None


def _keeps_scores(node: fx.Node) -> bool:
    """True if a reshape only splits or merges dimensions before the last two."""
    before, after = value_of(node.all_input_nodes[0]).shape, value_of(node).shape
    if min(len(before), len(after)) < 3:
        return False
    if operation(node) == "expand":  # AOT writes it before every product
        return len(before) == len(after) and all(map(same_size, before, after))
    return all(same_size(a, b) for a, b in zip(before[-2:], after[-2:], strict=True))


def _forward(
    softmax: fx.Node, walk: _Walk, live: Set[fx.Node]
) -> tuple[Product, fx.Node, list[fx.Node]]:
    """From a softmax on to the product with the values."""
    seen = zeroed_rows(softmax, live)
    node = seen[-1] if seen else softmax
    while True:
        users = [user for user in node.users if user in live]
        if len(users) != 1:
            raise NotSDPA("its attention weights are used elsewhere")
        (user,) = users
        einsum = nodes_to_lowered_einsum(node, live)
        if einsum:
            product = read_product(einsum[-1])
            assert product is not None
            return product, node, [*seen, *einsum]
        product = read_product(user)
        if product is not None and (product.left is node) != (product.right is node):
            if product.bias is not None or product.scale != 1.0:
                raise NotSDPA("something is added to its result by the same operation")
            return product, node, [*seen, user]
        if not _keeps_weights(user, node, walk):
            raise NotSDPA("its attention weights are used elsewhere")
        seen.append(user)
        walk.shapes.append(value_of(user).shape)
        node = user


def _keeps_weights(node: fx.Node, weights: fx.Node, walk: _Walk) -> bool:
    name, args = spelling(node), node.args
    if not args or args[0] is not weights:
        return False
    if name in ("dropout", "feature_dropout"):
        rate = args[1] if len(args) > 1 else node.kwargs.get("p", 0.5)
        active = args[2] if len(args) > 2 else node.kwargs.get("training", True)
        if rate and active:
            raise NotSDPA(f"attention with dropout {rate}")
        return True
    if name == "masked_fill":  # rows without any key would be NaN otherwise
        return bool(args[2] == 0) and any(args[1] is mask.node for mask in walk.masks)
    return name in CASTS or name == "nan_to_num" or (name in RESHAPES and _keeps_scores(node))


def _dead_ends(nodes: Iterable[fx.Node], live: Set[fx.Node]) -> list[fx.Node]:
    """What depends on ``nodes`` and nothing depends on: averages of weights nobody asked for."""
    todo, found = list(nodes), list[fx.Node]()
    while todo:
        new = [user for user in todo.pop().users if user not in live and user not in found]
        found += new
        todo += new
    return found


def _require_unwritten(x: fx.Node, nodes: list[fx.Node]) -> None:
    """What is read now must still be at the end what it was when it was read."""
    graph = list(x.graph.nodes)
    readers = [graph.index(node) for node in nodes if x in node.all_input_nodes]
    read = min(readers, default=graph.index(x) + 1)  # a lowered einsum reads a view of it
    until_end = graph[read : graph.index(nodes[-1])]
    if storage_of(x) in mutated_storages(node for node in until_end if node not in nodes):
        raise NotSDPA("an in-place operation changes q, k, v or a mask while it is computed")
