"""Site scopes: the second way to a site, where its mark and its SDPA fall into different graphs.

A module may branch on data between its projections and its attention (Open-Sora-Plan: ``if not
torch.any(mask)``), or attend where Dynamo does not trace at all (inside the deprecated
``torch.backends.cuda.sdp_kernel``). No graph then holds both, so a mark at the module's input finds
no attention. Such a site is given a *scope*: while its module runs, and only on the thread that
runs it, a ``TorchFunctionMode`` is active that knows the site's rule.

* An SDPA that Dynamo traces is marked, and the pass that serves marks rewrites it. Dynamo
  guards what it read from the mode, so layers sharing a graph never share a mask.
* An SDPA that runs outside all graphs is computed by ``attend`` at once.

before:  out = scaled_dot_product_attention(q, k, v)        # in the scope of "blocks.3.attn1"
traced:  q', k', v' = evdit.mark_qkv(q, k, v, "2 0 none paper 0 0 0", frames, ...)
         out = scaled_dot_product_attention(q', k', v')
eager:   out = attend(...)

What substituting a function usually suffers from, and why this does not: nothing is patched, so no
other thread, model or module sees it; PyTorch switches a mode off while it handles a call, so
there is no recursion; the mode is left in an ``always_call`` hook, so an exception leaves nothing
behind; the grid is read when the module is entered, so it is never stale; a module that runs
without any SDPA in its scope raises. A scope needs a module that holds one attention only, which
planning makes sure of, and its hooks end Dynamo's graph: marks stay the first choice.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from evdit_opt.errors import PlanMismatchError
from evdit_opt.kernels.residual import Residual
from evdit_opt.masks import TileMask
from evdit_opt.passes.decide_site import SiteOutcome, decide, text_around
from evdit_opt.passes.graph import SDPA, Attention, bind_attention
from evdit_opt.passes.head_groups import attend_in_groups
from evdit_opt.passes.marks import RootMark, SiteMark, site_modules
from evdit_opt.passes.site_mark import MARK_QKV, MarkFacts, SiteSpec
from evdit_opt.passes.swap_attention import ResidualMissing

__all__ = ["Attend", "SiteScope", "SparseAttend", "add_scopes", "marks_to_scopes"]

Attend = Callable[[SiteMark, Attention, MarkFacts], Tensor]
"""``attend(site, attention, facts)``: the output of an SDPA outside all graphs."""


class SiteScope(TorchFunctionMode):
    """Active while the module of one site runs.

    Attributes:
        site: the site.
        facts: what its mark says in the running forward.
        attend: computes what runs outside all graphs.
        attended: True once the module has attended.
    """

    def __init__(self, site: SiteMark, attend: Attend) -> None:
        super().__init__()
        self.site, self.facts, self.attend, self.attended = site, site.facts, attend, False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Attend with the site's rule; every other function is left as it is."""
        kwargs = kwargs or {}
        if func is SDPA:
            self.attended = True
            attention = bind_attention(args, kwargs)
            if torch.compiler.is_dynamo_compiling():
                q, k, v = MARK_QKV(attention.q, attention.k, attention.v, *self.facts)
                return dense(attention._replace(q=q, k=k, v=v))
            return self.attend(self.site, attention, self.facts)
        if func is Tensor.unflatten:
            # Dynamo traces the method, but not the Python function that it is.
            return args[0].unflatten(*args[1:], **kwargs)
        return func(*args, **kwargs)


class SparseAttend:
    """Computes a planned site's attention where no graph holds it.

    Args:
        impl: implementation of the operator.
        outcomes: gets an entry per site.
    """

    def __init__(self, impl: str, outcomes: dict[str, SiteOutcome]) -> None:
        self.impl, self.outcomes = impl, outcomes

    def __call__(self, site: SiteMark, attention: Attention, facts: MarkFacts) -> Tensor:
        """The output of one attention; see :data:`Attend`."""
        import evdit_opt.kernels.ops
        import evdit_opt.kernels.row_error  # noqa: F401  (both register their operator)

        spec = SiteSpec.decode(facts.spec)
        frames, tokens = facts.frames, facts.tokens_per_frame
        decision = decide(attention, spec, frames, tokens, site.name, facts.mode)
        self.outcomes[site.name] = decision.outcome(site.name, spec, "scope")
        if decision.reason:
            return dense(attention)
        q, k, v, attn_mask, _, _, scale, _ = attention
        sparse = None
        if decision.mask is not None:
            text = text_around(q.shape[2], frames, tokens, spec, site.name)
            lower = partial(self._sparse, frames=frames, tokens=tokens, text=text)
            sparse = lower(attention, decision.mask) if decision.second is None else None
            if decision.second is not None and spec.second is not None:
                masks = decision.mask, decision.second
                sparse = attend_in_groups(
                    attention, spec.second.heads, lambda own, group: lower(own, masks[group])
                )
        if facts.residual is None:
            out: Tensor = sparse  # type: ignore[assignment]  # what keeps nothing reuses
        else:
            wanted = torch.empty_like(q) if sparse is None else sparse
            if facts.residual.shape != wanted.shape or facts.residual.device != wanted.device:
                raise ResidualMissing({site.name: wanted})
            kept = Residual(facts.residual, facts.residual_scale)
            if facts.mode == "refresh":
                out = dense(attention)
                kept.keep(out if sparse is None else out - sparse)
                return out
            residual = kept.unpack(wanted.dtype)
            out = residual.clone() if sparse is None else sparse + residual
        if facts.rows is not None:
            prefix, _ = text_around(q.shape[2], frames, tokens, spec, site.name)
            drift = torch.ops.evdit.row_error(
                q, k, v, attn_mask, out, facts.rows, frames, tokens, prefix, scale
            )
            facts.drift.copy_(drift.detach())
        return out

    def _sparse(
        self, attention: Attention, mask: TileMask, frames: int, tokens: int, text: tuple[Any, Any]
    ) -> Tensor:
        """Of some heads or all; a mask that keeps everything is plain attention."""
        if mask.is_dense:
            return dense(attention)
        q, k, v, attn_mask, _, _, scale, _ = attention
        out: Tensor = torch.ops.evdit.tile_attention(
            q, k, v, attn_mask, *mask.segments(), frames, tokens, *text, scale, self.impl
        )[0]
        return out


