"""Residuals as results and arguments of an exported graph: nothing of a step stays inside.

A program of the mode "refresh" returns them beside its output, one of the mode "reuse" takes them:

    output, residuals = refresh(**call)                 # residuals: {"blocks.0.attn1": tensor, ...}
    output = reuse(**call, residuals=residuals)
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from evdit_opt.errors import PlanMismatchError, UnsupportedInputError
from evdit_opt.passes.graph import layer_fqn, subgraphs, value_of
from evdit_opt.passes.site_mark import MarkFacts, facts_of
from evdit_opt.passes.swap_attention import match_marks

__all__ = ["RESIDUALS", "add_residuals", "residual_values", "return_residuals", "take_residuals"]

RESIDUALS = "residuals"
"""The argument that is added to the model's own."""

Inputs = Mapping[str, fx.Node]


def add_residuals(gm: fx.GraphModule) -> dict[str, fx.Node]:
    """Give every site that keeps or adds a residual in this step a place for it.

    before:  x' = evdit.mark(x, spec, frames, tokens_per_frame, None, "reuse", None, ...)
    after:   x' = evdit.mark(x, spec, frames, tokens_per_frame, None, "reuse", residual_0, ...)

    Args:
        gm: an exported graph with marks, its attention in canonical form; edited in place.

    Returns:
        The new inputs by site, in the order the sites run. None where the step has another mode.

    Raises:
        PlanMismatchError: if a site attends twice, or out of reach of the graph's inputs.
        UnsupportedInputError: if the size of a residual is known only when the model runs.
    """
    inputs: dict[str, fx.Node] = {}
    for body in subgraphs(gm):
        for mark, calls in match_marks(body.graph):
            if facts_of(mark).mode not in ("refresh", "reuse") or not calls:
                continue
            name = (layer_fqn(mark, None) or "").split("@")[0]
            if body is not gm or name in inputs:
                problem = "runs twice" if name in inputs else "lies in a graph within the graph"
                raise PlanMismatchError(
                    f"expected {name} to run once in the exported graph, to hand its residual in "
                    f"and out, it {problem}; take the site out of the plan's reuse"
                )
            inputs[name] = _place(gm.graph, value_of(calls[0]), len(inputs), name)
            mark.update_arg(_position(mark), inputs[name])
    return inputs


def _position(mark: fx.Node) -> int:
    fields = MarkFacts._fields
    return len(mark.args) - len(fields) + fields.index("residual")


def _place(graph: fx.Graph, like: Tensor, number: int, name: str) -> fx.Node:
    if not all(isinstance(size, int) for size in like.shape):
        raise UnsupportedInputError(
            f"expected at {name} a sequence whose length the call tells, only the run does; "
            "export a plan without residual reuse"
        )
    with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
        place = graph.placeholder(f"residual_{number}")
    place.meta["val"] = place.meta["example_value"] = torch.empty_like(like)
    return place


def return_residuals(gm: fx.GraphModule, inputs: Inputs) -> fx.GraphModule:
    """Let a graph return what it writes to its residuals.

    before:  residual_0.copy_(dropped)
             return output
    after:   return output, {"blocks.0.attn1": dropped}

    Args:
        gm: an exported graph whose sites are rewritten; taken apart.
        inputs: as of :func:`add_residuals`.
    """
    graph, info = gm.graph, _signature(gm.graph).pytree_info
    kept = {}
    for name, place in inputs.items():
        (write,) = place.users
        kept[name] = write.args[1]
        graph.erase_node(write)
        graph.erase_node(place)
    output = graph.output_node()
    returned: Any = output.args[0]
    output.args = ((*returned, *kept.values()),)
    own = pytree.tree_unflatten(returned, info.out_spec)
    _, spec = pytree.tree_flatten((own, kept))
    _signature(graph).pytree_info = info._replace(out_spec=spec)
    return fx.GraphModule(gm, graph)


def take_residuals(gm: fx.GraphModule, inputs: Inputs) -> fx.GraphModule:
    """Make one argument of a graph's residuals.

    before:  def forward(self, hidden_states, timestep, residual_0, residual_1)
    after:   def forward(self, hidden_states, timestep, residuals)  # {"blocks.0.attn1": tensor}

    Args:
        gm: an exported graph whose sites are rewritten; taken apart.
        inputs: as of :func:`add_residuals`.
    """
    graph, info = gm.graph, _signature(gm.graph).pytree_info
    names = [None] * info.in_spec.num_leaves
    args, kwargs = pytree.tree_unflatten(names, info.in_spec)
    if RESIDUALS in kwargs:
        raise UnsupportedInputError(
            f"expected a model without an argument of its own named {RESIDUALS!r}, got one; "
            "export a plan without residual reuse"
        )
    _, spec = pytree.tree_flatten((args, {**kwargs, RESIDUALS: dict.fromkeys(inputs)}))
    orig_args = [*info.orig_args, RESIDUALS]
    _signature(graph).pytree_info = info._replace(orig_args=orig_args, in_spec=spec)
    return fx.GraphModule(gm, graph)


def _signature(graph: fx.Graph) -> Any:
    """What makes an exported graph take and return more than flat lists of tensors."""
    return graph._codegen


def residual_values(program: ExportedProgram, mode: str | None) -> dict[str, str]:
    """The residuals that a program takes or returns: name in its graph -> site.

    Args:
        program: as of ``export_program``.
        mode: of its step.
    """
    signature, spec = program.graph_signature, program.call_spec
    values: dict[str, str] = {}
    if mode == "reuse":
        values = pytree.tree_unflatten(signature.user_inputs, spec.in_spec)[1][RESIDUALS]
    elif mode == "refresh":
        values = pytree.tree_unflatten(signature.user_outputs, spec.out_spec)[1]
    return {value: site for site, value in values.items()}
