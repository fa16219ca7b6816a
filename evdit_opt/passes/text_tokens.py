"""How many tokens lie before and after the video in the forward that is being compiled."""

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from evdit_opt.errors import LayoutError
from evdit_opt.passes.graph import (
    insert_call,
    is_attention,
    operation,
    same_size,
    value_of,
    walk_back,
)
from evdit_opt.passes.site_mark import SiteSpec
from evdit_opt.passes.trace_origin import projected

__all__ = ["text_tokens"]

Count = int | fx.Node


def text_tokens(
    graph: fx.Graph, q: fx.Node, frames: int, tokens: Any, spec: SiteSpec, name: str
) -> tuple[Count, Count]:
    """Tokens before and after the video, as numbers or nodes.

    What is longer than the video is text, and lies where it lay in calibration. With text on both
    sides the module itself must join its parts where the video began or ended then, and what comes
    after the video may be of any length; or it joins nothing, and the sum must be as calibrated.

    Args:
        graph: edited at its insertion point, where lengths are symbolic.
        q: queries ``[batch, heads, seq, head_dim]``.
        frames: latent frames.
        tokens: tokens of a frame, a number or a node.
        spec: the layout of calibration.
        name: the site.

    Raises:
        LayoutError: if the sequence does not fit.
    """
    length = value_of(q).shape[2]
    video = frames * value_of(tokens)
    text = length - video
    if spec.prefix and spec.suffix:
        seams, ends = list(_seams(q)), (spec.prefix, spec.prefix + video)
        if any(_equal(seam, end) for seam in seams for end in ends):
            return spec.prefix, _rest(graph, q, frames, tokens, spec.prefix)
        if not seams and _equal(text, spec.prefix + spec.suffix):
            return spec.prefix, spec.suffix
    elif not spec.prefix and not spec.suffix:
        if _equal(text, 0):
            return 0, 0
    elif isinstance(text, torch.SymInt) or text >= 0:
        rest = _rest(graph, q, frames, tokens, 0)
        return (rest, 0) if spec.prefix else (0, rest)
    raise LayoutError(
        f"expected at {name} a video of {frames} x {value_of(tokens)} tokens after {spec.prefix} "
        f"and before {spec.suffix} text tokens, as in calibration, got a sequence of {length}; "
        "calibrate for such calls"
    )


def _rest(graph: fx.Graph, q: fx.Node, frames: int, tokens: Any, before: int) -> Count:
    """``q.shape[2] - frames * tokens - before``, as a node where the length is symbolic."""
    length = value_of(q).shape[2]
    rest = length - frames * value_of(tokens) - before
    if not isinstance(rest, torch.SymInt):
        return int(rest)
    size = insert_call(graph, torch.ops.aten.sym_size.int, (q, 2), q)
    video: Any = frames * tokens if not isinstance(tokens, fx.Node) else None
    if video is None:
        video = insert_call(graph, operator.mul, (frames, tokens), q)
    node = insert_call(graph, operator.sub, (size, video), q)
    return insert_call(graph, operator.sub, (node, before), q) if before else node


def _equal(a: Any, b: Any) -> bool:
    """Compare sizes; what Dynamo made symbolic is guarded, what only the run can tell is proven."""
    difference = a - b
    if isinstance(difference, torch.SymInt) and not difference.node.has_hint():
        return same_size(a, b)
    return bool(difference == 0)


def _seams(q: fx.Node) -> Iterator[Any]:
    """Positions at which the site's own module joined the parts of its sequence."""
    length = value_of(q).shape[2]

    def stop(node: fx.Node) -> bool:
        return is_attention(node) or _joins(node, length) or projected(node) is not None

    for node in walk_back([q], stop):
        if _joins(node, length):
            end: Any = 0
            for part in node.all_input_nodes[:-1]:
                end = end + value_of(part).shape[_dim(node)]
                yield end


def _joins(node: fx.Node, length: Any) -> bool:
    if operation(node) not in ("cat", "concat", "concatenate"):
        return False
    return _equal(value_of(node).shape[_dim(node)], length)


def _dim(node: fx.Node) -> int:
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
    assert isinstance(dim, int)
    return dim
