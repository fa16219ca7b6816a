"""Graphs that were lowered before: the operators that attention becomes instead of the function."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from evdit_opt.passes.attention_letters import NotSDPA
from evdit_opt.passes.graph import LEFT_ALONE, SDPA, first_results, live_nodes
from evdit_opt.passes.stand_in import Draft, StandIn, stand_in

__all__ = ["canonicalize_aten"]

aten = torch.ops.aten
WHOLE = aten.scaled_dot_product_attention.default
PARTS = (
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_fused_attention_overrideable.default,
    aten._scaled_dot_product_attention_math.default,
)
"""What WHOLE becomes on a device; they return (out, logsumexp, ...)."""


def canonicalize_aten(graph: fx.Graph) -> Iterator[StandIn]:
    """Write the operators of ``torch.export`` and AOT as the function.

    before:  out = aten.scaled_dot_product_attention.default(q, k, v)
        or:  out = aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v)[0]
    after:   out = scaled_dot_product_attention(q, k, v)

    Where more than the output is read (a backward needs the logsumexp), the operator stays, with
    the reason in its metadata.

    Args:
        graph: edited in place.
    """
    for call in graph.find_nodes(op="call_function", target=WHOLE):
        yield _write(call, [call])
    calls = [call for part in PARTS for call in graph.find_nodes(op="call_function", target=part)]
    live = live_nodes(graph) if calls else set()
    for call in calls:
        try:
            results = first_results(call, live)
            if results is None:
                raise NotSDPA("its logsumexp is used elsewhere")
            for result in results:
                dead = [user for user in call.users if user is not result]
                yield _write(call, [call, *dead, result])
        except NotSDPA as reason:
            call.meta[LEFT_ALONE] = str(reason)


def _write(call: fx.Node, nodes: list[fx.Node]) -> StandIn:
    given = _arguments(call)
    draft = Draft(nodes[-1])
    attention = draft.add(
        SDPA,
        *(given[name] for name in ("query", "key", "value")),
        attn_mask=given.get("attn_mask", given.get("attn_bias")),
        dropout_p=given.get("dropout_p", 0.0),
        is_causal=given.get("is_causal", False),
        scale=given.get("scale"),
        enable_gqa=given.get("enable_gqa", False),
    )
    return stand_in(attention, draft.made, nodes)


def _arguments(call: fx.Node) -> dict[str, Any]:
    """All arguments of an operator by name."""
    assert isinstance(call.target, torch._ops.OpOverload)
    names = [argument.name for argument in call.target._schema.arguments]
    return {**dict(zip(names, call.args, strict=False)), **call.kwargs}