def dense(attention: Attention) -> Tensor:
    """The attention as the model wrote it."""
    q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa = attention
    return SDPA(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def add_scopes(
    model: nn.Module,
    root: RootMark,
    specs: Mapping[str, str],
    attend: Attend,
    indices: Mapping[str, Tensor] | None = None,
) -> None:
    """Give the sites in ``specs`` a scope; ``root.remove()`` takes it away again.

    Args:
        model: the denoiser.
        root: the marks of the model's other sites.
        specs: encoded :class:`SiteSpec` per module path.
        attend: computes what runs outside all graphs.
        indices: numbers of the sites as tensors, for observing.

    Raises:
        PlanMismatchError: naming the paths the model has no module at.
    """
    if not specs:
        return
    for name, module in site_modules(model, specs).items():
        index = None if indices is None else indices[name]
        module._evdit_site = SiteMark(name, specs[name], root.live, index, attend)  # type: ignore[assignment]
        root.sites.append(module)
        root.handles += _hook(module)
    root.handles += _hook_end(model, root)


def marks_to_scopes(model: nn.Module, root: RootMark, attend: Attend) -> Callable[[], None]:
    """Reach the marked sites in scopes instead, for a model that runs outside of all graphs.

    Args:
        model: the denoiser.
        root: its marks.
        attend: computes the sites' attention.

    Returns:
        A function that makes them marked sites again.
    """
    sites: list[Any] = [module for module in root.sites if _site(module).attend is None]
    handles = _hook_end(model, root)
    for module in sites:
        _site(module).attend = attend
        handles += _hook(module)
    root.handles += handles

    def undo() -> None:
        for handle in handles:
            handle.remove()
        for module in sites:
            _site(module).attend = None

    return undo


def _hook(module: nn.Module) -> list[RemovableHandle]:
    # Dynamo must not trace the hooks, and where it does not trace the model, it must not compile
    # __torch_function__ for every function that passes.
    torch._dynamo.decorators.skip(_enter)
    torch._dynamo.decorators.skip(_leave)
    torch._dynamo.eval_frame.skip_code(SiteScope.__torch_function__.__code__)
    return [
        module.register_forward_pre_hook(_enter),
        module.register_forward_hook(_leave, always_call=True),
    ]


def _hook_end(model: nn.Module, root: RootMark) -> list[RemovableHandle]:
    if root.source is None:
        return []
    return [model.register_forward_hook(_forward_is_over, always_call=True)]


def _site(module: nn.Module) -> Any:
    return module._evdit_site


def _enter(module: nn.Module, _args: Any) -> None:
    site = _site(module)
    if site.index is None and not site.live.running:
        raise PlanMismatchError(
            f"expected site {site.name} to run within a forward of its model, which says how many "
            "frames there are, got a call of a part; call the whole model"
        )
    SiteScope(site, torch.compiler.disable(site.attend)).__enter__()


def _leave(module: nn.Module, _args: Any, output: Any) -> None:
    site = _site(module)
    scope = torch.overrides._get_current_function_mode()
    if not isinstance(scope, SiteScope) or scope.site is not site:
        assert output is None, scope  # a hook before _enter raised
        return
    scope.__exit__(None, None, None)
    if output is not None and not scope.attended:  # None: the module raised
        raise PlanMismatchError(
            f"expected {site.name} to call scaled_dot_product_attention while it runs, it did not; "
            "the site was not rewritten. Set this site's rule to null in the plan to leave it dense"
        )


def _forward_is_over(model: nn.Module, _args: Any, _output: Any) -> None:
    root: Any = model._evdit
    root.live.stop()
