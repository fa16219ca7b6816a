"""Whether two nodes compute the same thing, written out twice."""

from typing import Any

from torch import fx
from torch.utils._pytree import tree_flatten

from evdit_opt.passes.graph import operation
from evdit_opt.passes.mask_structure import mutated_storages, storage_of

__all__ = ["same_value"]

RANDOM = frozenset(
    "alpha_dropout bernoulli dropout feature_dropout native_dropout normal rand rand_like randn "
    "randn_like".split()
)


def same_value(first: fx.Node, second: fx.Node) -> bool:
    """True if two nodes are provably equal: the same calls on the same inputs, and nothing random.

    q = linear(x.transpose(0, 1), wq);  k = linear(x.transpose(0, 1), wk)      # two transposes

    Inputs that are changed in place between the first call and the last are not the same.
    """
    if first is second:
        return True
    calls: list[fx.Node] = []
    shared: list[fx.Node] = []
    if not _alike(first, second, calls, shared, set()):
        return False
    start, end = min(calls), max(calls)
    mutated = mutated_storages(node for node in first.graph.nodes if start < node < end)
    return not any(storage_of(node) in mutated for node in (*calls, *shared))


def _alike(
    a: Any, b: Any, calls: list[fx.Node], shared: list[fx.Node], seen: set[tuple[fx.Node, fx.Node]]
) -> bool:
    """Compare two arguments; collects the calls on the way, and the inputs that both start from."""
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)):
        return type(a) is type(b) and bool(a == b)
    if a is b:
        shared.append(a)
    if a is b or (a, b) in seen:
        return True
    seen.add((a, b))
    if a.op not in ("call_function", "call_method") or operation(a) in RANDOM:
        return False
    if (a.op, a.target) != (b.op, b.target):
        return False
    calls += [a, b]
    (left, how), (right, other) = (tree_flatten((x.args, x.kwargs)) for x in (a, b))
    alike = (_alike(x, y, calls, shared, seen) for x, y in zip(left, right, strict=False))
    return how == other and all(alike)
