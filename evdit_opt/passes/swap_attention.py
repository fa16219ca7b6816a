"""Give every marked site its sparse attention."""

import operator
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from evdit_opt.errors import PlanMismatchError
from evdit_opt.masks import TileMask
from evdit_opt.passes.decide_site import Decision, SiteOutcome, decide
from evdit_opt.passes.graph import (
    LEFT_ALONE,
    SDPA,
    Attention,
    attention_calls,
    insert_call,
    is_attention,
    layer_fqn,
    read_attention,
    subgraphs,
    value_of,
    walk_back,
)
from evdit_opt.passes.head_groups import attend_in_groups
from evdit_opt.passes.site_mark import MARK, MARKS, MarkFacts, SiteSpec, facts_of, remove_mark
from evdit_opt.passes.text_tokens import text_tokens

__all__ = ["ResidualMissing", "match_marks", "swap_attention"]


def swap_attention(
    gm: fx.GraphModule,
    names: Mapping[int, str] | None,
    impl: str,
    sharing: Mapping[str, str] | None = None,
) -> list[SiteOutcome]:
    """Replace the attention of every marked site, and take the marks out.

    before:  x' = evdit.mark(x, "2 0 none paper 0 77 0", frames, tokens_per_frame)
             out = scaled_dot_product_attention(q(x'), k(x'), v(x'))
    after:   out, lse = evdit.tile_attention(q(x), k(x), v(x), mask, intervals, log_weights, ...)

    In the mode "refresh" the attention stays, and what the mask would have dropped is kept:

    after:   out = scaled_dot_product_attention(q(x), k(x), v(x))
             sparse, lse = evdit.tile_attention(q(x), k(x), v(x), mask, ...)
             residual.copy_(detach(out - sparse))

    and in the mode "reuse" it is added: ``out = sparse + residual``. Where the rule keeps nothing,
    the residual is the whole output. One of another dtype than the output goes through
    ``evdit.pack_residual`` and ``evdit.unpack_residual``. In the mode "dense" only the mark goes.
    Where a guard checks, a few rows of ``out`` are compared with dense attention:

    after:   drift.copy_(evdit.row_error(q(x), k(x), v(x), attn_mask, out, rows, ...))

    Where some heads have a rule of their own, each group of heads is an attention of its own, and
    their outputs are put together again (see ``head_groups``).

    Only an attention whose q, k and v all come from one and the same mark, and from no other, is
    the site's: that leaves the cross-attention of a marked module alone. Short sequences, and clips
    with so few frames that the rule keeps every tile, stay dense, with the reason.

    Args:
        gm: Dynamo's graph; edited in place, subgraphs included.
        names: ``id(module) -> path`` of the model, for messages.
        impl: implementation of the operator.
        sharing: encoded spec -> the sites that have it, for marks whose layer Dynamo lost.

    Raises:
        PlanMismatchError: if a mark has no attention it could be applied to; names the site.
        LayoutError: if the sequence does not fit the grid and the text of the plan.
        ResidualMissing: if sites that reuse have no residual of the right shape yet.
    """
    import evdit_opt.kernels.ops
    import evdit_opt.kernels.residual
    import evdit_opt.kernels.row_error  # noqa: F401  (all register their operators)

    outcomes = []
    missing: dict[str, Tensor] = {}
    for body in subgraphs(gm):
        for mark, calls in match_marks(body.graph):
            spec = facts_of(mark).spec
            name = layer_fqn(mark, names) or (sharing or {}).get(spec) or "a site without a name"
            if not calls:
                raise PlanMismatchError(_nothing_to_rewrite(name, mark, body.graph))
            if not _has_residual(mark, calls, name):
                missing[name] = value_of(calls[0])
                continue
            for number, call in enumerate(calls):
                # A site that loops over its batch is checked at the first sample.
                outcome = _rewrite(call, mark, name, impl, checks=number == 0)
                if number == 0:
                    outcomes.append(outcome)
            remove_mark(mark)
        body.recompile()
    if missing:
        raise ResidualMissing(missing)
    return outcomes


