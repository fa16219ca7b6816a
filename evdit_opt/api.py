"""The public functions: optimize = make_plan + apply_plan; restore takes it back."""

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from evdit_opt import apply
from evdit_opt.calibrate.make import make_plan
from evdit_opt.config import Config
from evdit_opt.errors import DistillationError
from evdit_opt.guard import Guard
from evdit_opt.models import Item, config_hash, denoiser_of
from evdit_opt.plan import Plan

if TYPE_CHECKING:
    from evdit_opt.distill.config import FinetuneConfig

__all__ = ["apply_plan", "make_plan", "optimize", "restore"]

logger = logging.getLogger(__name__)

Target = TypeVar("Target")  # a diffusers pipeline or an nn.Module


def optimize(
    target: Target,
    calib: Iterable[Item],
    config: Config | None = None,
    *,
    steps: int | None = None,
    finetune: "FinetuneConfig | None" = None,
    guard: Guard | None = None,
) -> Target:
    """Calibrate a video model and replace its 3D attention by tile-sparse attention, in place.

    ``make_plan`` followed by ``apply_plan``; the first forward afterwards compiles. With
    ``finetune`` the model is first taught to need few steps, and then to live with the plan: its
    weights and scheduler change, ``finetune.folder / "result"`` keeps them, and it is then called
    with ``guidance_scale=1``.

    Args:
        target: a diffusers video pipeline, or an ``nn.Module``.
        calib: a few prompts like those to come (pipeline), or dicts of forward kwargs (module).
        config: settings; ``Config()`` if None.
        steps: of the fine-tuned pipeline; only with ``finetune``.
        finetune: how to train; None: weights do not change.
        guard: compare with dense attention now and then, and warn once if the plan no longer fits.

    Returns:
        ``target`` itself. Where no site can be sparse it stays as it was, and a warning says why.

    Raises:
        EvditError: as ``make_plan``, ``apply_plan`` and ``evdit_opt.distill.pipeline.finetune``.
    """
    config = config or Config()
    if (steps is None) != (finetune is None):
        raise DistillationError(
            f"expected steps and finetune together, got steps={steps} and finetune={finetune}; "
            "without training use FewStepScheduler"
        )
    plan: Plan | None
    if finetune is None or steps is None:
        plan = make_plan(target, calib, config)
    else:
        from evdit_opt.distill.pipeline import finetune as train

        plan = train(target, calib, finetune, steps=steps, search=config)
        if plan is None:
            return target
    if plan.rules:
        return apply_plan(target, plan, inner=config.inner, impl=config.impl, guard=guard)
    reasons = sorted({site.reason for site in plan.sites})
    logger.warning("evdit left %s dense: %s", plan.model_class, "; ".join(reasons))
    return target


def apply_plan(target: Target, plan: Plan, **options: Any) -> Target:
    """Apply a plan to a pipeline's denoiser or to a module, in place; see ``apply.apply_plan``.

    A pipeline whose plan is for fine-tuned weights also gets the few-step scheduler they are for.
    The weights themselves come from ``evdit_opt.distill.saved.restore_finetuned``; load them first.

    Args:
        target: a diffusers video pipeline, or an ``nn.Module``.
        plan: made for this model by ``make_plan``, or loaded.
        options: ``inner`` ("inductor", "eager", ...), ``inductor_options``, ``impl``,
            ``fullgraph``, ``dynamic``, ``guard`` (see ``evdit_opt.guard.Guard``).

    Returns:
        ``target`` itself; the first forward compiles.

    Raises:
        AlreadyOptimizedError: if a plan is applied already.
        PlanMismatchError: if the plan is of another model, or for fine-tuned weights that are not
            there.
        UnsupportedInputError: if target is neither pipeline nor module.
    """
    model = denoiser_of(target)
    planned = [site.name for site in plan.sites]
    # The class alone would let the plan of a small Wan leave the last layers of a large one dense.
    plan.require_match(type(model).__name__, planned, config_hash(model))
    if not plan.rules:
        logger.warning("this plan leaves every site dense; %s is compiled dense", plan.model_class)
    few = None
    if plan.finetune is not None and model is not target:
        few = plan.finetune.scheduler(target.scheduler)  # type: ignore[attr-defined]
    apply.apply_plan(model, plan, **options)
    if few is not None:
        target.scheduler = few  # type: ignore[attr-defined]
    return target


def restore(target: Target) -> Target:
    """Undo ``apply_plan`` or ``optimize``: the model is dense again, and bit-exactly as before."""
    apply.restore(denoiser_of(target))
    return target
