"""Run whole plans, and compare what comes out with the dense runs.

Errors at single sites cannot choose between weightings: per-site squared error prefers masks whose
video flickers (docs/notes/weighting.md). So plans of equal density are run end to end, and judged
by an error that sees time.
"""

from collections.abc import Sequence
from functools import partial

import torch

from evdit_opt.apply import apply_plan, restore
from evdit_opt.calibrate.kept import Kept
from evdit_opt.calibrate.stage import Stage
from evdit_opt.config import Config
from evdit_opt.models import Denoiser, Item
from evdit_opt.plan import Plan, TrialRecord
from evdit_opt.quality import MAX_PSNR, psnr

__all__ = ["compare_runs", "mean_error", "run_with_plan", "try_plan"]


def try_plan(
    stage: Stage,
    name: str,
    plan: Plan,
    items: Sequence[Item],
    dense: Sequence[torch.Tensor],
    config: Config,
) -> TrialRecord:
    """Run a plan on ``items``; compare with the ``dense`` results of the same seeds.

    ``dense`` may hold more runs.
    """
    sparse = stage.rehearse(plan, items, config.seed, config.calib_steps, config.repeatable_impl)
    return compare_runs(name, plan, sparse, dense)


def compare_runs(
    name: str, plan: Plan, sparse: Sequence[torch.Tensor], dense: Sequence[torch.Tensor]
) -> TrialRecord:
    """What a plan did to runs: videos, or outputs of a module; ``dense`` may hold more."""
    pairs = [
        (_frames_first(s, plan).diff(dim=0), _frames_first(d, plan).diff(dim=0))
        for s, d in zip(sparse, dense, strict=False)
    ]
    return TrialRecord(
        name=name,
        density=plan.density,
        output=mean_error(sparse, dense),
        temporal=sum(_relative(s, d) for s, d in pairs) / len(pairs),
        psnr=_mean_psnr(sparse, dense) if _are_videos(sparse) else None,
    )


def run_with_plan(
    denoiser: Denoiser,
    plan: Plan,
    items: Sequence[Item],
    config: Config,
    first: int = 0,
    kept: Kept | None = None,
) -> list[torch.Tensor]:
    """Run items with seeds ``config.seed + first`` and on, under ``plan``; dense again afterwards.

    What is in ``kept`` already is not run again. The rewritten graph is not compiled further: too
    few steps run here to pay for that.
    """
    apply_plan(denoiser.model, plan, inner="eager", impl=config.repeatable_impl)
    try:
        kept, name = kept or Kept(), f"verified-{plan.fingerprint()[:32]}"
        return [
            kept.run(f"{name}-{seed}", partial(denoiser.run, item, seed, config.calib_steps))
            for seed, item in enumerate(items, config.seed + first)
        ]
    finally:
        restore(denoiser.model)


def mean_error(sparse: Sequence[torch.Tensor], dense: Sequence[torch.Tensor]) -> float:
    """Mean over runs of ``||sparse - dense|| / ||dense||``; ``dense`` may hold more runs."""
    return sum(_relative(s, d) for s, d in zip(sparse, dense, strict=False)) / len(sparse)


def _are_videos(results: Sequence[torch.Tensor]) -> bool:
    return results[0].ndim == 4 and results[0].shape[-1] == 3


def _mean_psnr(sparse: Sequence[torch.Tensor], dense: Sequence[torch.Tensor]) -> float:
    return sum(min(psnr(s, d), MAX_PSNR) for s, d in zip(sparse, dense, strict=False)) / len(sparse)


def _frames_first(result: torch.Tensor, plan: Plan) -> torch.Tensor:
    """A video ``[frames, height, width, 3]`` as it is; a model's output with frames moved first."""
    if result.ndim == 4:
        return result
    if result.ndim == 5:
        return result.movedim(plan.grid_source.dims[0], 0)
    return result.unflatten(1, (plan.grid.frames, plan.grid.tokens_per_frame)).movedim(1, 0)


def _relative(candidate: torch.Tensor, reference: torch.Tensor) -> float:
    candidate, reference = candidate.float(), reference.float()
    return float((candidate - reference).norm() / reference.norm().clamp_min(1e-12))
