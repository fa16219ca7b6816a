"""Reduce masks that repeat one row of keys for every query to that row."""

from collections.abc import Iterator

import torch
from torch import fx

from evdit_opt.passes.graph import (
    SDPA,
    attention_calls,
    operation,
    read_attention,
    value_of,
)
from evdit_opt.passes.mask_structure import constant_dims, mutated_storages
from evdit_opt.passes.stand_in import Draft, StandIn, stand_in

__all__ = ["canonicalize_mask"]

KEYS, QUERIES = -1, -2
"""Dimensions of a mask ``[batch, heads, queries, keys]``."""

ALIKE = frozenset("bool clone contiguous detach".split())
"""Operations that leave a boolean tensor what it is."""


def canonicalize_mask(graph: fx.Graph) -> Iterator[StandIn]:
    """Write attention with a key-padding mask in the form ``[batch, heads, 1, keys]``.

    before:  mask = padding.view(b, 1, 1, s).expand(-1, -1, s, -1)           # or any other way
             out = scaled_dot_product_attention(q, k, v, mask)
    after:   out = scaled_dot_product_attention(q, k, v, mask[:, :, :1, :])

    A boolean mask that hides the rows of padding too gets them back as zeros, which is what SDPA
    returns for a query that may attend to nothing:

    before:  rows = padding.view(b, 1, 1, s).repeat(1, 1, s, 1)
             out = scaled_dot_product_attention(q, k, v, rows & rows.transpose(2, 3))
    after:   kept = rows[:, :, :1, :]
             out = scaled_dot_product_attention(q, k, v, kept)
             out = where(rows.transpose(2, 3)[:, :, :, :1], out, 0)

    Args:
        graph: edited in place; masks that hide different keys from different queries stay.
    """
    calls = [
        node
        for node in attention_calls(graph)
        if isinstance(read_attention(node).attn_mask, fx.Node)
    ]
    mutated = mutated_storages(graph.nodes) if calls else frozenset()
    for call in calls:
        mask = read_attention(call).attn_mask
        assert mask is not None
        parts = _split(mask, mutated)
        if parts is not None and (value_of(mask).ndim != 4 or not _one_row(mask)):
            yield _rewrite(call, *parts)


def _one_row(mask: fx.Node) -> bool:
    size = value_of(mask).shape[QUERIES]
    return isinstance(size, int) and size == 1


def _split(mask: fx.Node, mutated: frozenset[int]) -> tuple[list[fx.Node], list[fx.Node]] | None:
    """Masks over keys, and masks over queries, whose conjunction is ``mask``."""
    value = value_of(mask)
    constant = {dim - value.ndim for dim in constant_dims(mask, mutated)}
    if QUERIES in constant:
        return [mask], []
    if value.dtype != torch.bool:
        return None
    if KEYS in constant:
        return [], [mask]
    if operation(mask) in ALIKE:
        (source,) = mask.all_input_nodes
        return _split(source, mutated)
    if operation(mask) not in ("and_", "bitwise_and", "logical_and"):
        return None
    keys: list[fx.Node] = []
    queries: list[fx.Node] = []
    for part in mask.args:
        split = _split(part, mutated) if isinstance(part, fx.Node) else None
        if split is None:
            return None
        keys += split[0]
        queries += split[1]
    return keys, queries


def _rewrite(call: fx.Node, keys: list[fx.Node], queries: list[fx.Node]) -> StandIn:
    draft, attention = Draft(call), read_attention(call)
    rest = attention._asdict()
    q, k, v, _ = (rest.pop(name) for name in ("q", "k", "v", "attn_mask"))
    reduced = draft.add(SDPA, q, k, v, attn_mask=_one(draft, keys, QUERIES), **rest)
    kept = _one(draft, queries, KEYS)
    if kept is not None:
        draft.add(torch.where, kept, reduced, 0.0)
    return stand_in(reduced, draft.made, [call])


def _one(draft: Draft, masks: list[fx.Node], dim: int) -> fx.Node | None:
    """The conjunction of ``masks``, one element long along ``dim``, with four dimensions."""
    result = None
    for mask in masks:
        ndim = value_of(mask).ndim
        reduced = draft.add(torch.narrow, mask, dim, 0, 1)
        for _ in range(4 - ndim):
            reduced = draft.add(torch.unsqueeze, reduced, 0)
        result = reduced if result is None else draft.add(torch.logical_and, result, reduced)
    return result
