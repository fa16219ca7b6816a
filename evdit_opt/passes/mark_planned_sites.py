"""Mark the sites of a plan in a graph that has no marks, by module name."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import fx

from evdit_opt.errors import LayoutError, PlanMismatchError
from evdit_opt.grid import VideoGrid
from evdit_opt.passes.graph import (
    attention_calls,
    layer_fqn,
    read_attention,
    value_key,
    value_of,
)
from evdit_opt.passes.site_mark import MARK, MarkFacts
from evdit_opt.passes.trace_origin import (
    common_origin,
    is_parameter,
    projected,
    trace_origins,
)
from evdit_opt.site_plan import site_spec

if TYPE_CHECKING:
    from evdit_opt.plan import Plan

__all__ = ["mark_planned_sites"]


def mark_planned_sites(
    gm: fx.GraphModule, plan: "Plan", grid: VideoGrid | None, names: Mapping[int, str] | None = None
) -> None:
    """Insert the marks that ``apply_plan`` would have put, where the whole model is one graph.

    before:  q, k, v = linear(x, ...), linear(x, ...), linear(x, ...)   # in module "blocks.3.attn1"
             out = scaled_dot_product_attention(q, k, v)
    after:   x' = evdit.mark(x, "2 0 none paper 0 0 0", frames, tokens_per_frame)
             q, k, v = linear(x', ...), linear(x', ...), linear(x', ...)

    Args:
        gm: Dynamo's graph; edited in place.
        plan: rules by module path.
        grid: the caller's word on the grid; None: read from the graph's 5-D input.
        names: ``id(module) -> path``; None: take the paths Dynamo wrote down.

    Raises:
        PlanMismatchError: naming planned sites whose attention is not in this graph; or if the plan
            reuses residuals, which needs to know the steps.
        LayoutError: if the grid cannot be read.
    """
    rules = plan.rules
    if not rules:
        return
    if plan.reuse is not None:
        raise PlanMismatchError(
            "expected a plan without residual reuse for torch.compile(..., backend='evdit'): what "
            "is kept from step to step hangs on the model; use evdit_opt.apply_plan(model, plan)"
        )
    grid = grid or _read_grid(gm.graph, plan)
    sites = {site.name: site for site in plan.sites}
    marked = set()
    for call in attention_calls(gm.graph):
        layer = layer_fqn(call, names) or ""
        site = next((s for s in rules if layer == s or layer.startswith(f"{s}.")), None)
        if site is None:
            continue
        attention = read_attention(call)
        origins = trace_origins([attention.q, attention.k, attention.v])
        shared = common_origin(origins)
        if not shared:
            continue  # the cross-attention of the same module
        spec = site_spec(sites[site], plan.min_tokens).encode()
        readers = [reader for origin in origins for reader in origin.projections[shared[0]]]
        inputs = {reader: projected(reader) or shared[0] for reader in readers}
        # Hidden states may be written out for each reader; they are equal, the first serves all.
        states = min(inputs.values())
        facts = MarkFacts(
            spec, grid.frames, grid.tokens_per_frame, None, "sparse", None, None, None, None
        )
        with gm.graph.inserting_after(states):
            mark = gm.graph.call_function(MARK, (states, *facts))
        mark.meta = {**call.meta, value_key(call): value_of(states)}
        for reader, source in inputs.items():
            reader.replace_input_with(source, mark)
        marked.add(site)
    missing = [name for name in rules if name not in marked]
    if missing:
        raise PlanMismatchError(
            f"expected the planned sites {', '.join(missing)}, found no self-attention of theirs "
            "in this graph: the model was captured in parts, is wrapped by hooks, or another. Use "
            "evdit_opt.apply_plan(model, plan) instead of torch.compile(..., backend='evdit')"
        )


def _read_grid(graph: fx.Graph, plan: "Plan") -> VideoGrid:
    source = plan.grid_source
    inputs = {}
    for node in graph.find_nodes(op="placeholder"):
        value = value_of(node)
        if isinstance(value, torch.Tensor) and value.ndim == 5 and not is_parameter(node):
            inputs[str(node.target)] = value
    named = {name: value for name, value in inputs.items() if f"_{source.input}_" in name}
    found = list((named or inputs).values())
    if source.kind != "patch" or len(found) != 1:
        raise LayoutError(
            f"expected one 5-D input named {source.input!r} to read the grid from, found "
            f"{', '.join(inputs) or 'none'}; pass options={{'layout': VideoGrid(frames, height, "
            "width)} or use evdit_opt.apply_plan(model, plan)"
        )
    return source.read({source.input: found[0]})
