"""``torch.export`` of a model with a plan."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.exc import UserError
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from evdit_opt import api, apply
from evdit_opt.errors import AlreadyOptimizedError, PlanMismatchError, UnsupportedInputError
from evdit_opt.export.standard_ops import use_standard_ops
from evdit_opt.models import denoiser_of
from evdit_opt.passes.canonicalize_attention import canonicalize_attention
from evdit_opt.passes.capture import uncompiled
from evdit_opt.passes.graph import SDPA, subgraphs
from evdit_opt.passes.stand_in import settle
from evdit_opt.passes.swap_attention import swap_attention
from evdit_opt.plan import Plan

__all__ = ["ATEN_SDPA", "export_program"]

logger = logging.getLogger(__name__)

ATEN_SDPA = torch.ops.aten.scaled_dot_product_attention.default


def export_program(
    target: object,
    kwargs: Mapping[str, Any],
    plan: Plan | None = None,
    *,
    standard_ops: bool = False,
    impl: str = "auto",
) -> ExportedProgram:
    """Export a denoiser with the sparse attention of its plan, at the shapes of one call.

    The model is traced with its site marks, the passes of the "evdit" backend rewrite the sites,
    and the rewritten graph is exported. The model is left as it was.

    Args:
        target: a diffusers video pipeline, or an ``nn.Module``; with a plan applied, or plain.
        kwargs: arguments of one forward of the denoiser. Shapes and numbers become constants.
        plan: made for this model by ``make_plan``; None: the one that is applied.
        standard_ops: False: every planned site is one ``evdit.tile_attention``, and who loads the
            program imports ``evdit_opt.kernels.ops`` first. True: ATen operators only.
        impl: implementation of the operator; as applied, where a plan is.

    Raises:
        PlanMismatchError: if there is no plan, or it is of another model, leaves every site dense,
            or reuses residuals; also naming the planned sites that were not rewritten.
        AlreadyOptimizedError: if another plan is applied.
        UnsupportedInputError: if ``torch.export`` cannot trace the model: it branches on data, or
            with standard operators, the length of its text is known only when it runs.
        LayoutError: if the call does not fit the layout of the plan.
    """
    model = denoiser_of(target)
    kind = type(model).__name__
    with _applied(model, plan, impl) as applied:
        gm = _trace(model, kwargs, kind).module()
        assert isinstance(gm, fx.GraphModule)
        in_graphs = _rewrite(gm, apply.report(model).impl)
        in_scopes = {site.name: site.reason for site in apply.report(model).sites}
        reasons = {name: in_graphs.get(name, in_scopes[name]) for name in applied.rules}
    dense = {name: reason for name, reason in reasons.items() if reason}
    if dense:
        listed = "; ".join(f"{name}: {reason}" for name, reason in dense.items())
        raise PlanMismatchError(
            f"expected to rewrite every planned site, {len(dense)} stay dense: {listed}. Export at "
            "other sizes, or set the rules of these sites to null in the plan"
        )
    if standard_ops:
        use_standard_ops(gm)
    logger.info("exporting %s with %d sparse sites", kind, len(reasons))
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
    if plan.reuse is not None:
        raise PlanMismatchError(
            "expected a plan without residual reuse, which keeps tensors from step to step outside "
            "of the graph; make one with Config(reuse=False)"
        )


def _trace(model: nn.Module, kwargs: Mapping[str, Any], kind: str) -> ExportedProgram:
    try:
        with uncompiled(model), torch.no_grad():
            return torch.export.export(model, (), dict(kwargs), strict=False)
    except (UserError, GuardOnDataDependentSymNode) as error:
        raise UnsupportedInputError(
            f"expected a {kind} that torch.export can trace as a whole, it cannot: "
            f"{str(error).splitlines()[0]}. Use evdit_opt.apply_plan, which compiles it in parts"
        ) from error


def _rewrite(gm: fx.GraphModule, impl: str) -> dict[str, str]:
    """Run the passes on an exported graph; for every site it marks, why it is dense, or ""."""
    for body in subgraphs(gm):
        for node in body.graph.nodes:
            # The passes know Dynamo's graphs: the same but for these two names.
            if "val" in node.meta:
                node.meta["example_value"] = node.meta["val"]
            if node.target is ATEN_SDPA:
                node.target = SDPA
    stand_ins = canonicalize_attention(gm)
    outcomes = swap_attention(gm, None, impl)
    settle(stand_ins)
    for body in subgraphs(gm):
        body.graph.lint()
        body.recompile()
    # "@1" at the second call of a module
    return {outcome.name.split("@")[0]: outcome.reason for outcome in outcomes}
