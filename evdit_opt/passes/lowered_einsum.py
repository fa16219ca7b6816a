"""Read the ``einsum`` that was lowered to one product of matrices between views.

    scores = einsum("bhid,bhjd->bhij", q, k)        became, in core ATen and behind AOT:

    left   = view(permute(permute(unsqueeze(q, 4))))     # [b h, i, d]
    right  = view(permute(permute(unsqueeze(k, 4))))     # [b h, d, j]
    scores = view(permute(view(bmm(left, right))))       # [b, h, i, j]

Every dimension of the operands is followed by a letter of its own, through dimensions that are
added, merged and split again.
"""

from collections.abc import Set
from dataclasses import dataclass

from torch import fx

from evdit_opt.passes.attention_letters import Product
from evdit_opt.passes.graph import operation, same_size, value_of

__all__ = ["nodes_to_lowered_einsum", "read_lowered_einsum"]

RESHAPES = frozenset("flatten reshape unflatten view _unsafe_view".split())
COPIES = frozenset("clone contiguous expand".split())
VIEWS = RESHAPES | COPIES | frozenset("permute squeeze transpose unsqueeze".split())
NAMES = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class _Side:
    """One operand of the product of matrices, as views of ``source``.

    Attributes:
        source: the tensor all of whose dimensions can be followed.
        letters: a letter for each of them.
        dims: the letters in each of the three dimensions of the operand.
        is_einsum: whether a dimension is added, as einsum's lowering does to both.
    """

    source: fx.Node
    letters: str
    dims: list[str]
    is_einsum: bool

    @property
    def lost(self) -> str:
        """Letters of size 1 that are in none of the three: einsum leaves out a batch of 1."""
        return "".join(letter for letter in self.letters if letter not in "".join(self.dims))


def read_lowered_einsum(result: fx.Node) -> Product | None:
    """The einsum whose result is ``result``, the last of its views; None if it is none."""
    after = _views_before(result)
    product = after[0].all_input_nodes[0] if after else result
    if not after or operation(product) != "bmm":
        return None
    sizes: dict[str, int] = {}
    left = _side(product.args[0], NAMES, sizes)
    right = left and _side(product.args[1], NAMES[len(left.letters) :], sizes)
    if not left or not right or not (left.is_einsum and right.is_einsum):
        return None
    # Letters that meet in the product are the same: the batch, and what is summed over.
    pairs = [(left.dims[0], right.dims[0]), (left.dims[2], right.dims[1]), (left.lost, right.lost)]
    if any(len(one) != len(other) for one, other in pairs):
        return None
    same = {b: a for pair in pairs for a, b in zip(*pair, strict=True)}
    if not all(same_size(sizes[a], sizes[b]) for b, a in same.items()):
        return None
    dims: list[str] | None = [left.dims[0], left.dims[1], right.dims[2]]
    for node in after:
        dims = dims and _follow(dims, node, sizes)
    if not dims or dims.count("") != len(left.lost):
        return None
    lost = iter(left.lost)
    dims = [dim or next(lost) for dim in dims]
    if any(len(dim) != 1 for dim in dims):
        return None
    renamed = "".join(same.get(letter, letter) for letter in right.letters)
    letters = (left.letters, renamed, "".join(dims))
    return Product(left.source, right.source, letters, nodes=(product, *after[:-1]))


def nodes_to_lowered_einsum(operand: fx.Node, live: Set[fx.Node]) -> list[fx.Node]:
    """From a tensor that only an einsum reads to its result, both left out and included; or none.

    Args:
        operand: the tensor.
        live: ``live_nodes`` of its graph.
    """
    seen: list[fx.Node] = []
    end, node = 0, operand
    while True:
        users = [user for user in node.users if user in live]
        if len(users) != 1 or operation(users[0]) not in VIEWS | {"bmm"}:
            return seen[:end]
        (node,) = users
        seen.append(node)
        einsum = read_lowered_einsum(node)
        if einsum is not None and operand in (einsum.left, einsum.right):
            end = len(seen)  # and go on: the result may be permuted once more


def _views_before(node: fx.Node) -> list[fx.Node]:
    """The views that end in ``node``, itself included, in graph order."""
    found: list[fx.Node] = []
    while operation(node) in VIEWS:
        found.append(node)
        node = node.all_input_nodes[0]
    return found[::-1]


def _side(operand: object, names: str, sizes: dict[str, int]) -> _Side | None:
    """An operand of the product, from as far back as its dimensions can be followed."""
    if not isinstance(operand, fx.Node):
        return None
    views = _views_before(operand)
    for n, view in enumerate(views):
        source = view.all_input_nodes[0]
        shape = value_of(source).shape
        letters = names[: len(shape)]
        sizes |= zip(letters, shape, strict=True)
        dims: list[str] | None = list(letters)
        for node in views[n:]:
            dims = dims and _follow(dims, node, sizes)
        if dims:
            is_einsum = any(operation(node) == "unsqueeze" for node in views[n:])
            return _Side(source, letters, dims, is_einsum)
    return None


def _follow(dims: list[str], node: fx.Node, sizes: dict[str, int]) -> list[str] | None:
    """The letters in each dimension after a view; None if it splits one letter, or repeats."""
    name, args = operation(node), node.args
    if name == "unsqueeze" and isinstance(args[1], int):
        place = args[1] % (len(dims) + 1)
        return [*dims[:place], "", *dims[place:]]
    if name in ("permute", "transpose"):
        moved = value_of(node.all_input_nodes[0]).ndim
        order = list(range(moved))
        if name == "transpose":
            first, second = (dim % moved for dim in args[1:])  # type: ignore[operator]
            order[first], order[second] = second, first
        else:
            given = args[1] if isinstance(args[1], (list, tuple)) else args[1:]
            order = [dim % moved for dim in given]  # type: ignore[operator]
        return [dims[dim] for dim in order]
    before, after = value_of(node.all_input_nodes[0]).shape, value_of(node).shape
    if name in COPIES:
        alike = len(before) == len(after) and all(map(same_size, before, after))
        return dims if alike else None
    return _regroup("".join(dims), after, sizes)


def _regroup(letters: str, shape: tuple[int, ...], sizes: dict[str, int]) -> list[str] | None:
    """Letters in order, put into dimensions of the given sizes; those of size 1 may get lost."""
    rest = list(letters)
    dims: list[str] = []
    for size in shape:
        dim, so_far = "", 1
        if same_size(size, 1) and rest and same_size(sizes[rest[0]], 1):
            dim = rest.pop(0)
        while not same_size(so_far, size):
            if not rest:
                return None
            letter = rest.pop(0)
            if not same_size(sizes[letter], 1):
                dim, so_far = dim + letter, so_far * sizes[letter]
        dims.append(dim)
    return dims if all(same_size(sizes[letter], 1) for letter in rest) else None