class ResidualMissing(Exception):
    """Not an error: tells who keeps the residuals what they have to look like.

    Attributes:
        like: example output of the attention, by site.
    """

    def __init__(self, like: Mapping[str, Tensor]) -> None:
        super().__init__(f"residuals of {', '.join(like)}")
        self.like = dict(like)


def _has_residual(mark: fx.Node, calls: list[fx.Node], name: str) -> bool:
    facts = facts_of(mark)
    if facts.mode not in ("refresh", "reuse"):
        return True
    if len(calls) > 1:
        raise PlanMismatchError(
            f"expected {name} to call its attention once a forward to keep a residual, it does so "
            f"{len(calls)} times; take the site out of the plan's reuse"
        )
    wanted, got = value_of(calls[0]), value_of(facts.residual)
    return (got.shape, got.device) == (wanted.shape, wanted.device)


def match_marks(graph: fx.Graph) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
    """Every mark of ``graph`` with the SDPA calls that are its own, in graph order."""
    own: dict[fx.Node, list[fx.Node]] = {
        node: [] for node in graph.nodes if node.op == "call_function" and node.target in MARKS
    }
    if own:
        for call in attention_calls(graph):
            attention = read_attention(call)
            sources = [_marks_behind(x) for x in (attention.q, attention.k, attention.v)]
            if len(sources[0]) == 1 and sources[0] == sources[1] == sources[2]:
                own[next(iter(sources[0]))].append(call)
    yield from own.items()


def _marks_behind(node: fx.Node) -> set[fx.Node]:
    def stop(seen: fx.Node) -> bool:
        return seen.target in MARKS or is_attention(seen)

    return {found for found in walk_back([node], stop) if found.target in MARKS}


def _nothing_to_rewrite(name: str, mark: fx.Node, graph: fx.Graph) -> str:
    attentions = sum(is_attention(node) for node in graph.nodes)
    for node in graph.nodes:
        if LEFT_ALONE in node.meta and _marks_behind(node) == {mark}:
            return (
                f"expected at {name} an attention that can be made sparse, got one that is spelled "
                f"out: {node.meta[LEFT_ALONE]}; set this site's rule to null in the plan to leave "
                "it dense"
            )
    return (
        f"expected {name} to compute its attention from its own hidden states in the graph Dynamo "
        f"made, found no such attention among the {attentions} in this graph; the site was not "
        "rewritten. Its forward breaks the graph before the attention, or takes q, k or v from "
        "elsewhere: set this site's rule to null in the plan to leave it dense"
    )


def _rewrite(call: fx.Node, mark: fx.Node, name: str, impl: str, checks: bool) -> SiteOutcome:
    facts = facts_of(mark)
    spec = SiteSpec.decode(facts.spec)
    # The structure of the mask is static: a symbolic frame count is guarded to this value here.
    frames, tokens = int(value_of(facts.frames)), facts.tokens_per_frame
    attention = read_attention(call)
    decision = decide(attention, spec, frames, value_of(tokens), name, facts.mode)
    outcome = decision.outcome(name, spec, "mark" if mark.target is MARK else "scope")
    if decision.reason:
        return outcome

    graph = call.graph
    with graph.inserting_before(call):
        sparse = None
        if decision.mask is not None:
            text = text_tokens(graph, attention.q, frames, tokens, spec, name)
            lower = partial(_sparse, call, tokens=tokens, text=text, impl=impl)
            sparse = _grouped(call, attention, decision, spec, lower)
        if facts.mode == "reuse":
            kept = _kept(call, facts)
            if sparse is None:
                out = insert_call(graph, torch.ops.aten.clone.default, (kept,), call)
            else:
                out = insert_call(graph, operator.add, (sparse, kept), call)
        else:
            out = sparse or call  # what keeps nothing is never merely sparse
        if facts.rows is not None and checks:
            _check(call, attention, out, facts, spec, name)
    if facts.mode == "refresh":
        with graph.inserting_before(call.next):
            dropped = call
            if sparse is not None:
                dropped = insert_call(graph, operator.sub, (call, sparse), call)
            _keep(call, facts, dropped)
    else:
        call.replace_all_uses_with(out)
        graph.erase_node(call)
    return outcome


