"""A picture of where attention goes: frames x frames per layer, as in the paper's Figure 1."""

from pathlib import Path

import numpy as np

from evdit_opt.calibrate.measure import Measurement

__all__ = ["draw_mass"]

COLUMNS = 6
LEAST = 1e-4
"""Share below which tiles look alike: the scale is logarithmic, as shares span decades."""


def draw_mass(path: Path, measured: Measurement) -> Path:
    """Write a picture of every site's share of attention by tile, on one logarithmic scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import colors, pyplot

    columns = min(COLUMNS, len(measured.sites))
    lines = -(-len(measured.sites) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(2.1 * columns + 0.7, 2.6 * lines), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    scale = colors.LogNorm(LEAST, 1.0, clip=True)
    for axis in axes.flat:
        axis.axis("off")
    for axis, site in zip(axes.flat, measured.sites, strict=False):
        shares = np.asarray(site.tiles).clip(min=LEAST)
        image = axis.imshow(shares, cmap="Blues", norm=scale, interpolation="nearest")
        text = f", text {site.text:.0%}" if site.text else ""
        breaks = "\nbreaks the pattern" if site.breaks_pattern else ""
        title = f"{site.name}\nown frame {site.in_frame:.0%}{text}{breaks}"
        axis.set_title(title, fontsize=7, parse_math=False)
        axis.set(xticks=[], yticks=[])
        axis.axis("on")
    figure.colorbar(image, ax=axes, shrink=0.6, label="share of a query's attention")
    figure.suptitle("attention by query frame (down) and key frame (across)", fontsize=9)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path
