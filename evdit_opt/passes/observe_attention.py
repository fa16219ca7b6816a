"""Show q, k and v of every site to a callback, which may answer with an output of its own."""

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from evdit_opt.errors import AlreadyOptimizedError
from evdit_opt.passes.canonicalize_attention import canonicalize_attention
from evdit_opt.passes.capture import captured, uncompiled
from evdit_opt.passes.graph import (
    LEFT_ALONE,
    SDPA,
    Attention,
    attention_calls,
    bind_attention,
    copy_graph,
    read_attention,
    subgraphs,
)
from evdit_opt.passes.marks import SiteMark, add_marks
from evdit_opt.passes.scopes import add_scopes, dense
from evdit_opt.passes.site_mark import MarkFacts, facts_of, remove_mark
from evdit_opt.passes.stand_in import settle
from evdit_opt.passes.swap_attention import match_marks

__all__ = ["Callback", "Observed", "mute_attention", "observe", "observe_attention"]

Callback = Callable[[str, Tensor, Tensor, Tensor, Tensor | None, float | None], Tensor | None]
"""``callback(site name, q, k, v, attn_mask, scale)``, tensors ``[batch, heads, seq, head_dim]``.

What it returns takes the place of the attention's output; None leaves it."""

Observed = Callable[..., Tensor]


@contextmanager
def observe(
    model: nn.Module,
    site_names: Sequence[str],
    callback: Callback,
    *,
    scoped: Collection[str] = (),
    mute: bool = False,
) -> Iterator[None]:
    """While active, every attention call of the sites goes through ``callback``.

    The sites are reached as a plan reaches them: by marks in Dynamo's graphs, which run
    uncompiled, or in scopes. Where all are scoped, the model runs eagerly.

    Args:
        model: the denoiser; call it as usual.
        site_names: module paths. A site that never calls back has an attention that is not made
            from its module's own hidden states.
        callback: called outside autograd, once per attention call (some models loop over the
            batch).
        scoped: those of ``site_names`` that are reached in a scope.
        mute: replace the output of every attention by zeros, so that tokens do not mix. Beside
            marked sites, attentions that are no site and run outside all graphs are not muted.

    Raises:
        AlreadyOptimizedError: if a plan is applied.
        PlanMismatchError: naming sites the model lacks.
    """
    if hasattr(model, "_evdit"):
        raise AlreadyOptimizedError(
            f"expected a dense {type(model).__name__}, this one has a plan applied; call "
            "evdit_opt.restore(model) first"
        )

    def observed(index: Tensor, *arguments: Any) -> Tensor:
        attention = Attention(*arguments)
        q, k, v = (x.detach() for x in attention[:3])
        mask = None if attention.attn_mask is None else attention.attn_mask.detach()
        with torch.no_grad():
            answer = callback(site_names[int(index)], q, k, v, mask, attention.scale)
        if mute:
            return _silence(q, v)
        return dense(attention) if answer is None else answer

    def backend(gm: fx.GraphModule, _example_inputs: Sequence[Any]) -> Callable[..., Any]:
        gm = copy_graph(gm)
        stand_ins = canonicalize_attention(gm)
        observe_attention(gm, observed)
        if mute:
            mute_attention(gm)
        settle(stand_ins)
        gm.recompile()
        return functools.partial(_run_traced, gm.forward)

    def attend(_site: SiteMark, attention: Attention, facts: MarkFacts) -> Tensor:
        return observed(facts.index, *attention)

    # Tensors, not numbers: layers that share one compiled graph are told apart while it runs.
    indices = {name: torch.tensor(number) for number, name in enumerate(site_names)}
    marked = [name for name in site_names if name not in scoped]
    marks = add_marks(model, dict.fromkeys(marked, ""), None, indices)
    with ExitStack() as stack:
        stack.callback(marks.remove)
        add_scopes(model, marks, dict.fromkeys(scoped, ""), attend, indices)
        for way in _run(model, backend, graphs=bool(marked) or not scoped, mute=mute):
            stack.enter_context(way)
        yield


def _run(
    model: nn.Module, backend: Callable[..., Any], graphs: bool, mute: bool
) -> list[AbstractContextManager[Any]]:
    if graphs:
        return [captured(model, backend)]
    return [uncompiled(model), *([_Mute()] if mute else [])]


def _run_traced(forward: Callable[..., Any], *args: Any) -> Any:
    # Dynamo has put into the graph what modes do; a scope must not see the same attention twice.
    with torch._C.DisableTorchFunction():
        return forward(*args)


class _Mute(TorchFunctionMode):
    """Eager attention returns zeros."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is SDPA:
            attention = bind_attention(args, kwargs or {})
            return _silence(attention.q, attention.v)
        return func(*args, **(kwargs or {}))


def observe_attention(gm: fx.GraphModule, observed: Observed) -> None:
    """Let ``observed`` compute every attention of a marked site; takes the marks out.

    before:  x' = evdit.mark(x, "", 0, 0, index)
             out = scaled_dot_product_attention(q(x'), k(x'), v(x'))
    after:   out = observed(index, q(x), k(x), v(x), attn_mask, dropout_p, ...)
    """
    for body in subgraphs(gm):
        for mark, calls in match_marks(body.graph):
            for call in calls:
                arguments = (facts_of(mark).index, *read_attention(call))
                with body.graph.inserting_before(call):
                    seen = body.graph.call_function(observed, arguments)
                call.replace_all_uses_with(seen)
                body.graph.erase_node(call)
            remove_mark(mark)
        body.recompile()


def mute_attention(gm: fx.GraphModule) -> None:
    """Replace what every attention returns by zeros.

    before:  out = scaled_dot_product_attention(q, k, v)
    after:   out = zeros of the same shape

    So are the weights of attention that is spelled out and could not be written as SDPA, and all
    results of a call that could not.
    """
    for body in subgraphs(gm):
        for left in [node for node in body.graph.nodes if LEFT_ALONE in node.meta]:
            with body.graph.inserting_after(left):
                silence = body.graph.call_function(_zeros_like, (left,))
            left.replace_all_uses_with(silence)
            silence.args = (left,)
        for call in attention_calls(body.graph):
            attention = read_attention(call)
            with body.graph.inserting_before(call):
                silence = body.graph.call_function(_silence, (attention.q, attention.v))
            call.replace_all_uses_with(silence)
            body.graph.erase_node(call)
        body.recompile()


def _zeros_like(results: Any) -> Any:
    return tree_map_only(Tensor, torch.zeros_like, results)


def _silence(q: Tensor, v: Tensor) -> Tensor:
    return q.new_zeros(*q.shape[:-1], v.shape[-1])
