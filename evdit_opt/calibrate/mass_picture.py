"""A picture of where attention goes, and how far that repeats: the paper's Figure 1."""

from pathlib import Path
from typing import Any

import numpy as np

from evdit_opt.calibrate.measure import Measurement

__all__ = ["draw_mass"]

COLUMNS = 6
LEAST = 1e-4
"""Share below which tiles look alike: the scale is logarithmic, as shares span decades."""


def draw_mass(path: Path, measured: Measurement) -> Path:
    """Write a picture: every site's share of attention by tile, and below it how far it repeats."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import colors, pyplot

    columns = min(COLUMNS, len(measured.sites))
    lines = -(-len(measured.sites) // columns)
    width = max(2.1 * columns + 0.7, 6.0)
    whole = pyplot.figure(figsize=(width, 2.6 * lines + 3.2), layout="constrained")
    figure, below = whole.subfigures(2, 1, height_ratios=(2.6 * lines, 3.2))
    axes = figure.subplots(lines, columns, squeeze=False)
    scale = colors.LogNorm(LEAST, 1.0, clip=True)
    for axis in axes.flat:
        axis.axis("off")
    for axis, site in zip(axes.flat, measured.sites, strict=False):
        shares = np.asarray(site.tiles).clip(min=LEAST)
        image = axis.imshow(shares, cmap="Blues", norm=scale, interpolation="nearest")
        text = f", text {site.text:.0%}" if site.text else ""
        breaks = f"\nbreaks: {', '.join(site.breaks)}" if site.breaks else ""
        title = f"{site.name}\nown frame {site.in_frame:.0%}{text}{breaks}"
        axis.set_title(title, fontsize=7, parse_math=False)
        axis.set(xticks=[], yticks=[])
        axis.axis("on")
    figure.colorbar(image, ax=axes, shrink=0.6, label="share of a query's attention")
    figure.suptitle("attention by query frame (down) and key frame (across)", fontsize=9)
    _draw_repeats(below.subplots(), measured)
    whole.savefig(path, dpi=150, format="png")  # whatever the file is called while it is written
    pyplot.close(whole)
    return path


def _draw_repeats(axis: Any, measured: Measurement) -> None:
    """A line per figure over the layers; those that could not be measured are left out."""
    held = [site.sets[0] for site in measured.sites]
    curves: dict[str, list[float | None]] = {
        "own frame": [site.in_frame for site in measured.sites],
        "off-diagonal tiles alike (cosine)": [site.similarity for site in measured.sites],
        "keys of 90%, of all": [own.keys for own in held],
        **{
            f"caught by the 90% keys of another {name}": [
                None if overlap is None else overlap.caught for overlap in overlaps
            ]
            for name, overlaps in (
                ("prompt", [own.prompts for own in held]),
                ("step", [own.timesteps for own in held]),
                ("branch", [own.branches for own in held]),
            )
        },
    }
    for name, curve in curves.items():
        if None not in curve:
            axis.plot(curve, marker=".", label=name)
    axis.set(ylim=(0, 1.02), xlabel="layer, in model order", ylabel="share or cosine")
    axis.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
