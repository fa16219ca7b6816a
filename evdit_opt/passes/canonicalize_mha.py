"""Open ``F.multi_head_attention_forward``, which Dynamo keeps as one call."""

import inspect
import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from evdit_opt.passes.attention_letters import NotSDPA
from evdit_opt.passes.graph import LEFT_ALONE, SDPA, first_results, live_nodes, value_of
from evdit_opt.passes.stand_in import Draft, StandIn, stand_in

__all__ = ["canonicalize_mha"]

MHA = F.multi_head_attention_forward
SIGNATURE = inspect.signature(MHA)


def canonicalize_mha(graph: fx.Graph) -> Iterator[StandIn]:
    """Write ``nn.MultiheadAttention`` as projections, SDPA and a projection.

    before:  out = multi_head_attention_forward(x, x, x, ..., in_proj_weight, ...)[0]
    after:   q, k, v = (linear(x, w, b) for w, b in thirds of in_proj_weight, in_proj_bias)
             out = scaled_dot_product_attention(q, k, v)     # [batch, heads, seq, head_dim]
             out = linear(out, out_proj_weight, out_proj_bias)

    Inputs are ``[seq, batch, channels]``; the module has transposed them if it is batch_first.

    Args:
        graph: edited in place. A call whose weights are read, that drops, or that adds keys of its
            own, stays, with the reason in its metadata.
    """
    calls = graph.find_nodes(op="call_function", target=MHA)
    live = live_nodes(graph) if calls else set()
    for call in calls:
        results = first_results(call, live)
        try:
            if results is None:
                raise NotSDPA("its attention weights are used elsewhere")
            for result in results:
                yield _open(call, result)
        except NotSDPA as reason:
            call.meta[LEFT_ALONE] = str(reason)


def _open(call: fx.Node, result: fx.Node) -> StandIn:
    bound = SIGNATURE.bind(*call.args, **call.kwargs)
    bound.apply_defaults()
    given = bound.arguments
    _require_plain(given)
    heads, query = int(given["num_heads"]), given["query"]
    draft = Draft(result)
    inputs = [
        _project(draft, given, number, name, heads)
        for number, name in enumerate(("query", "key", "value"))
    ]
    mask = _mask(draft, given, heads, value_of(query).dtype)
    attention = draft.add(SDPA, *inputs, attn_mask=mask)
    rows = draft.add(torch.permute, attention, (2, 0, 1, 3))
    joined = draft.add(torch.flatten, rows, 2)
    draft.add(F.linear, joined, given["out_proj_weight"], given["out_proj_bias"])
    dead = [user for user in call.users if user is not result]
    return stand_in(attention, draft.made, [call, *dead, result])


def _require_plain(given: dict[str, Any]) -> None:
    if value_of(given["query"]).ndim != 3:
        raise NotSDPA("its inputs have no batch dimension")
    if given["training"] and given["dropout_p"]:
        raise NotSDPA(f"attention with dropout {given['dropout_p']}")
    extra = ("bias_k", "bias_v", "static_k", "static_v")
    if given["add_zero_attn"] or any(given[name] is not None for name in extra):
        raise NotSDPA("it adds keys of its own to those of its input")
    if given["key_padding_mask"] is not None and given["attn_mask"] is not None:
        raise NotSDPA("it has a mask for padding and another one")


def _project(draft: Draft, given: dict[str, Any], number: int, name: str, heads: int) -> fx.Node:
    """``[batch, heads, seq, head_dim]`` of one of the three inputs."""
    size = int(given["embed_dim_to_check"])
    bias = given["in_proj_bias"]
    if given["use_separate_proj_weight"]:
        weight = given[f"{name[0]}_proj_weight"]
    else:
        weight = draft.add(torch.narrow, given["in_proj_weight"], 0, number * size, size)
    if bias is not None:
        bias = draft.add(torch.narrow, bias, 0, number * size, size)
    projected = draft.add(F.linear, given[name], weight, bias)
    split = draft.add(torch.unflatten, projected, 2, (heads, -1))
    return draft.add(torch.permute, split, (1, 2, 0, 3))


def _mask(draft: Draft, given: dict[str, Any], heads: int, dtype: torch.dtype) -> fx.Node | None:
    padding, mask = given["key_padding_mask"], given["attn_mask"]
    if padding is not None:
        mask = draft.add(operator.getitem, padding, (slice(None), None, None))
    elif mask is not None and value_of(mask).ndim == 3:
        mask = draft.add(torch.unflatten, mask, 0, (-1, heads))
    if mask is None:
        return None
    if value_of(mask).dtype == torch.bool:
        return draft.add(torch.logical_not, mask)  # True hides here, and shows there
    return mask if value_of(mask).dtype == dtype else draft.add(torch.Tensor.to, mask, dtype)
