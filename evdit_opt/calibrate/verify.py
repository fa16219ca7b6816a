"""How good a plan is on given prompts: whole runs, paired with dense ones of the same seeds."""

import os
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from evdit_opt.calibrate.kept import Kept, purpose
from evdit_opt.calibrate.trial import mean_error, run_with_plan
from evdit_opt.config import Config
from evdit_opt.errors import PlanMismatchError
from evdit_opt.grid import VideoGrid
from evdit_opt.models import Item, as_denoiser, config_hash, first_call
from evdit_opt.passes.video_input import bind_arguments
from evdit_opt.plan import Plan
from evdit_opt.progress import track
from evdit_opt.quality import compare

__all__ = ["called_grid", "verify_plan"]

RECORDING = "how good a plan is"


def called_grid(target: object, items: Iterable[Item], config: Config, plan: Plan) -> VideoGrid:
    """The latent grid of a model's first call, read as the plan reads it.

    Args:
        target: a diffusers video pipeline, or an ``nn.Module``.
        items: prompts, or calls; the first is begun.
        config: ``pipe_kwargs`` counts; what is not in it is as in calibration.
        plan: of this model.

    Raises:
        PlanMismatchError: if the plan is of another model.
        LayoutError: if the call does not tell.
    """
    denoiser = as_denoiser(target, items, _call(config, plan))
    sites = [site.name for site in plan.sites]
    plan.require_match(type(denoiser.model).__name__, sites, config_hash(denoiser.model))
    args, kwargs = first_call(denoiser)
    return plan.grid_source.read(bind_arguments(denoiser.model, args, kwargs))


def verify_plan(
    target: object,
    items: Iterable[Item],
    config: Config,
    plan: Plan,
    *,
    keep_in: str | os.PathLike[str] | None = None,
) -> Plan:
    """The plan with the quality that it has on these items; the model is left dense.

    Args:
        target: a diffusers video pipeline, or an ``nn.Module``.
        items: prompts, or calls; best none that the plan was calibrated on.
        config: ``calib_steps``, ``seed``, ``impl``, ``progress`` and ``pipe_kwargs`` count; what is
            not in the last, such as guidance_scale, is as in calibration (see
            ``CalibrationRecord.call``).
        plan: of this model, at the grid of these calls.
        keep_in: a folder for finished runs, as ``make_plan`` has it.

    Raises:
        CalibrationError: if ``keep_in`` holds other work.
        PlanMismatchError: if it is of another model, or at another grid, or for fine-tuned weights
            where the pipeline does not sample as they do.
    """
    items = tuple(items)
    _require_schedule(target, plan)
    config = replace(config, pipe_kwargs=_call(config, plan))
    grid = called_grid(target, items, config, plan)
    if grid != plan.grid:
        raise PlanMismatchError(
            f"expected calls at the plan's grid {plan.grid}, got {grid}; retarget the plan"
        )
    denoiser = as_denoiser(target, items, config.pipe_kwargs)
    kept = Kept()
    if keep_in is not None:
        kept = Kept(Path(keep_in), purpose(target, denoiser, config, RECORDING))
    dense = [
        kept.run(f"dense-{n}", partial(denoiser.run, item, config.seed + n, config.calib_steps))
        for n, item in enumerate(track(items, "dense", config.progress))
    ]
    sparse = run_with_plan(denoiser, plan, items, config, kept=kept)
    found = replace(plan.calibration, held_out_error=mean_error(sparse, dense))
    quality = compare(sparse, dense) if denoiser.makes_video else None
    return replace(plan, calibration=found, quality=quality)


def _require_schedule(target: object, plan: Plan) -> None:
    if plan.finetune is None or isinstance(target, nn.Module):
        return
    from evdit_opt.scheduler import FewStepScheduler  # which needs diffusers

    scheduler = getattr(target, "scheduler", None)
    few = scheduler if isinstance(scheduler, FewStepScheduler) else None
    if few is None or few.config.steps != plan.finetune.steps:
        raise PlanMismatchError(
            f"expected the fine-tuned pipeline that this plan is for, of {plan.finetune.steps} "
            f"steps, got one that samples by {type(scheduler).__name__}; run it on what "
            "evdit_opt.distill.saved.restore_finetuned makes (and evdit_opt.restore then)"
        )


def _call(config: Config, plan: Plan) -> dict[str, Any]:
    """Arguments of a pipeline: those given, the others as in calibration."""
    return {**plan.calibration.arguments, **config.pipe_kwargs}
