"""Where a model's attention goes: Efficient-vDiT's Figure 1 as numbers, for any model.

The paper (arXiv 2502.06155, section 3) sees attention concentrate in the tiles of the diagonal, the
own frame, and the others repeat. Here: the share of attention by tile, per layer and head, from
dense runs of some prompts. Only a few queries of every frame are looked at and only sums are kept,
so memory is linear in the sequence (see ``parts.py``).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from torch import Tensor

from evdit_opt.apply import is_optimized
from evdit_opt.calibrate.record import record
from evdit_opt.calibrate.stage import staged
from evdit_opt.calibrate.survey import survey_attention
from evdit_opt.config import Config
from evdit_opt.errors import AlreadyOptimizedError
from evdit_opt.grid import TokenLayout, VideoGrid
from evdit_opt.models import Item, as_denoiser
from evdit_opt.strict_json import dump
from evdit_opt.versions import installed_versions

__all__ = ["HeadMass", "Measurement", "SiteMass", "measure_attention", "site_masses"]

FAR = 3.5
"""Modified z-score beyond which a layer is out of line (Iglewicz and Hoaglin, 1993)."""

LEAST_SPREAD = 0.01
"""Mass. Layers that agree better than this count as if they differed by so much."""


@dataclass(frozen=True, kw_only=True)
class HeadMass:
    """Where the queries of one head look, mean over frames, positions, batch and calls.

    Attributes:
        in_frame: share of attention on the query's own frame.
        by_distance: share on all frames 0, 1, .. frames - 1 away; the first is ``in_frame``.
        text: share on the tokens before and after the video.
    """

    in_frame: float
    by_distance: tuple[float, ...]
    text: float


@dataclass(frozen=True, kw_only=True)
class SiteMass:
    """Where the queries of one layer look; sums to 1 over ``by_distance`` and ``text``.

    Attributes:
        name: of the site.
        in_frame: mean over heads.
        by_distance: mean over heads.
        text: mean over heads.
        even: what ``in_frame`` would be if every token got the same share.
        breaks_pattern: True if ``in_frame`` is far from that of the other layers.
        tiles: mean over heads, share by query frame (row) and key frame (column).
        heads: the same figures head by head.
    """

    name: str
    in_frame: float
    by_distance: tuple[float, ...]
    text: float
    even: float
    breaks_pattern: bool
    tiles: tuple[tuple[float, ...], ...]
    heads: tuple[HeadMass, ...]


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
    sites: tuple[SiteMass, ...]
    versions: tuple[tuple[str, str], ...]

    def to_json(self) -> str:
        """The whole of it as one JSON object."""
        return dump(self)


def measure_attention(
    target: object, items: Iterable[Item], config: Config | None = None
) -> Measurement:
    """Run the dense model and measure where every site's attention goes.

    Args:
        target: a diffusers video pipeline, or an ``nn.Module``.
        items: prompts (pipeline), or dicts of forward kwargs (module); all are run.
        config: ``calib_steps``, ``seed``, ``grid``, ``progress`` and ``pipe_kwargs`` count.

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
    survey = survey_attention(denoiser, config.grid)
    with staged(denoiser, survey.layouts, survey.scoped) as stage:
        found = record(stage, denoiser.items, _without_candidates(config), survey.grid_source.input)
    return Measurement(
        model=type(denoiser.model).__name__,
        grid=survey.grid,
        prompts=len(denoiser.items),
        steps=config.calib_steps if denoiser.makes_video else 1,
        sites=site_masses(found.mass, survey.layouts),
        versions=tuple(sorted(installed_versions().items())),
    )


def site_masses(
    mass: Mapping[str, Tensor], layouts: Mapping[str, TokenLayout]
) -> tuple[SiteMass, ...]:
    """The figures of every site.

    Args:
        mass: per site ``[heads, frames, parts]``, share of attention of each query frame by part:
            the frames and, where there is text, all of it. Rows sum to 1.
        layouts: of the same sites.
    """
    own = {name: _heads(tiles.double(), layouts[name].grid.frames) for name, tiles in mass.items()}
    in_frame = [_mean([head.in_frame for head in heads]) for heads in own.values()]
    breaks = _far_from_the_others(in_frame)
    return tuple(
        SiteMass(
            name=name,
            in_frame=in_frame[n],
            by_distance=tuple(map(_mean, zip(*(head.by_distance for head in heads), strict=True))),
            text=_mean([head.text for head in heads]),
            even=layouts[name].grid.tokens_per_frame / layouts[name].seq_len,
            breaks_pattern=breaks[n],
            tiles=_rows(mass[name], layouts[name].grid.frames),
            heads=heads,
        )
        for n, (name, heads) in enumerate(own.items())
    )


def _heads(mass: Tensor, frames: int) -> tuple[HeadMass, ...]:
    tiles, text = mass[..., :frames], mass[..., frames:]
    distances = []
    for distance in range(frames):
        total = tiles.diagonal(distance, 1, 2).sum(-1)
        if distance:
            total = total + tiles.diagonal(-distance, 1, 2).sum(-1)
        distances.append(total / frames)
    by_head = zip(*(one.tolist() for one in distances), strict=True)
    on_text = text.sum(-1).mean(-1).tolist()
    return tuple(
        HeadMass(in_frame=shares[0], by_distance=shares, text=own_text)
        for shares, own_text in zip(by_head, on_text, strict=True)
    )


def _rows(mass: Tensor, frames: int) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in mass[..., :frames].double().mean(0).tolist())


def _far_from_the_others(values: Sequence[float]) -> list[bool]:
    """Which values are outliers, by the median distance from the median."""
    middle = median(values)
    spread = max(1.4826 * median(abs(value - middle) for value in values), LEAST_SPREAD)
    return [abs(value - middle) / spread > FAR for value in values]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _without_candidates(config: Config) -> Config:
    """Recording measures candidates too; one is the fewest there can be."""
    return replace(
        config, references=(1,), windows=(0,), weightings=("none",), spacings=("paper",),
        max_density=1.0, reuse=False,
    )  # fmt: skip
