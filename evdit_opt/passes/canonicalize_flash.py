"""The operator of diffusers' dispatcher, which its flash-attention 3 backend leaves in a graph."""

from collections.abc import Iterator

import torch
from torch import fx

from evdit_opt.passes.attention_letters import NotSDPA
from evdit_opt.passes.graph import LEFT_ALONE, SDPA, first_results, live_nodes, value_of
from evdit_opt.passes.stand_in import Draft, StandIn, stand_in

__all__ = ["canonicalize_flash"]

NAME = "_diffusers_flash_attn_3::_flash_attn_forward"
"""By name: importing diffusers takes seconds, and a graph without it needs none of it."""

TAKEN = ("q", "k", "v", "softmax_scale", "causal")
NO_MATTER = ("num_splits", "pack_gqa", "deterministic", "sm_margin")
"""How the kernel works, not what it computes."""


def canonicalize_flash(graph: fx.Graph) -> Iterator[StandIn]:
    """Write ``set_attention_backend("_flash_3")`` as the function.

    before:  out = _diffusers_flash_attn_3._flash_attn_forward(q, k, v, scale)[0]
                                                         # [batch, seq, heads, head_dim]
    after:   q, k, v = (transpose(x, 1, 2) for x in (q, k, v))
             out = transpose(scaled_dot_product_attention(q, k, v, scale=scale), 1, 2)

    Args:
        graph: edited in place. A call whose logsumexp is read, or that has another argument which
            changes what it computes, stays, with the reason in its metadata.
    """
    calls = [node for node in graph.nodes if _is_call(node)]
    live = live_nodes(graph) if calls else set()
    for call in calls:
        results = first_results(call, live)
        try:
            if results is None:
                raise NotSDPA("its logsumexp is used elsewhere")
            for result in results:
                yield _write(call, result)
        except NotSDPA as reason:
            call.meta[LEFT_ALONE] = str(reason)


def _is_call(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and schema.name == NAME


def _write(call: fx.Node, result: fx.Node) -> StandIn:
    schema = call.target._schema  # type: ignore[union-attr]
    usual = {argument.name: argument.default_value for argument in schema.arguments}
    given = {**usual, **dict(zip(usual, call.args, strict=False)), **call.kwargs}
    for name in usual:
        if name not in (*TAKEN, *NO_MATTER) and given[name] != usual[name]:
            raise NotSDPA(f"flash attention with {name} {given[name]}")
    draft = Draft(result)
    q, k, v = (draft.add(torch.transpose, given[name], 1, 2) for name in TAKEN[:3])
    attention = draft.add(
        SDPA,
        *(q, k, v),
        is_causal=given["causal"],
        scale=given["softmax_scale"],
        enable_gqa=value_of(q).shape[1] != value_of(k).shape[1],
    )
    draft.add(torch.transpose, attention, 1, 2)
    dead = [user for user in call.users if user is not result]
    return stand_in(attention, draft.made, [call, *dead, result])
