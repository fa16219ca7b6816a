"""Run the dense model on calibration items and measure every candidate on what each site sees."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from evdit_opt.calibrate.candidates import candidate_rules, reused_rules
from evdit_opt.calibrate.site_record import CandidateError, ReuseError, SiteRecord
from evdit_opt.calibrate.stage import Stage
from evdit_opt.calibrate.steps import Steps
from evdit_opt.config import Config
from evdit_opt.errors import CalibrationError
from evdit_opt.models import Item, require_finite
from evdit_opt.progress import track

__all__ = ["Recording", "record"]


@dataclass(frozen=True)
class Recording:
    """What dense runs told.

    Attributes:
        errors: per site, of every rule that is applied in every step.
        reuse: per site, of every rule that reuses residuals; empty where that is impossible.
        levels: noise levels of the steps of a run, descending; empty if the model has no steps.
        branches: guidance branches of a run: calls of the model per step.
        residual_bytes: per site, of one residual.
        mass: per site, share of attention by tile, ``[heads, frames, parts]``.
        results: what each dense run returned (see ``Denoiser.run``).
    """

    errors: Mapping[str, tuple[CandidateError, ...]]
    reuse: Mapping[str, tuple[ReuseError, ...]]
    levels: tuple[float, ...]
    branches: int
    residual_bytes: Mapping[str, int]
    mass: Mapping[str, Tensor]
    results: Sequence[Tensor]


def record(stage: Stage, items: Sequence[Item], config: Config, video: str) -> Recording:
    """Dense runs of all items, with every forward measured.

    Args:
        stage: the model.
        items: prompts or calls to run; the seed of item n is ``config.seed + n``.
        config: candidates, steps, seed.
        video: the parameter of the model's forward that holds the video.

    Raises:
        NonFiniteOutputError: on NaN or infinity in an attention input or a result.
        CalibrationError: if a site was never reached.
    """
    denoiser = stage.denoiser
    steps = Steps(denoiser, video)
    reuse = steps.timed and config.reuse
    sites = {
        name: SiteRecord(
            layout,
            candidate_rules(config, layout.grid.frames),
            reused_rules(config, layout.grid.frames) if reuse else (),
            seed=config.seed + number,
        )
        for number, (name, layout) in enumerate(stage.layouts.items())
    }
    residual_bytes: dict[str, int] = {}

    def measure(
        name: str, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, scale: float | None
    ) -> None:
        for tensor, what in ((q, "queries"), (k, "keys"), (v, "values")):
            require_finite(tensor, f"the {what} at {name}")
        residual_bytes[name] = q.numel() * q.element_size()
        sites[name].add(q, k, v, attn_mask, scale, steps.branch, steps.step)

    results, branches = [], 1
    with stage.playing(measure, steps.listen):
        for index, item in enumerate(track(items, "calibrating", config.progress)):
            results.append(denoiser.run(item, config.seed + index, config.calib_steps))
            for site in sites.values():
                site.end_run()
            branches = max(branches, steps.branches)
            steps.end_run()
    unseen = [name for name, site in sites.items() if site.calls == 0]
    if unseen:
        raise CalibrationError(
            f"expected every site to run during calibration, these never did: {', '.join(unseen)}"
        )
    levels = tuple(steps.levels[step] for step in sorted(steps.levels))
    return Recording(
        errors={name: site.errors() for name, site in sites.items()},
        reuse={name: site.reuse_errors() for name, site in sites.items()},
        levels=levels if len(levels) > 1 else (),
        branches=branches,
        residual_bytes=residual_bytes,
        mass={name: site.mass() for name, site in sites.items()},
        results=results,
    )
