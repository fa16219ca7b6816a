"""``torch.export`` of a model with a plan."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import UserError
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from evdit_opt import api, apply
from evdit_opt.errors import AlreadyOptimizedError, PlanMismatchError, UnsupportedInputError
from evdit_opt.export.residuals import (
    RESIDUALS,
    add_residuals,
    return_residuals,
    take_residuals,
)
from evdit_opt.export.standard_ops import use_standard_ops
from evdit_opt.models import denoiser_of
from evdit_opt.passes.canonicalize_attention import canonicalize_attention
from evdit_opt.passes.capture import uncompiled
from evdit_opt.passes.graph import SDPA, subgraphs
from evdit_opt.passes.marks import LiveGrid
from evdit_opt.passes.stand_in import settle
from evdit_opt.passes.swap_attention import swap_attention
from evdit_opt.plan import Plan, ReuseRecord

__all__ = ["ATEN_SDPA", "export_program"]

logger = logging.getLogger(__name__)

ATEN_SDPA = torch.ops.aten.scaled_dot_product_attention.default


def export_program(
    target: object,
    kwargs: Mapping[str, Any],
    plan: Plan | None = None,
    *,
    mode: str | None = None,
    standard_ops: bool = False,
    impl: str = "auto",
) -> ExportedProgram:
    """Export a denoiser with the sparse attention of its plan, at the shapes of one call.

    The model is traced with its site marks, the passes of the "evdit" backend rewrite the sites,
    and the rewritten graph is exported. The model is left as it was.

    A plan with residual reuse takes a program per mode of its steps. That of "refresh" returns
    ``(output, residuals)``, that of "reuse" takes the argument ``residuals`` besides; they are
    tensors of the model's dtype by the name of their site, ``[batch, heads, seq, head_dim]``.
    Carrying them on, and rounding them, is up to who keeps them (docs/export.md).

    Args:
        target: a diffusers video pipeline, or an ``nn.Module``; with a plan applied, or plain.
        kwargs: arguments of one forward of the denoiser. Shapes and numbers become constants.
        plan: made for this model by ``make_plan``; None: the one that is applied.
        mode: "refresh", "reuse" or "dense" for a plan with residual reuse, None for any other.
        standard_ops: False: every planned site is one ``evdit.tile_attention``, and who loads the
            program imports ``evdit_opt.kernels.ops`` first. True: ATen operators only.
        impl: implementation of the operator; as applied, where a plan is.

    Raises:
        PlanMismatchError: if there is no plan, or it is of another model, leaves every site dense,
            or has no such mode; also naming the planned sites that were not rewritten.
        AlreadyOptimizedError: if another plan is applied.
        UnsupportedInputError: if ``torch.export`` cannot trace the model: it branches on data, or
            with standard operators, the length of its text is known only when it runs.
        LayoutError: if the call does not fit the layout of the plan.
    """
    model = denoiser_of(target)
    kind = type(model).__name__
    with _applied(model, plan, impl) as applied, _mode(model, applied, mode, kwargs):
        gm = _trace(model, kwargs, kind).module()
        assert isinstance(gm, fx.GraphModule)
        in_graphs, residuals = _rewrite(gm, apply.report(model).impl)
        in_scopes = {site.name: site.reason for site in apply.report(model).sites}
        reasons = {name: in_graphs.get(name, in_scopes[name]) for name in applied.rules}
    dense = {name: reason for name, reason in reasons.items() if reason and mode != "dense"}
    if dense:
        listed = "; ".join(f"{name}: {reason}" for name, reason in dense.items())
        raise PlanMismatchError(
            f"expected to rewrite every planned site, {len(dense)} stay dense: {listed}. Export at "
            "other sizes, or set the rules of these sites to null in the plan"
        )
    if mode == "refresh":
        gm = return_residuals(gm, residuals)
    elif mode == "reuse":
        empty = {name: _empty(place) for name, place in residuals.items()}
        gm, kwargs = take_residuals(gm, residuals), {**kwargs, RESIDUALS: empty}
    if standard_ops:
        use_standard_ops(gm)
    logger.info("exporting %s with %d planned sites, mode %s", kind, len(reasons), mode)
    return _trace(gm, kwargs, kind)


@contextmanager
def _applied(model: nn.Module, plan: Plan | None, impl: str) -> Iterator[Plan]:
    """The plan of a model, applied for a while if it is not."""
    if apply.is_optimized(model):
        there: Plan = model._evdit.plan  # type: ignore[union-attr, assignment]
        if plan is not None and plan.fingerprint() != there.fingerprint():
            raise AlreadyOptimizedError(
                f"expected a {type(model).__name__} without a plan or with the one given, another "
                "is applied; call evdit_opt.restore(model) first"
            )
        _require_exportable(there)
        yield there
        return
    if plan is None:
        raise PlanMismatchError(
            f"expected a plan or a {type(model).__name__} with one applied, got neither; make one "
            "with evdit_opt.make_plan, or use torch.export.export for the dense model"
        )
    _require_exportable(plan)
    api.apply_plan(model, plan, inner="eager", impl=impl)
    try:
        yield plan
    finally:
        apply.restore(model)


def _require_exportable(plan: Plan) -> None:
    if not plan.rules:
        raise PlanMismatchError(
            f"expected a plan with a rule, this one leaves all {len(plan.sites)} sites dense; use "
            "torch.export.export for the dense model, or make a plan with another threshold"
        )


@contextmanager
def _mode(
    model: nn.Module, plan: Plan, mode: str | None, kwargs: Mapping[str, Any]
) -> Iterator[None]:
    """Let the sites of a model do for a while what a step of that mode asks of them."""
    known = (None,) if plan.reuse is None else ("refresh", "reuse", "dense")
    if mode not in known:
        raise PlanMismatchError(
            f"expected mode to be one of {known} for a plan "
            f"{'without' if plan.reuse is None else 'with'} residual reuse, got {mode!r}; every "
            "mode is a program of its own, see docs/export.md"
        )
    if plan.reuse is not None:
        _require_steps(plan, plan.reuse, kwargs)
    live: LiveGrid = model._evdit.live  # type: ignore[union-attr, assignment]
    live.mode = mode or "sparse"
    try:
        yield
    finally:
        live.mode = "sparse"


def _require_steps(plan: Plan, record: ReuseRecord, kwargs: Mapping[str, Any]) -> None:
    if not isinstance(kwargs.get(record.timestep), Tensor):
        raise UnsupportedInputError(
            f"expected a tensor as {record.timestep!r}, which differs from step to step, got "
            f"{kwargs.get(record.timestep)!r}, which would become part of the program"
        )
    for site in plan.sites:
        if site.way == "scope" and site.name in record.sites:
            raise PlanMismatchError(
                f"expected sites that a mark reaches, {site.name} is reached in a scope, whose "
                "residual no graph holds; take the site out of the plan's reuse"
            )


def _empty(place: fx.Node) -> Tensor:
    like: Tensor = place.meta["val"]
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


def _trace(model: nn.Module, kwargs: Mapping[str, Any], kind: str) -> ExportedProgram:
    try:
        with uncompiled(model), torch.no_grad():
            return torch.export.export(model, (), dict(kwargs), strict=False)
    except (UserError, GuardOnDataDependentSymNode) as error:
        raise UnsupportedInputError(
            f"expected a {kind} that torch.export can trace as a whole, it cannot: "
            f"{str(error).splitlines()[0]}. Use evdit_opt.apply_plan, which compiles it in parts"
        ) from error


def _rewrite(gm: fx.GraphModule, impl: str) -> tuple[dict[str, str], dict[str, fx.Node]]:
    """Run the passes on an exported graph.

    Returns:
        For every site it marks, why it is dense, or ""; the new inputs for residuals by site.
    """
    for body in subgraphs(gm):
        for node in body.graph.nodes:
            # The passes know Dynamo's graphs: the same but for these two names.
            if "val" in node.meta:
                node.meta["example_value"] = node.meta["val"]
            if node.target is ATEN_SDPA:
                node.target = SDPA
    stand_ins = canonicalize_attention(gm)
    residuals = add_residuals(gm)
    outcomes = swap_attention(gm, None, impl)
    settle(stand_ins)
    for body in subgraphs(gm):
        body.graph.lint()
        body.recompile()
    # "@1" at the second call of a module
    return {outcome.name.split("@")[0]: outcome.reason for outcome in outcomes}, residuals
