"""Where a model's attention goes: Efficient-vDiT's Figure 1 as numbers, for any model.

The paper (arXiv 2502.06155, section 3) sees attention concentrate in the tiles of the diagonal, the
own frame, sees the others repeat, and the same keys matter for any data. Here, per layer and head,
from dense runs of some prompts: the share of attention by tile (``parts.py``), how alike tiles are
and how far the keys that matter are the same ones (``pattern.py``). Only a few queries are looked
at, so memory is linear in the sequence.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from evdit_opt.apply import is_optimized
from evdit_opt.calibrate.figures import SiteFigures, site_figures
from evdit_opt.calibrate.kept import Kept, flat, part, purpose
from evdit_opt.calibrate.pattern import Pattern, PatternRecord
from evdit_opt.calibrate.site_record import SiteRecord
from evdit_opt.calibrate.stage import Stage, staged
from evdit_opt.calibrate.steps import Steps
from evdit_opt.calibrate.survey import survey_attention
from evdit_opt.config import Config
from evdit_opt.errors import AlreadyOptimizedError, CalibrationError
from evdit_opt.grid import VideoGrid
from evdit_opt.models import Item, as_denoiser, require_finite
from evdit_opt.progress import track
from evdit_opt.strict_json import dump
from evdit_opt.versions import installed_versions

__all__ = ["Measurement", "measure_attention"]

STATE, FIRST = "sums", "first-run"
RECORDING = "where attention goes"
POSITIONS = 16
"""Positions of every frame whose queries are looked at. No rules are scored, so there is time."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What ``evdit measure`` tells.

    Attributes:
        model: class of the denoiser.
        grid: latent grid, in tokens.
        prompts: how many prompts (or calls) were run.
        steps: denoising steps of each.
        sites: in model order.
        versions: of what the result depends on.
    """

    model: str
    grid: VideoGrid
    prompts: int
    steps: int
    sites: tuple[SiteFigures, ...]
    versions: tuple[tuple[str, str], ...]

    def to_json(self) -> str:
        """The whole of it as one JSON object."""
        return dump(self)


def measure_attention(
    target: object,
    items: Iterable[Item],
    config: Config | None = None,
    *,
    keep_in: str | os.PathLike[str] | None = None,
) -> Measurement:
    """Run the dense model and measure where every site's attention goes.

    Args:
        target: a diffusers video pipeline, or an ``nn.Module``.
        items: prompts (pipeline), or dicts of forward kwargs (module); all are run.
        config: ``calib_steps``, ``seed``, ``grid``, ``progress`` and ``pipe_kwargs`` count.
        keep_in: a folder for the sums after every item, as ``make_plan`` has it.

    Raises:
        EvditError: as ``make_plan``, what concerns the search and quality aside.
    """
    config = config or Config()
    denoiser = as_denoiser(target, items, config.pipe_kwargs)
    if is_optimized(denoiser.model):
        raise AlreadyOptimizedError(
            f"expected a dense {type(denoiser.model).__name__}, this one has a plan applied; "
            "call evdit_opt.restore on it first"
        )
    kept = Kept()
    if keep_in is not None:
        kept = Kept(Path(keep_in), purpose(target, denoiser, config, RECORDING))
    survey = survey_attention(denoiser, config.grid)
    with staged(denoiser, survey.layouts, survey.scoped, kept) as stage:
        mass, patterns = _listen(stage, denoiser.items, config, survey.grid_source.input)
    return Measurement(
        model=type(denoiser.model).__name__,
        grid=survey.grid,
        prompts=len(denoiser.items),
        steps=config.calib_steps if denoiser.makes_video else 1,
        sites=site_figures(mass, patterns, survey.layouts),
        versions=tuple(sorted(installed_versions().items())),
    )


def _listen(
    stage: Stage, items: Sequence[Item], config: Config, video: str
) -> tuple[dict[str, Tensor], dict[str, Pattern]]:
    """Run all items; the share of attention by tile, and the patterns, of every site."""
    masses = {
        name: SiteRecord(layout, (), seed=config.seed + n, positions=POSITIONS)
        for n, (name, layout) in enumerate(stage.layouts.items())
    }
    patterns = {
        name: PatternRecord(layout, seed=config.seed + n)
        for n, (name, layout) in enumerate(stage.layouts.items())
    }
    steps = Steps(stage.denoiser, video)
    compared = {0, config.calib_steps // 2, config.calib_steps - 1}

    def attend(
        name: str, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, scale: float | None
    ) -> None:
        for tensor, what in ((q, "queries"), (k, "keys"), (v, "values")):
            require_finite(tensor, f"the {what} at {name}")
        masses[name].add(q, k, v, attn_mask, scale)
        if steps.step in compared:
            patterns[name].add(q, k, attn_mask, scale, steps.step, steps.branch)

    kept, done = stage.kept, 0
    earlier, first = kept.load(STATE), kept.load(FIRST)
    if earlier is not None and first is not None:
        state, done = earlier
        for name, mass in masses.items():
            mass.load_state(part(state, f"mass/{name}"))
            patterns[name].load_state(part(state, f"pattern/{name}"), part(first[0], name))
    with stage.playing(attend, steps.listen):
        for n, item in enumerate(track(items[done:], "measuring", config.progress), done):
            stage.denoiser.run(item, config.seed + n, config.calib_steps)
            steps.end_run()
            for one in patterns.values():
                one.end_run()
            if n == 0:
                kept.save(FIRST, flat({name: own.first_run() for name, own in patterns.items()}))
            sums = {f"mass/{name}": own.state() for name, own in masses.items()}
            sums |= {f"pattern/{name}": own.state() for name, own in patterns.items()}
            kept.save(STATE, flat(sums), n + 1)
    unseen = [name for name, one in masses.items() if one.calls == 0]
    if unseen:
        raise CalibrationError(f"expected every site to run, these never did: {', '.join(unseen)}")
    return (
        {name: one.mass() for name, one in masses.items()},
        {name: one.pattern() for name, one in patterns.items()},
    )
