"""Show Inductor what a tile attention on a CPU is made of.

The operator is opaque: its copies and merges run one by one, between what Inductor fuses. At short
frames they cost as much as a third of the attention. Inlined, the copies become part of whatever
computes q, k and v, and the merges one loop: measured in docs/notes/kernels.md.
"""

import torch
from torch import Tensor, fx

from evdit_opt.kernels import decomposed, dispatch
from evdit_opt.kernels.geometry import Geometry
from evdit_opt.passes.graph import subgraphs, value_of

__all__ = ["inline_decomposed"]

OP = torch.ops.evdit.tile_attention.default


def inline_decomposed(gm: fx.GraphModule) -> int:
    """Replace the operator by the Python function behind it, which AOT then traces.

        before:  both = evdit.tile_attention(q, k, v, None, intervals, log_weights, 17, 100, ...)
        after:   both = tile_attention(q, k, v, None, intervals, log_weights, 17, 100, ...)

    Only where that is the same computation: on a CPU, by the decomposed implementation, at static
    lengths, without gradients (the flash operator's log-sum-exp has no derivative; the operator's
    own backward does not need one), and without an additive mask, whose values the operator checks.
    Elsewhere the operator stays.

    Returns:
        Number of calls inlined.
    """
    inlined = 0
    for body in subgraphs(gm):
        for node in body.graph.find_nodes(op="call_function", target=OP):
            if _may_inline(node):
                node.target = tile_attention
                inlined += 1
    return inlined


def _may_inline(node: fx.Node) -> bool:
    *_, frames, tokens, prefix, suffix, _, impl = node.args
    q, attn_mask = value_of(node.args[0]), value_of(node.args[3])
    return (
        not torch.is_grad_enabled()
        and isinstance(impl, str)
        and isinstance(q, Tensor)
        and q.device.type == "cpu"
        and all(isinstance(length, int) for length in (*q.shape, frames, tokens, prefix, suffix))
        and dispatch.resolve(impl, q.device, q.shape[2]) == "decomposed"
        and (node.args[3] is None or getattr(attn_mask, "dtype", None) == torch.bool)
    )


def tile_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    intervals: list[int],
    log_weights: list[float],
    frames: int,
    tokens_per_frame: int,
    prefix: int,
    suffix: int,
    scale: float | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """``torch.ops.evdit.tile_attention`` as a function that can be traced."""
    if torch.is_autocast_enabled("cpu"):
        # The operator's autocast rule chooses the dtype.
        out, lse = OP(
            q, k, v, attn_mask, intervals, log_weights, frames, tokens_per_frame, prefix, suffix,
            scale, impl,
        )  # fmt: skip
        return out, lse
    geometry = Geometry(frames=frames, tokens=tokens_per_frame, prefix=prefix, suffix=suffix)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return decomposed.forward(
        q, k, v, attn_mask, tuple(intervals), tuple(log_weights), geometry, scale
    )
