"""Run the dense model on calibration items and measure every candidate on what each site sees."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from evdit_opt.calibrate.candidates import candidate_rules, head_rules, reused_rules
from evdit_opt.calibrate.kept import Kept, flat, part
from evdit_opt.calibrate.site_record import (
    CandidateError,
    HeadErrors,
    ReuseError,
    SiteRecord,
)
from evdit_opt.calibrate.stage import Stage
from evdit_opt.calibrate.steps import Steps
from evdit_opt.config import Config
from evdit_opt.errors import CalibrationError
from evdit_opt.models import Item, require_finite
from evdit_opt.progress import track

__all__ = ["Recording", "record"]

STATE = "recording"


@dataclass(frozen=True)
class Recording:
    """What dense runs told.

    Attributes:
        errors: per site, of every rule that is applied in every step.
        reuse: per site, of every rule that reuses residuals; empty where that is impossible.
        levels: noise levels of the steps of a run, descending; empty if the model has no steps.
        branches: guidance branches of a run: calls of the model per step.
        residual_bytes: per site, of one residual in the model's precision.
        itemsize: bytes of a number in it.
        mass: per site, share of attention by tile, ``[heads, frames, parts]``.
        results: what the first ``config.trial_prompts`` dense runs returned (see ``Denoiser.run``).
        heads: per site whose heads may take different rules, what every rule costs at every head.
    """

    errors: Mapping[str, tuple[CandidateError, ...]]
    reuse: Mapping[str, tuple[ReuseError, ...]]
    levels: tuple[float, ...]
    branches: int
    residual_bytes: Mapping[str, int]
    itemsize: int
    mass: Mapping[str, Tensor]
    results: Sequence[Tensor]
    heads: Mapping[str, HeadErrors] = field(default_factory=dict)


def record(
    stage: Stage, items: Sequence[Item], config: Config, video: str, kept: Kept | None = None
) -> Recording:
    """Dense runs of all items, with every forward measured.

    Args:
        stage: the model.
        items: prompts or calls to run; the seed of item n is ``config.seed + n``.
        config: candidates, steps, seed.
        video: the parameter of the model's forward that holds the video.
        kept: where finished runs are; None: nowhere.

    Raises:
        NonFiniteOutputError: on NaN or infinity in an attention input or a result.
        CalibrationError: if a site was never reached.
    """
    denoiser = stage.denoiser
    steps = Steps(denoiser, video, needed=config.reuse)
    reuse = steps.timed and config.reuse
    sites = {
        name: SiteRecord(
            layout,
            candidate_rules(config, layout.grid.frames),
            reused_rules(config, layout.grid.frames) if reuse else (),
            seed=config.seed + number,
            for_heads=head_rules(config, layout.grid.frames),
        )
        for number, (name, layout) in enumerate(stage.layouts.items())
    }
    residual_bytes: dict[str, int] = {}
    itemsize = 1

    def measure(
        name: str, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, scale: float | None
    ) -> None:
        nonlocal itemsize
        itemsize = q.element_size()
        for tensor, what in ((q, "queries"), (k, "keys"), (v, "values")):
            require_finite(tensor, f"the {what} at {name}")
        residual_bytes[name] = q.numel() * q.element_size()
        sites[name].add(q, k, v, attn_mask, scale, steps.branch, steps.step)

    kept = kept or Kept()
    results, branches, done = [], 1, 0
    if (earlier := kept.load(STATE)) is not None:
        state, facts = earlier
        done, branches = facts["done"], facts["branches"]
        residual_bytes |= facts["residual_bytes"]
        itemsize = facts["itemsize"]
        steps.levels = dict(enumerate(facts["levels"]))
        for name, site in sites.items():
            site.load_state(part(state, name))
        results = [kept.run(f"dense-{n}", _missing) for n in range(min(done, config.trial_prompts))]
    with stage.playing(measure, steps.listen):
        for index, item in enumerate(track(items[done:], "calibrating", config.progress), done):
            result = denoiser.run(item, config.seed + index, config.calib_steps)
            for site in sites.values():
                site.end_run()
            branches = max(branches, steps.branches)
            steps.end_run()
            if index < config.trial_prompts:
                results.append(result)
                kept.save(f"dense-{index}", {"result": result})
            facts = {
                "done": index + 1, "branches": branches, "residual_bytes": residual_bytes,
                "itemsize": itemsize,
                "levels": [steps.levels[step] for step in sorted(steps.levels)],
            }  # fmt: skip
            kept.save(STATE, flat({name: site.state() for name, site in sites.items()}), facts)
    unseen = [name for name, site in sites.items() if site.calls == 0]
    if unseen:
        raise CalibrationError(
            f"expected every site to run during calibration, these never did: {', '.join(unseen)}"
        )
    levels = tuple(steps.levels[step] for step in sorted(steps.levels))
    heads = {name: site.head_errors() for name, site in sites.items()}
    return Recording(
        errors={name: site.errors() for name, site in sites.items()},
        reuse={name: site.reuse_errors() for name, site in sites.items()},
        levels=levels if len(levels) > 1 else (),
        branches=branches,
        residual_bytes=residual_bytes,
        itemsize=itemsize,
        mass={name: site.mass() for name, site in sites.items()},
        results=results,
        heads={name: own for name, own in heads.items() if own is not None},
    )


def _missing() -> Tensor:
    raise CalibrationError(
        "expected the dense clips of an unfinished calibration beside its sums; remove its folder "
        "to calibrate anew"
    )
