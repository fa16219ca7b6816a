"""Where attention goes, on a plan's page: a map of tiles per layer, and how far they repeat."""

import math
from collections.abc import Iterator, Sequence

from evdit_opt.calibrate.figures import Overlap, SiteFigures
from evdit_opt.calibrate.measure import Measurement
from evdit_opt.page.html import Html, join, tag

__all__ = ["tile_statistics"]

LEVELS = 12
LEAST = 1e-4
"""Share that is drawn as nothing: the scale is logarithmic."""

MAX_DRAWN_FRAMES, MAX_SITES = 64, 128


def tile_statistics(measured: Measurement | None) -> Iterator[Html]:
    """What ``evdit measure`` found, a row per layer; nothing without."""
    if measured is None:
        return
    grid = measured.grid
    yield tag("h2", "Where attention goes")
    yield tag(
        "p",
        f"Dense runs of {measured.prompts} prompts, {measured.steps} steps, {grid.frames} latent "
        f"frames of {grid.height} x {grid.width} tokens. Maps: query frame (down) by key frame "
        "(across), darker for a larger share, logarithmic. Alike: cosine between off-diagonal "
        "tiles. Keys: how many of all hold 90% of a query's attention. Prompts, steps, guidance: "
        "how much of it the 90% keys of another one catch (and intersection over union).",
        class_="quiet",
    )
    columns = (
        "map", "layer", "own frame", "if even", "alike", "keys", "prompts", "steps", "guidance",
        "breaks the pattern",
    )  # fmt: skip
    head = tag("thead", tag("tr", *(tag("th", text) for text in columns)))
    rows = [_row(site) for site in measured.sites[:MAX_SITES]]
    yield tag("table", head, tag("tbody", *rows), class_="sites")
    if len(measured.sites) > MAX_SITES:
        yield tag("p", f"{len(measured.sites) - MAX_SITES} more layers are not shown.")


def _row(site: SiteFigures) -> Html:
    held = site.sets[0] if site.sets else None
    figures = [
        ("own frame", f"{site.in_frame:.1%}"),
        ("if even", f"{site.even:.1%}"),
        ("alike", "-" if site.similarity is None else f"{site.similarity:.2f}"),
        ("keys", "-" if held is None else f"{held.keys:.0%}"),
    ]
    if held is not None:
        figures += [
            ("prompts", _overlap(held.prompts)),
            ("steps", _overlap(held.timesteps)),
            ("guidance", _overlap(held.branches)),
        ]
    figures.append(("breaks", ", ".join(site.breaks) or "no"))
    return tag(
        "tr",
        tag("td", _map(site.tiles, f"share of attention by tile, {site.name}")),
        tag("td", tag("strong", site.name)),
        *(tag("td", value, data_label=label) for label, value in figures),
    )


def _overlap(found: Overlap | None) -> str:
    return "-" if found is None else f"{found.caught:.2f} ({found.iou:.2f})"


def _map(tiles: Sequence[Sequence[float]], label: str) -> Html:
    """A level of shade per path, tiles next to each other in one stroke."""
    frames = min(len(tiles), MAX_DRAWN_FRAMES)
    paths: dict[int, list[str]] = {}
    for i, row in enumerate(tiles[:frames]):
        levels = [_level(share) for share in row[:frames]]
        start = 0
        for j in range(1, len(levels) + 1):
            if j == len(levels) or levels[j] != levels[start]:
                if levels[start]:
                    run = f"M{start} {i}h{j - start}v1h{start - j}z"
                    paths.setdefault(levels[start], []).append(run)
                start = j
    drawn = [
        tag("path", d="".join(runs), class_="kept", fill_opacity=f"{level / LEVELS:.2f}")
        for level, runs in sorted(paths.items())
    ]
    ground = tag("rect", width=frames, height=frames, class_="dropped")
    box = f"0 0 {frames} {frames}"
    content = join(tag("title", label), ground, *drawn)
    return tag("svg", content, viewBox=box, class_="mask", role="img")


def _level(share: float) -> int:
    if share <= LEAST:
        return 0
    return min(LEVELS, max(0, round(LEVELS * (1 - math.log(share) / math.log(LEAST)))))