def _keep(call: fx.Node, facts: MarkFacts, residual: fx.Node) -> None:
    """Write what a mask drops to where it is kept; a gradient does not flow from step to step."""
    graph, copy = call.graph, torch.ops.aten.copy_.default
    residual = insert_call(graph, torch.ops.aten.detach.default, (residual,), call)
    if facts.residual_scale is None:
        insert_call(graph, copy, (facts.residual, residual), call)
        return
    packed = insert_call(graph, torch.ops.evdit.pack_residual.default, (residual,), call)
    for place, part in enumerate((facts.residual, facts.residual_scale)):
        own = insert_call(graph, operator.getitem, (packed, place), call)
        insert_call(graph, copy, (part, own), call)


def _kept(call: fx.Node, facts: MarkFacts) -> fx.Node:
    """What was kept, in the dtype of the attention's output."""
    dtype = value_of(call).dtype
    if facts.residual_scale is None and value_of(facts.residual).dtype == dtype:
        return facts.residual  # type: ignore[no-any-return]
    arguments = (facts.residual, facts.residual_scale, dtype)
    return insert_call(call.graph, torch.ops.evdit.unpack_residual.default, arguments, call)


def _check(
    call: fx.Node, attention: Attention, out: fx.Node, facts: MarkFacts, spec: SiteSpec, name: str
) -> None:
    """Compare some rows of ``out`` with dense attention, before ``call``."""
    graph, frames = call.graph, int(value_of(facts.frames))
    tokens = facts.tokens_per_frame
    prefix, _ = text_tokens(graph, attention.q, frames, tokens, spec, name)
    arguments = (
        attention.q,
        attention.k,
        attention.v,
        attention.attn_mask,
        out,
        facts.rows,
        frames,
        tokens,
        prefix,
        attention.scale,
    )
    found = insert_call(graph, torch.ops.evdit.row_error.default, arguments, call)
    found = insert_call(graph, torch.ops.aten.detach.default, (found,), call)
    insert_call(graph, torch.ops.aten.copy_.default, (facts.drift, found), call)


def _grouped(
    call: fx.Node,
    attention: Attention,
    decision: Decision,
    spec: SiteSpec,
    lower: Callable[[Attention, TileMask], fx.Node],
) -> fx.Node:
    """What takes the place of an attention whose heads follow one rule, or two."""
    assert decision.mask is not None
    if decision.second is None or spec.second is None:
        return lower(attention, decision.mask)
    masks = decision.mask, decision.second

    def attend(own: Attention, group: bool) -> fx.Node:
        return lower(own, masks[group])

    def add(target: Callable[..., Any], *arguments: Any) -> fx.Node:
        return insert_call(call.graph, target, arguments, call)

    found: fx.Node = attend_in_groups(attention, spec.second.heads, attend, add)
    return found


def _sparse(
    call: fx.Node,
    attention: Attention,
    mask: TileMask,
    tokens: Any,
    text: tuple[Any, Any],
    impl: str,
) -> fx.Node:
    """The operator in place of an attention, as a new node before it.

    A mask that keeps everything, as that of some heads may, is plain attention.
    """
    graph = call.graph
    if mask.is_dense:
        q, k, v, attn_mask, _, _, scale, _ = attention
        return insert_call(graph, SDPA, (q, k, v, attn_mask), call, scale=scale)
    prefix, suffix = text
    intervals, log_weights = mask.segments()
    arguments = (
        attention.q,
        attention.k,
        attention.v,
        attention.attn_mask,
        list(intervals),
        list(log_weights),
        mask.frames,
        tokens,
        prefix,
        suffix,
        attention.scale,
        impl,
    )
    both = insert_call(graph, torch.ops.evdit.tile_attention.default, arguments, call)
    return insert_call(graph, operator.getitem, (both, 0), call)
