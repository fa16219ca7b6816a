"""What PyTorch adds to a softmax, when it lowers attention, so that rows without keys are zero."""

from collections.abc import Set
from typing import Any

from torch import fx

from evdit_opt.passes.graph import operation

__all__ = ["zeroed_rows"]


def zeroed_rows(softmax: fx.Node, live: Set[fx.Node]) -> list[fx.Node]:
    """The nodes that set rows without keys to zero, the result last; empty if there are none.

    hidden = logical_not(any(logical_not(scores == -inf), -1, True))
    weights = where(hidden, full_like(softmax(scores, -1), 0), softmax(scores, -1))

    Args:
        softmax: the softmax.
        live: ``live_nodes`` of its graph.
    """
    choice = next((x for x in softmax.users if x in live and operation(x) == "where"), None)
    if choice is None or len(choice.args) != 3:
        return []
    hidden, zeros, kept = choice.args
    tests: list[Any] = [hidden]
    for name in ("logical_not", "any", "logical_not", "eq"):
        if not isinstance(tests[-1], fx.Node) or operation(tests[-1]) != name:
            return []
        tests.append(tests[-1].args[0])
    scores, dim = softmax.args[:2]
    nodes = tests[:4]
    shown, infinite = nodes[1], nodes[3]
    if (kept, tests[4]) != (softmax, scores) or infinite.args[1] != float("-inf"):
        return []
    if shown.args[1:] != (dim, True) or not isinstance(zeros, fx.Node):
        return []
    if operation(zeros) != "full_like" or zeros.args[:2] != (softmax, 0):
        return []
    return [*reversed(nodes), zeros, choice]
