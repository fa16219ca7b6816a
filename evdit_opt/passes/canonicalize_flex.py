"""``flex_attention`` that neither changes scores nor hides keys, which is plain attention."""

from collections.abc import Iterator
from typing import Any

from torch import fx

from evdit_opt.passes.graph import SDPA, first_results, live_nodes, operation, value_of
from evdit_opt.passes.stand_in import Draft, StandIn, stand_in

__all__ = ["canonicalize_flex"]

SCORE, MASK, SCALE = 3, 4, 5
"""Positions in the call: a subgraph; a block mask; a number."""

ONE_BLOCK = 1 << 30
"""Side of the only block of a mask that is none."""


def canonicalize_flex(graph: fx.Graph) -> Iterator[StandIn]:
    """Write the operator behind ``flex_attention`` as the function.

    before:  out = flex_attention(q, k, v, score_mod, (..., mask_mod), scale, ...)[0]
                 score_mod(score, ...) = score;  mask_mod(...) = new_ones(()), in one block
    after:   out = scaled_dot_product_attention(q, k, v, scale=scale)

    This is also what ``set_attention_backend("flex")`` makes of attention without a mask.

    Args:
        graph: edited in place. Calls that do change scores or hide keys stay.
    """
    found = [node for node in graph.nodes if operation(node) == "flex_attention"]
    live = live_nodes(graph) if found else set()
    for call in found:
        results = first_results(call, live)
        if results is not None and _keeps_scores(call) and _keeps_keys(call):
            for result in results:
                yield _write(call, result)


def _keeps_scores(call: fx.Node) -> bool:
    body = _body(call, call.args[SCORE])
    return body is not None and _returned(body) is body.find_nodes(op="placeholder")[0]


def _keeps_keys(call: fx.Node) -> bool:
    """True if the block mask is the one that PyTorch makes where it was given none.

    A ``mask_mod`` that shows everything does not suffice: a mask made by ``from_kv_blocks`` has
    one too, and leaves out blocks.
    """
    parts: Any = call.args[MASK]
    body = _body(call, parts[-1]) if isinstance(parts, tuple) else None
    if body is None or parts[:2] != (1, 1) or parts[-3:-1] != (ONE_BLOCK, ONE_BLOCK):
        return False
    kept = _returned(body)
    return isinstance(kept, fx.Node) and operation(kept) in ("new_ones", "ones")


def _body(call: fx.Node, function: Any) -> fx.Graph | None:
    root = call.graph.owning_module
    body = getattr(root, str(getattr(function, "target", "")), None)
    return body.graph if isinstance(body, fx.GraphModule) else None


def _returned(body: fx.Graph) -> Any:
    return body.output_node().args[0]


def _write(call: fx.Node, result: fx.Node) -> StandIn:
    q, k, v = call.args[:3]
    draft = Draft(result)
    shared = value_of(q).shape[1] != value_of(k).shape[1]
    attention = draft.add(SDPA, q, k, v, scale=call.args[SCALE], enable_gqa=shared)
    dead = [user for user in call.users if user is not result]
    return stand_in(attention, draft.made, [call, *dead, result])
