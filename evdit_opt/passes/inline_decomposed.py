"""Show Inductor what a tile attention on a CPU is made of.

The operator is opaque: its copies and merges run one by one, between what Inductor fuses. At short
frames they cost as much as a third of the attention. Inlined, the copies become part of whatever
computes q, k and v, and the merges one loop: measured in docs/notes/kernels.md. Very short
sequences take one call with a mask; inlined, it costs what it would if a person had written it.
"""

from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx

from evdit_opt.kernels import dispatch, masked, traced
from evdit_opt.kernels.geometry import Geometry
from evdit_opt.passes.graph import subgraphs, value_of

__all__ = ["inline_decomposed"]

OP = torch.ops.evdit.tile_attention.default
HELD = "evdit_bias_"


def inline_decomposed(gm: fx.GraphModule) -> int:
    """Replace the operator by the Python function behind it, which AOT then traces.

        before:  both = evdit.tile_attention(q, k, v, None, intervals, log_weights, 17, 100, ...)
                 out = both[0]
        after:   out = tile_attention(None, q, k, v, None, intervals, log_weights, 17, 100, ...)
        or:      out = tile_attention(self.evdit_bias_0, q, k, v, None, ...)  # short sequences

    Only where that is the same computation: on a CPU, by the decomposed or the masked
    implementation ("auto" is decided here, measured where it must be), at static lengths, without
    gradients (the flash operator's log-sum-exp has no derivative; the operator's own backward does
    not need one), where nobody reads the log-sum-exp, and without an additive mask, whose values
    the operator checks. Elsewhere the operator stays.

    Returns:
        Number of calls inlined.
    """
    inlined = 0
    for body in subgraphs(gm):
        for node in body.graph.find_nodes(op="call_function", target=OP):
            for part in [part for part in node.users if not part.users]:
                body.graph.erase_node(part)  # Dynamo leaves them in the bodies of its own operators
            if not _may_inline(node):
                continue
            impl, bias = _decide(node)
            if impl not in ("decomposed", "masked"):
                continue
            held = None if bias is None else _hold(gm, body, node, bias)
            node.target, node.args = tile_attention, (held, *node.args)
            for part in list(node.users):
                part.replace_all_uses_with(node)
                body.graph.erase_node(part)
            inlined += 1
    return inlined


def _may_inline(node: fx.Node) -> bool:
    *_, frames, tokens, prefix, suffix, _, impl = node.args
    q, attn_mask = value_of(node.args[0]), value_of(node.args[3])
    return (
        not torch.is_grad_enabled()
        and all(user.target is getitem and user.args[1] == 0 for user in node.users)
        and isinstance(impl, str)
        and isinstance(q, Tensor)
        and q.device.type == "cpu"
        and all(isinstance(length, int) for length in (*q.shape, frames, tokens, prefix, suffix))
        and (node.args[3] is None or getattr(attn_mask, "dtype", None) == torch.bool)
    )


def _decide(node: fx.Node) -> tuple[str, Tensor | None]:
    """The implementation that a call takes, and the mask of all token pairs if it needs one."""
    arguments: tuple[Any, ...] = node.args
    q, k, v, attn_mask = map(value_of, arguments[:4])
    intervals, log_weights, *layout, _, impl = arguments[4:]
    mask, geometry = (tuple(intervals), tuple(log_weights)), _geometry(*layout)
    impl = dispatch.decide(impl, q, k, v, attn_mask, *mask, geometry)
    if impl != "masked":
        return impl, None
    return impl, masked.pair_bias(*mask, geometry, masked.pair_dtype(mask[1], q.dtype), q.device)


def _hold(gm: fx.GraphModule, body: fx.GraphModule, node: fx.Node, bias: Tensor) -> fx.Node:
    """The tensor as a buffer of the graph; calls with the same mask share it."""
    from torch._dynamo.source import ConstantSource  # takes a second to import

    # Not a constant: Inductor would copy it at every call.
    held = {id(value): name for name, value in body.named_buffers() if name.startswith(HELD)}
    name = held.get(id(bias), f"{HELD}{len(held)}")
    if body is not gm:  # AOT would ask for a guard that two buffers are one tensor
        bias = bias.clone()
    body.register_buffer(name, bias, persistent=False)
    # AOT asks Dynamo where every buffer of the model came from; this one nobody can change.
    sources = getattr(gm, "_param_name_to_source", {})
    prefix = next(path for path, module in gm.named_modules() if module is body)
    path = f"{prefix}.{name}" if prefix else name
    sources[path] = ConstantSource(path)
    with body.graph.inserting_before(node):
        return body.graph.create_node("get_attr", name)


def _geometry(frames: int, tokens_per_frame: int, prefix: int, suffix: int) -> Geometry:
    return Geometry(frames=frames, tokens=tokens_per_frame, prefix=prefix, suffix=suffix)


def tile_attention(
    bias: Tensor | None,
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
) -> Tensor:
    """The output of ``torch.ops.evdit.tile_attention`` as a function that can be traced.

    Args:
        bias: None: decomposed; otherwise the mask of all token pairs, ``[1, 1, seq, seq]``.
        q: as of the operator, and so is the rest.
    """
    if torch.is_autocast_enabled("cpu"):
        # The operator's autocast rule chooses the dtype.
        out: Tensor = OP(
            q, k, v, attn_mask, intervals, log_weights, frames, tokens_per_frame, prefix, suffix,
            scale, impl,
        )[0]  # fmt: skip
        return out
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if bias is not None:
        return masked.attend_pairs(q, k, v, attn_mask, bias, scale)[0]
    geometry = _geometry(frames, tokens_per_frame, prefix, suffix)
    mask = tuple(intervals), tuple(log_weights)
    return traced.forward(q, k, v, attn_mask, *mask, geometry, scale)
