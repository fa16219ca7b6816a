"""Apply a plan to a model, in place, and take it off again."""

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import fx, nn

from evdit_opt.backend import Options, compile_graph
from evdit_opt.changed_layers import require_changed
from evdit_opt.errors import AlreadyOptimizedError, PlanMismatchError, UnsupportedInputError
from evdit_opt.guard import Guard, Guarding, expected_errors
from evdit_opt.inner import Inner
from evdit_opt.kernels import autotune
from evdit_opt.passes.capture import restore_call
from evdit_opt.passes.decide_site import SiteOutcome
from evdit_opt.passes.marks import RootMark, add_marks
from evdit_opt.passes.scopes import SparseAttend, add_scopes
from evdit_opt.passes.site_mark import Way
from evdit_opt.plan import Plan, SitePlan
from evdit_opt.report import Report
from evdit_opt.reuse import Reusing
from evdit_opt.running import Running, require_no_compiled_parts
from evdit_opt.site_plan import site_spec

__all__ = ["apply_plan", "is_optimized", "report", "restore"]

Model = TypeVar("Model", bound=nn.Module)


@dataclass
class Applied(RootMark):
    """The one attribute on an optimized model: its marks, its plan, what was compiled."""

    plan: Plan | None = None
    inner: str = "inductor"
    impl: str = "auto"
    previous_call: Callable[..., Any] | None = None
    compiled: dict[str, SiteOutcome] = field(default_factory=dict)
    graphs: int = 0
    reusing: Reusing | None = None


def apply_plan(
    model: Model,
    plan: Plan,
    *,
    inner: Inner = "inductor",
    impl: str = "auto",
    fullgraph: bool | None = None,
    dynamic: bool | None = False,
    inductor_options: Mapping[str, Any] | None = None,
    guard: Guard | None = None,
) -> Model:
    """Compile ``model`` in place with the plan's sparse attention; weights and class do not change.

    Compilation happens at the first call. A planned site that cannot be rewritten then raises, as
    ``torch._dynamo.exc.BackendCompilerFailed`` with the :class:`PlanMismatchError` in
    ``inner_exception``.

    Args:
        model: the denoiser.
        plan: made for this model by ``make_plan``.
        inner: what compiles the rewritten graph; see :class:`evdit_opt.backend.Options`.
        impl: implementation of the sparse attention.
        fullgraph: insist on one graph; None: as in calibration, and in parts once that fails.
        dynamic: as in ``torch.compile``; False compiles once for every resolution and frame count.
        inductor_options: passed on to Inductor.
        guard: compare with dense attention now and then, and warn once if the plan no longer fits.

    Returns:
        The same model.

    Raises:
        AlreadyOptimizedError: if a plan is applied already.
        PlanMismatchError: if the plan is for another class, or names modules the model lacks, or
            is for fine-tuned weights that are not there.
        UnsupportedInputError: if the model is compiled already in a way that cannot be combined.
        PlanError: if there is a guard, and the plan knows no errors to guard by.
    """
    _require_plain(model)
    if is_optimized(model):
        raise AlreadyOptimizedError(
            f"expected a {type(model).__name__} without a plan, this one has one; call "
            "evdit_opt.restore(model) first"
        )
    if plan.model_class != type(model).__name__:
        raise PlanMismatchError(
            f"expected a {plan.model_class}, got a {type(model).__name__}; load the plan of this "
            "model or make one with evdit_opt.make_plan"
        )
    if plan.finetune is not None:
        require_changed(model, plan.finetune)
    whole = plan.fullgraph if fullgraph is None else fullgraph
    if not whole:
        require_no_compiled_parts(model)
    scoped = _specs(plan, "scope")
    if whole and scoped:
        raise UnsupportedInputError(
            f"expected fullgraph=False, got True with a plan that reaches {next(iter(scoped))} in "
            "a scope, which ends Dynamo's graph; leave fullgraph out"
        )
    expected = {} if guard is None else expected_errors(plan)
    options = Options(inner=inner, inductor=inductor_options or {}, impl=impl)
    marks = add_marks(model, _specs(plan, "mark"), plan.grid_source if plan.rules else None)
    applied = Applied(
        **vars(marks),
        plan=plan,
        inner=options.inner_name,
        impl=impl,
        previous_call=vars(model).get("_compiled_call_impl"),
    )
    attend = SparseAttend(impl, applied.compiled)
    add_scopes(model, applied, scoped, attend)
    model._evdit = applied  # type: ignore[assignment]
    call: Callable[..., Any] = Running(
        model,
        _Backend(model, options),
        applied,
        attend,
        fullgraph=whole,
        may_split=fullgraph is None,
        dynamic=dynamic,
    )
    if guard is not None:
        modules = dict(model.named_modules())
        guarded: Any = {name: modules[name]._evdit_site for name in expected}
        call = Guarding(call, guard, expected, guarded, applied.live)
    if plan.reuse is not None:
        call = _reusing(model, call, plan, applied)
    # A compile of the user's around this one must not trace it: marks are for our backend only.
    model._compiled_call_impl = torch.compiler.disable(
        functools.partial(call), reason="evdit_opt compiles this model itself"
    )
    return model


