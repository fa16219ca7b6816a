"""Which dimensions of two products are batch, queries, keys and channels of one attention."""

from dataclasses import dataclass

from torch import fx

__all__ = ["NotSDPA", "Operand", "Operands", "Product", "match_letters"]


class NotSDPA(Exception):
    """Why what looks like attention cannot be one SDPA call."""


@dataclass(frozen=True)
class Product:
    """A product with a letter per dimension, as in einsum: "bhid,bhjd->bhij".

    Attributes:
        left: first operand.
        right: second operand.
        letters: letters of left, right and the result.
        scale: a number the product is multiplied by.
        bias: what is added to it; None: nothing.
        nodes: what it consists of beside the node that was read.
    """

    left: fx.Node
    right: fx.Node
    letters: tuple[str, str, str]
    scale: float = 1.0
    bias: fx.Node | None = None
    nodes: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class Operand:
    """A tensor with a letter per dimension.

    Attributes:
        node: the tensor.
        letters: its dimensions.
        wanted: the same in the order batch, sequence, channels.
    """

    node: fx.Node
    letters: str
    wanted: str


@dataclass(frozen=True)
class Operands:
    """The inputs of an attention and its result.

    Attributes:
        q: queries.
        k: keys.
        v: values.
        out: the result.
        scores: letters of the scores.
    """

    q: Operand
    k: Operand
    v: Operand
    out: Operand
    scores: str


def match_letters(scores: Product, values: Product, weights: fx.Node, keys: int) -> Operands:
    """Match the product of queries and keys with that of weights and values.

    bhid,bhjd->bhij and bhij,bhjd->bihd:  q "bhid", k "bhjd", v "bhjd", out "bihd" for "bhid"

    Args:
        scores: the product whose softmax the weights are.
        values: the product that takes the weights.
        weights: its operand.
        keys: the dimension of the weights that softmax was taken over, negative.

    Raises:
        NotSDPA: if the two do not fit together as attention over one sequence.
    """
    left, right, product = scores.letters
    on_left = values.left is weights
    own, other, result = (values.letters[n] for n in ((0, 1, 2) if on_left else (1, 0, 2)))
    reshaped = len(own) != len(product)
    rows = (set(left) ^ set(right)) & set(product)
    channels = (set(left) & set(right)) - set(product)
    j = product[keys]
    if j not in rows or len(rows) != 2 or len(channels) != 1:
        raise NotSDPA("its softmax is taken over another dimension than the keys")
    (i,), (m,) = rows - {j}, channels
    batch = "".join(letter for letter in product if letter not in (i, j))
    if reshaped and (product != f"{batch}{i}{j}" or keys != -1):
        raise NotSDPA("its scores are transposed and reshaped")
    # The same dimensions in the second product's letters.
    if reshaped:
        own_batch, own_i, own_j = own[:-2], own[-2], own[-1]
    else:
        names = dict(zip(product, own, strict=True))
        own_batch, own_i, own_j = "".join(names[x] for x in batch), names[i], names[j]
    free = set(other) - set(own)
    summed = (set(own) & set(other)) - set(result)
    if summed != {own_j} or len(free) != 1 or own_i in other:
        raise NotSDPA("its softmax is taken over another dimension than the keys")
    (d,) = free
    if not 1 <= len(batch) <= 2 or not 1 <= len(own_batch) <= 2:
        raise NotSDPA(f"its scores have {len(product)} dimensions, expected 3 or 4")
    first, second = (scores.left, left), (scores.right, right)
    q, k = (first, second) if i in left else (second, first)
    return Operands(
        q=Operand(*q, f"{batch}{i}{m}"),
        k=Operand(*k, f"{batch}{j}{m}"),
        v=Operand(values.right if on_left else values.left, other, f"{own_batch}{own_j}{d}"),
        out=Operand(weights, result, f"{own_batch}{own_i}{d}"),
        scores=product,
    )
