"""Show q, k and v of every site to a callback, without changing what the model computes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from evdit_opt.errors import AlreadyOptimizedError
from evdit_opt.passes.canonicalize_attention import canonicalize_attention
from evdit_opt.passes.capture import Capture, captured
from evdit_opt.passes.graph import (
    LEFT_ALONE,
    attention_calls,
    copy_graph,
    read_attention,
    subgraphs,
)
from evdit_opt.passes.marks import add_marks, remove_mark
from evdit_opt.passes.stand_in import settle
from evdit_opt.passes.swap_attention import match_marks

__all__ = ["Callback", "Record", "mute_attention", "observe", "observe_attention"]

Callback = Callable[[str, Tensor, Tensor, Tensor, Tensor | None, float | None], None]
"""``callback(site name, q, k, v, attn_mask, scale)``, tensors ``[batch, heads, seq, head_dim]``."""

Record = Callable[[Tensor, Tensor, Tensor, Tensor | None, float | None, Tensor], None]


@contextmanager
def observe(
    model: nn.Module, site_names: Sequence[str], callback: Callback, *, mute: bool = False
) -> Iterator[Capture]:
    """While active, every attention call of the sites goes through ``callback`` first.

    Args:
        model: the denoiser; call it as usual. Its graph runs uncompiled.
        site_names: module paths. A site that never calls back has an attention that is not made
            from its module's own hidden states.
        callback: called outside autograd, once per attention call (some models loop over the
            batch).
        mute: replace the output of every attention by zeros, so that tokens do not mix.

    Raises:
        AlreadyOptimizedError: if a plan is applied.
        PlanMismatchError: naming sites the model lacks.
    """
    if hasattr(model, "_evdit"):
        raise AlreadyOptimizedError(
            f"expected a dense {type(model).__name__}, this one has a plan applied; call "
            "evdit_opt.restore(model) first"
        )

    def record(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, index: Tensor
    ) -> None:
        with torch.no_grad():
            mask = None if mask is None else mask.detach()
            callback(site_names[int(index)], q.detach(), k.detach(), v.detach(), mask, scale)

    def backend(gm: fx.GraphModule, _example_inputs: Sequence[Any]) -> Callable[..., Any]:
        gm = copy_graph(gm)
        stand_ins = canonicalize_attention(gm)
        observe_attention(gm, record)
        if mute:
            mute_attention(gm)
        settle(stand_ins)
        gm.recompile()
        return gm.forward  # type: ignore[no-any-return]

    # Tensors, not numbers: layers that share one compiled graph are told apart while it runs.
    indices = [torch.tensor(index) for index in range(len(site_names))]
    marks = add_marks(model, dict.fromkeys(site_names, ""), None, indices)
    try:
        with captured(model, backend) as capture:
            yield capture
    finally:
        marks.remove()


def observe_attention(gm: fx.GraphModule, record: Record) -> None:
    """Insert a call of ``record`` before every attention of a marked site; takes the marks out.

    before:  x' = evdit.mark(x, "", 0, 0, index)
             out = scaled_dot_product_attention(q(x'), k(x'), v(x'))
    after:   record(q(x), k(x), v(x), attn_mask, scale, index)
             out = scaled_dot_product_attention(q(x), k(x), v(x))
    """
    for body in subgraphs(gm):
        for mark, calls in match_marks(body.graph):
            for call in calls:
                seen = read_attention(call)
                arguments = (seen.q, seen.k, seen.v, seen.attn_mask, seen.scale, mark.args[4])
                with body.graph.inserting_before(call):
                    body.graph.call_function(record, arguments)
            remove_mark(mark)
        body.recompile()


def mute_attention(gm: fx.GraphModule) -> None:
    """Replace what every attention returns by zeros.

    before:  out = scaled_dot_product_attention(q, k, v)
    after:   out = zeros of the same shape

    So are the weights of attention that is spelled out and could not be written as SDPA.
    """
    for body in subgraphs(gm):
        for softmax in [node for node in body.graph.nodes if LEFT_ALONE in node.meta]:
            with body.graph.inserting_after(softmax):
                silence = body.graph.call_function(torch.zeros_like, (softmax,))
            softmax.replace_all_uses_with(silence)
            silence.args = (softmax,)
        for call in attention_calls(body.graph):
            attention = read_attention(call)
            with body.graph.inserting_before(call):
                silence = body.graph.call_function(_silence, (attention.q, attention.v))
            call.replace_all_uses_with(silence)
            body.graph.erase_node(call)
        body.recompile()


def _silence(q: Tensor, v: Tensor) -> Tensor:
    return q.new_zeros(*q.shape[:-1], v.shape[-1])