def restore(model: Model) -> Model:
    """Undo :func:`apply_plan`: no hook, attribute or compiled code stays, results are exact again.

    Raises:
        PlanMismatchError: if no plan is applied.
    """
    applied = _applied(model)
    applied.remove()
    restore_call(model, applied.previous_call)
    del model._evdit
    return model


def is_optimized(model: nn.Module) -> bool:
    """True if a plan is applied to ``model``."""
    return hasattr(model, "_evdit")


def report(model: nn.Module) -> Report:
    """What the compiles so far did to each site; the latest one counts where shapes differ.

    Raises:
        PlanMismatchError: if no plan is applied.
    """
    applied = _applied(model)
    assert applied.plan is not None
    sites = []
    shared = {outcome.spec: outcome for outcome in applied.compiled.values()}
    for site in applied.plan.sites:
        if site.rule is None:
            sites.append(SiteOutcome(site.name, None, 1.0, site.reason))
            continue
        why = _not_compiled(applied.graphs)
        waiting = SiteOutcome(site.name, site.rule, 1.0, why, second=site.second)
        like = shared.get(_spec(site, applied.plan), waiting)
        sites.append(replace(applied.compiled.get(site.name, like), name=site.name))
    choices = autotune.choices() if applied.impl == "auto" else ()
    return Report(
        tuple(sites),
        applied.graphs,
        applied.inner,
        applied.impl,
        tuple(choice.describe() for choice in choices),
        applied.outside,
        0 if applied.reusing is None else applied.reusing.residual_bytes,
    )


class _Backend:
    """What Dynamo calls with every graph of an optimized model."""

    def __init__(self, model: nn.Module, options: Options) -> None:
        self.model = weakref.ref(model)
        self.options = options

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        model = self.model()
        assert model is not None, "a model cannot compile after it is gone"
        names = {id(module): name for name, module in model.named_modules()}
        applied = _applied(model)
        sharing: dict[str, str] = {}
        for module in applied.sites:
            site: Any = module._evdit_site
            known = sharing.get(site.spec)
            sharing[site.spec] = f"{known}, {site.name}" if known else site.name
        compiled, done = compile_graph(gm, example_inputs, self.options, names, sharing)
        applied.graphs += 1
        applied.compiled.update({site.name: site for site in done.sites})
        return compiled


def _reusing(
    model: nn.Module, call: Callable[..., Any], plan: Plan, applied: Applied
) -> Callable[..., Any]:
    assert plan.reuse is not None
    if plan.reuse.timestep not in applied.parameters:
        applied.remove()
        del model._evdit
        raise PlanMismatchError(
            f"expected {plan.model_class}.forward to take {plan.reuse.timestep!r}, the noise level "
            f"by which the plan reuses residuals; it takes {', '.join(applied.parameters)}"
        )
    modules = dict(model.named_modules())
    for name in plan.reuse.sites:
        modules[name]._evdit_site.reuses = True  # type: ignore[union-attr]
    sites = {name: modules[name] for name in plan.reuse.sites}
    source = plan.grid_source
    applied.reusing = Reusing(
        call, plan.reuse, source.input, applied.parameters, applied.live, sites
    )
    return applied.reusing


def _specs(plan: Plan, way: Way) -> dict[str, str]:
    return {
        site.name: _spec(site, plan)
        for site in plan.sites
        if site.rule is not None and site.way == way
    }


def _spec(site: SitePlan, plan: Plan) -> str:
    return site_spec(site, plan.min_tokens).encode()


def _applied(model: nn.Module) -> Applied:
    applied: Any = getattr(model, "_evdit", None)
    if not isinstance(applied, Applied):
        raise PlanMismatchError(
            f"expected a {type(model).__name__} with a plan applied, got one without; call "
            "evdit_opt.apply_plan(model, plan) first"
        )
    return applied


def _require_plain(model: object) -> None:
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise UnsupportedInputError(
            "expected the model itself, got what torch.compile made of it; pass the original "
            "module (model._orig_mod), apply_plan compiles it"
        )
    if not isinstance(model, nn.Module):
        raise UnsupportedInputError(f"expected a torch.nn.Module, got {type(model).__name__}")


def _not_compiled(graphs: int) -> str:
    return "not reached yet" if graphs else "not compiled yet: call the model once"
