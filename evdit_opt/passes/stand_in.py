"""A canonical attention that stands in for what the model wrote, until it is clear who needs it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from evdit_opt.passes.graph import REPLACED, SDPA, SPELLED, insert_call

__all__ = ["Draft", "StandIn", "settle", "stand_in"]


class Draft:
    """Nodes added before one of a graph, in the module it was traced in.

    Attributes:
        made: the nodes so far.
    """

    def __init__(self, before: fx.Node) -> None:
        self.before = before
        self.made: list[fx.Node] = []

    def add(self, target: Any, *arguments: Any, **keywords: Any) -> fx.Node:
        """A further call."""
        with self.before.graph.inserting_before(self.before):
            node = insert_call(self.before.graph, target, arguments, self.before, **keywords)
        self.made.append(node)
        return node

    def discard(self) -> None:
        """Take everything out again."""
        for node in reversed(self.made):
            self.before.graph.erase_node(node)


@dataclass(frozen=True)
class StandIn:
    """One attention written in another way.

    Attributes:
        attention: the SDPA call that stands in.
        made: what was added to the graph for it, in graph order; the last one is the result.
        original: what the model wrote, in graph order; the last one is the result.
        users: what read the attention at first; whoever does later made use of it.
    """

    attention: fx.Node
    made: tuple[fx.Node, ...]
    original: tuple[fx.Node, ...]
    users: frozenset[fx.Node]


def stand_in(attention: fx.Node, made: Sequence[fx.Node], original: Sequence[fx.Node]) -> StandIn:
    """Let the last of ``made`` take the place of the last of ``original``, which stays for now."""
    original[-1].replace_all_uses_with(made[-1])
    for node in original:
        node.meta[REPLACED] = True
    if not any(node.target is SDPA and SPELLED not in node.meta for node in original):
        attention.meta[SPELLED] = True
    return StandIn(attention, tuple(made), tuple(original), frozenset(attention.users))


def settle(stand_ins: Sequence[StandIn]) -> None:
    """Put back what the model wrote wherever nobody replaced the stand-in, or made use of it.

    So an attention that stays dense keeps the model's own arithmetic, to the last bit.

    Args:
        stand_ins: in the order they were made; one may stand in for another.
    """
    for entry in reversed(stand_ins):
        attention = entry.attention
        taken = attention._erased or any(user not in entry.users for user in attention.users)
        if not taken:
            entry.made[-1].replace_all_uses_with(entry.original[-1])
            for node in entry.original:
                node.meta.pop(REPLACED, None)
        for node in reversed(entry.original if taken else entry.made):
            if not node._erased and not node.users:
                node.graph.erase_node(node)
