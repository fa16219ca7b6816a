"""Write attention that is spelled out as one scaled_dot_product_attention."""

from collections.abc import Iterator

import torch
from torch import fx

from evdit_opt.passes.attention_letters import NotSDPA
from evdit_opt.passes.graph import LEFT_ALONE, SDPA, live_nodes, operation, value_of
from evdit_opt.passes.products import arrange
from evdit_opt.passes.spelled_attention import CASTS, Mask, Spelled, read_spelled
from evdit_opt.passes.stand_in import Draft, StandIn, stand_in

__all__ = ["canonicalize_softmax"]


def canonicalize_softmax(graph: fx.Graph) -> Iterator[StandIn]:
    """Replace product, scale, mask, softmax, product by one call.

    before:  scores = einsum("bihd,bjhd->bhij", q, k) * scale       # or matmul, bmm, baddbmm
             weights = softmax(scores.masked_fill(hidden, -inf), -1)     # or + mask; or exp / sum
             out = einsum("bhij,bjhd->bihd", weights, v)
    after:   out = scaled_dot_product_attention(q', k', v', ~hidden, scale=scale)  # [b, h, seq, d]
             out = out.permute(0, 2, 1, 3)

    Casts in between, dropout that does nothing, and merged or split batch dimensions are seen
    through. What looks like attention but is not (weights that are used elsewhere, a softmax over
    another dimension than the keys, dropout that is active) is left alone, with the reason in
    the metadata of its softmax.

    Args:
        graph: edited in place.
    """
    live = live_nodes(graph)
    for node in list(graph.nodes):
        if node not in live:
            continue
        try:
            spelled = read_spelled(node, live)
            if spelled is not None:
                yield _write(spelled)
        except NotSDPA as reason:
            node.meta[LEFT_ALONE] = str(reason)


def _write(spelled: Spelled) -> StandIn:
    result = spelled.nodes[-1]
    draft = Draft(result)
    operands, heads = spelled.operands, _heads(spelled)
    q, k, v = _one_dtype(
        draft,
        [
            _four(draft, arrange(draft, x.node, x.letters, x.wanted), heads)
            for x in (operands.q, operands.k, operands.v)
        ],
    )
    mask = _mask(draft, spelled, heads, value_of(q).dtype)
    usual = value_of(q).shape[-1] ** -0.5
    scale = None if spelled.scale == usual else spelled.scale
    attention = draft.add(SDPA, q, k, v, attn_mask=mask, scale=scale)

    out = attention
    if len(operands.out.letters) == 3:
        out = draft.add(torch.flatten, out, 0, 1) if heads else draft.add(torch.squeeze, out, 1)
    out = arrange(draft, out, operands.out.wanted, operands.out.letters)
    expected = value_of(result)
    if value_of(out).dtype != expected.dtype:
        out = draft.add(torch.Tensor.to, out, expected.dtype)
    if expected.is_contiguous():
        draft.add(torch.Tensor.contiguous, out)  # what follows may rely on it
    return stand_in(attention, draft.made, spelled.nodes)


def _heads(spelled: Spelled) -> int:
    """The number of heads, where some part of the attention has a dimension of its own for them."""
    if all(len(x.letters) == 4 for x in (spelled.operands.q, spelled.operands.v)):
        return 0  # nothing to split
    for shape in spelled.shapes:
        if len(shape) == 4:
            if not isinstance(shape[1], int):
                raise NotSDPA(f"its number of heads, {shape[1]}, is not known")
            return shape[1]
    return 0


def _four(draft: Draft, node: fx.Node, heads: int) -> fx.Node:
    """``[batch, heads, seq, dim]`` of ``[batch * heads, seq, dim]``; heads is 1 if not known."""
    if value_of(node).ndim == 4:
        return node
    if heads:
        return draft.add(torch.unflatten, node, 0, (-1, heads))
    return draft.add(torch.unsqueeze, node, 1)


def _one_dtype(draft: Draft, inputs: list[fx.Node]) -> list[fx.Node]:
    """Undo upcasts where the inputs differ (SDPA sums in float32 anyway), else cast to the widest.

    q.float() @ k.float().T with v in bfloat16 becomes attention in bfloat16.
    """
    dtypes = {value_of(x).dtype for x in inputs}
    if len(dtypes) > 1:
        inputs = [_uncast(x) for x in inputs]
        dtypes = {value_of(x).dtype for x in inputs}
    widest = max(dtypes, key=lambda dtype: dtype.itemsize)
    return [
        x if value_of(x).dtype == widest else draft.add(torch.Tensor.to, x, widest) for x in inputs
    ]


def _uncast(node: fx.Node) -> fx.Node:
    source = node
    while operation(source) in CASTS:
        source = source.all_input_nodes[0]
    return source if value_of(source).dtype.is_floating_point else node


def _mask(draft: Draft, spelled: Spelled, heads: int, dtype: torch.dtype) -> fx.Node | None:
    """All masks as one: boolean if keys are hidden by -inf only, else additive."""
    shown: fx.Node | None = None
    added: fx.Node | None = None
    for mask in spelled.masks:
        node = _placed(draft, mask, spelled, heads)
        if mask.kind == "add":
            bias = node if mask.number == 1 else draft.add(torch.mul, node, mask.number)
        else:
            if mask.kind == "hide" and mask.number == float("-inf"):
                node = draft.add(torch.logical_not, node)
            if mask.number == float("-inf"):
                shown = node if shown is None else draft.add(torch.logical_and, shown, node)
                continue
            # Added, a finite number hides as well, but where a query may attend to nothing.
            zeros = draft.add(torch.zeros_like, node, dtype=dtype)
            hidden = node if mask.kind == "hide" else draft.add(torch.logical_not, node)
            bias = draft.add(torch.masked_fill, zeros, hidden, mask.number)
        added = bias if added is None else draft.add(torch.add, added, bias)
    if added is None:
        return shown
    if shown is not None:
        hidden = draft.add(torch.logical_not, shown)
        added = draft.add(torch.where, hidden, float("-inf"), added)
    return added if value_of(added).dtype == dtype else draft.add(torch.Tensor.to, added, dtype)


def _placed(draft: Draft, mask: Mask, spelled: Spelled, heads: int) -> fx.Node:
    """A mask with its dimensions where those of ``[batch, heads, queries, keys]`` are."""
    node = mask.node
    letters = spelled.operands.scores
    wanted = spelled.operands.q.wanted[:-1] + spelled.operands.k.wanted[-2]
    if value_of(node).ndim == 1:
        node = draft.add(torch.unsqueeze, node, 0)
    if value_of(node).ndim == 2 and letters == wanted:
        return node
    for _ in range(mask.ndim - value_of(node).ndim):
        node = draft.add(torch.unsqueeze, node, 0)
    if mask.ndim == len(letters):
        node = arrange(draft, node, letters, wanted)
    if mask.ndim == 4:
        return node
    rows = value_of(node).shape[0]
    return _four(draft, node, 0 if isinstance(rows, int) and rows == 1 else heads)
