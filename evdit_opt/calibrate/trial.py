"""Run whole plans, and compare what comes out with the dense runs.

Errors at single sites cannot choose between weightings: per-site squared error prefers masks whose
video flickers (docs/notes/weighting.md). So plans of equal density are run end to end, and judged
by an error that sees time.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch

from evdit_opt.apply import apply_plan, restore
from evdit_opt.calibrate.kept import Kept
from evdit_opt.calibrate.stage import Stage
from evdit_opt.config import Config
from evdit_opt.models import Denoiser, Item
from evdit_opt.plan import Plan, TrialRecord
from evdit_opt.progress import track
from evdit_opt.quality import MAX_PSNR, psnr

__all__ = ["compare_runs", "mean_error", "rehearse_and_keep", "run_with_plan", "try_plan"]


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
    figures = [  # kept as figures, not as clips: many plans are tried
        stage.kept.run(
            _name("tried", plan, config, n),
            partial(_try_one, stage, plan, item, dense[n], config, n),
        )
        for n, item in enumerate(items)
    ]
    return _record(name, plan, figures)


def rehearse_and_keep(
    stage: Stage, plan: Plan, items: Sequence[Item], config: Config
) -> list[torch.Tensor]:
    """Runs of the first items under a plan; what is kept already is not run again."""
    return [
        stage.kept.run(_name("clip", plan, config, n), partial(_run, stage, plan, item, config, n))
        for n, item in enumerate(items)
    ]


def _try_one(
    stage: Stage, plan: Plan, item: Item, dense: torch.Tensor, config: Config, n: int
) -> torch.Tensor:
    return _figures(plan, _run(stage, plan, item, config, n), dense)


def _run(stage: Stage, plan: Plan, item: Item, config: Config, n: int) -> torch.Tensor:
    """Item n under a plan, on stage."""
    impl = config.repeatable_impl
    return stage.rehearse(plan, [item], config.seed + n, config.calib_steps, impl)[0]


def compare_runs(
    name: str, plan: Plan, sparse: Sequence[torch.Tensor], dense: Sequence[torch.Tensor]
) -> TrialRecord:
    """What a plan did to runs: videos, or outputs of a module; ``dense`` may hold more."""
    figures = [_figures(plan, s, d) for s, d in zip(sparse, dense, strict=False)]
    return _record(name, plan, figures)


def _name(what: str, plan: Plan, config: Config, item: int) -> str:
    return f"{what}-{plan.fingerprint()[:32]}-{config.repeatable_impl}-{item}"


def _figures(plan: Plan, sparse: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """Of one run: relative error, that of its change in time, PSNR (NaN if it is no video)."""
    changes = [_frames_first(run, plan).diff(dim=0) for run in (sparse, dense)]
    is_video = sparse.ndim == 4 and sparse.shape[-1] == 3
    quality = min(psnr(sparse, dense), MAX_PSNR) if is_video else math.nan
    found = [_relative(sparse, dense), _relative(*changes), quality]
    return torch.tensor(found, dtype=torch.float64)


def _record(name: str, plan: Plan, figures: Sequence[torch.Tensor]) -> TrialRecord:
    output, temporal, quality = torch.stack(list(figures)).mean(0).tolist()
    return TrialRecord(
        name=name,
        density=plan.density,
        output=output,
        temporal=temporal,
        psnr=None if math.isnan(quality) else quality,
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
            for seed, item in enumerate(
                track(items, "verifying", config.progress), config.seed + first
            )
        ]
    finally:
        restore(denoiser.model)


def mean_error(sparse: Sequence[torch.Tensor], dense: Sequence[torch.Tensor]) -> float:
    """Mean over runs of ``||sparse - dense|| / ||dense||``; ``dense`` may hold more runs."""
    return sum(_relative(s, d) for s, d in zip(sparse, dense, strict=False)) / len(sparse)


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
