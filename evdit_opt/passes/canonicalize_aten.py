"""Graphs that were exported before: the attention operator instead of the function."""

from collections.abc import Iterator

import torch
from torch import fx

from evdit_opt.passes.graph import SDPA
from evdit_opt.passes.stand_in import Draft, StandIn, stand_in

__all__ = ["canonicalize_aten"]


def canonicalize_aten(graph: fx.Graph) -> Iterator[StandIn]:
    """Write the ATen operator as the function, which takes the same arguments.

    before:  out = aten.scaled_dot_product_attention.default(q, k, v)
    after:   out = scaled_dot_product_attention(q, k, v)
    """
    target = torch.ops.aten.scaled_dot_product_attention.default
    for call in graph.find_nodes(op="call_function", target=target):
        draft = Draft(call)
        attention = draft.add(SDPA, *call.args, **call.kwargs)
        yield stand_in(attention, draft.made, [call])
