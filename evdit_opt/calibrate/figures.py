"""The figures of ``evdit measure``, and which layers break the pattern of the others."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from torch import Tensor

from evdit_opt.calibrate.pattern import SHARES, Pattern, Relation
from evdit_opt.grid import TokenLayout

__all__ = ["HeadFigures", "KeySet", "Overlap", "SiteFigures", "site_figures"]

FAR = 3.5
"""Modified z-score beyond which a layer is out of line (Iglewicz and Hoaglin, 1993)."""

LEAST_SPREAD = 0.01
"""Mass. Layers that agree better than this count as if they differed by so much."""


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """How one call's keys meet those of another, mean over pairs of calls and over queries.

    Attributes:
        iou: intersection over union of the two sets.
        caught: share of the one call's attention on the other call's set.
    """

    iou: float
    caught: float


@dataclass(frozen=True, kw_only=True)
class KeySet:
    """The fewest keys that hold a share of a query's attention.

    Attributes:
        share: 0.9, 0.95 or 0.99.
        keys: how many there are, over all keys.
        prompts: overlap with those of the first prompt, at the same step; None with one prompt.
        timesteps: between the first, the middle and the last step of a run; None with one step.
        branches: between guidance branches; None with one.
    """

    share: float
    keys: float
    prompts: Overlap | None
    timesteps: Overlap | None
    branches: Overlap | None


@dataclass(frozen=True, kw_only=True)
class HeadFigures:
    """Where the queries of one head look, mean over frames, positions, batch and calls.

    Attributes:
        in_frame: share of attention on the query's own frame.
        by_distance: share on all frames 0, 1, .. frames - 1 away; the first is ``in_frame``.
        text: share on the tokens before and after the video.
        similarity: mean cosine between different off-diagonal tiles; None if there are not two.
        sets: the keys that hold 90, 95 and 99% of the attention.
    """

    in_frame: float
    by_distance: tuple[float, ...]
    text: float
    similarity: float | None
    sets: tuple[KeySet, ...]


@dataclass(frozen=True, kw_only=True)
class SiteFigures:
    """Where the queries of one layer look; sums to 1 over ``by_distance`` and ``text``.

    Attributes:
        name: of the site.
        in_frame: mean over heads.
        by_distance: mean over heads.
        text: mean over heads.
        even: what ``in_frame`` would be if every token got the same share.
        similarity: mean over heads.
        sets: mean over heads.
        breaks: which figures are far from those of the other layers: "own frame", "similarity",
            "prompts" (what the first prompt's 90% set catches).
        tiles: mean over heads, share by query frame (row) and key frame (column).
        heads: the same figures head by head.
    """

    name: str
    in_frame: float
    by_distance: tuple[float, ...]
    text: float
    even: float
    similarity: float | None
    sets: tuple[KeySet, ...]
    breaks: tuple[str, ...]
    tiles: tuple[tuple[float, ...], ...]
    heads: tuple[HeadFigures, ...]


def site_figures(
    mass: Mapping[str, Tensor],
    patterns: Mapping[str, Pattern],
    layouts: Mapping[str, TokenLayout],
) -> tuple[SiteFigures, ...]:
    """The figures of every site.

    Args:
        mass: per site ``[heads, frames, parts]``, share of attention of each query frame by part:
            the frames and, where there is text, all of it. Rows sum to 1.
        patterns: of the same sites.
        layouts: of the same sites.
    """
    own = {
        name: _heads(tiles.double(), patterns[name], layouts[name].grid.frames)
        for name, tiles in mass.items()
    }
    found = [
        SiteFigures(
            name=name,
            in_frame=_mean([head.in_frame for head in heads]),
            by_distance=tuple(map(_mean, zip(*(head.by_distance for head in heads), strict=True))),
            text=_mean([head.text for head in heads]),
            even=layouts[name].grid.tokens_per_frame / layouts[name].seq_len,
            similarity=_similarity(patterns[name]),
            sets=_sets(patterns[name]),
            breaks=(),
            tiles=_rows(mass[name], layouts[name].grid.frames),
            heads=heads,
        )
        for name, heads in own.items()
    ]
    breaks: list[list[str]] = [[] for _ in found]
    for what, figure in COMPARED.items():
        values = [figure(site) for site in found]
        known = [value for value in values if value is not None]
        if len(known) == len(values):
            for own_breaks, far in zip(breaks, _far_from_the_others(known), strict=True):
                own_breaks += [what] * far
    return tuple(replace(site, breaks=tuple(b)) for site, b in zip(found, breaks, strict=True))


def _caught(site: SiteFigures) -> float | None:
    overlap = site.sets[0].prompts
    return None if overlap is None else overlap.caught


COMPARED: dict[str, Callable[[SiteFigures], float | None]] = {
    "own frame": lambda site: site.in_frame,
    "similarity": lambda site: site.similarity,
    "prompts": _caught,
}
"""Figures by which a layer may break the pattern of the others."""


def _heads(mass: Tensor, pattern: Pattern, frames: int) -> tuple[HeadFigures, ...]:
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
        HeadFigures(
            in_frame=shares[0],
            by_distance=shares,
            text=own_text,
            similarity=_similarity(pattern, head),
            sets=_sets(pattern, head),
        )
        for head, (shares, own_text) in enumerate(zip(by_head, on_text, strict=True))
    )


def _similarity(pattern: Pattern, head: int | None = None) -> float | None:
    """Of one head, or the mean over all."""
    found = pattern.similarity
    return None if found is None else float(found.mean() if head is None else found[head])


def _sets(pattern: Pattern, head: int | None = None) -> tuple[KeySet, ...]:
    """Of one head, or the mean over all."""

    def one(value: Tensor) -> list[float]:
        return (value.mean(0) if head is None else value[head]).tolist()

    def overlaps(relation: Relation) -> list[Overlap | None]:
        if relation not in pattern.iou:
            return [None] * len(SHARES)
        pairs = zip(one(pattern.iou[relation]), one(pattern.caught[relation]), strict=True)
        return [Overlap(iou=iou, caught=caught) for iou, caught in pairs]

    columns = zip(
        SHARES, one(pattern.keys), overlaps("prompts"), overlaps("timesteps"), overlaps("branches"),
        strict=True,
    )  # fmt: skip
    return tuple(
        KeySet(share=share, keys=keys, prompts=prompts, timesteps=timesteps, branches=branches)
        for share, keys, prompts, timesteps, branches in columns
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
