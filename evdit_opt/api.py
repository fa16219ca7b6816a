"""The public functions: optimize = make_plan + apply_plan; restore takes it back."""

import logging
from collections.abc import Iterable
from typing import Any, TypeVar

from evdit_opt import apply
from evdit_opt.calibrate.make import make_plan
from evdit_opt.config import Config
from evdit_opt.models import Item, config_hash, denoiser_of
from evdit_opt.plan import Plan

__all__ = ["apply_plan", "make_plan", "optimize", "restore"]

logger = logging.getLogger(__name__)

Target = TypeVar("Target")  # a diffusers pipeline or an nn.Module


def optimize(target: Target, calib: Iterable[Item], config: Config | None = None) -> Target:
    """Calibrate a video model and replace its 3D attention by tile-sparse attention, in place.

    ``make_plan`` followed by ``apply_plan``; the first forward afterwards compiles.

    Args:
        target: a diffusers video pipeline, or an ``nn.Module``.
        calib: a few prompts like those to come (pipeline), or dicts of forward kwargs (module).
        config: settings; ``Config()`` if None.

    Returns:
        ``target`` itself. Where no site can be sparse it stays as it was, and a warning says why.

    Raises:
        EvditError: as ``make_plan`` and ``apply_plan``.
    """
    config = config or Config()
    plan = make_plan(target, calib, config)
    if plan.rules:
        return apply_plan(target, plan, inner=config.inner, impl=config.impl)
    reasons = sorted({site.reason for site in plan.sites})
    logger.warning("evdit left %s dense: %s", plan.model_class, "; ".join(reasons))
    return target


def apply_plan(target: Target, plan: Plan, **options: Any) -> Target:
    """Apply a plan to a pipeline's denoiser or to a module, in place; see ``apply.apply_plan``.

    Args:
        target: a diffusers video pipeline, or an ``nn.Module``.
        plan: made for this model by ``make_plan``, or loaded.
        options: ``inner`` ("inductor", "eager", ...), ``impl``, ``fullgraph``, ``dynamic``.

    Returns:
        ``target`` itself; the first forward compiles.

    Raises:
        AlreadyOptimizedError: if a plan is applied already.
        PlanMismatchError: if the plan is of another model.
        UnsupportedInputError: if target is neither pipeline nor module.
    """
    model = denoiser_of(target)
    planned = [site.name for site in plan.sites]
    # The class alone would let the plan of a small Wan leave the last layers of a large one dense.
    plan.require_match(type(model).__name__, planned, config_hash(model))
    if not plan.rules:
        logger.warning("this plan leaves every site dense; %s is compiled dense", plan.model_class)
    apply.apply_plan(model, plan, **options)
    return target


def restore(target: Target) -> Target:
    """Undo ``apply_plan`` or ``optimize``: the model is dense again, and bit-exactly as before."""
    apply.restore(denoiser_of(target))
    return target
