"""Pictures of the demo: clips side by side, and the tile mask of every site."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from evdit_opt.masks import DROPPED, Rule
from evdit_opt.plan import Plan, SitePlan

__all__ = ["write_masks", "write_side_by_side"]

FRAMES_PER_SECOND = 12
GIF_STRIDE = 3  # every third frame, 64 colours: small enough for a README
ENLARGE = 2  # pixels of the written video per pixel of the clip
MARGIN = 8  # pixels between clips
CAPTION_HEIGHT = 36  # pixels above the first row, two lines of text
TITLE_WIDTH = 112  # pixels left of the first column
BACKGROUND = (255, 255, 255)
INK = (20, 20, 20)


def write_side_by_side(
    folder: Path, rows: Mapping[str, Sequence[np.ndarray]], captions: Sequence[str]
) -> tuple[Path, Path]:
    """Write ``side_by_side.mp4`` and ``.gif``: one row per variant, one column per caption.

    Args:
        folder: where to write.
        rows: title -> clips ``[frames, height, width, 3]`` in 0..1, one per caption, equal shapes.
        captions: what each column was asked to show.

    Returns:
        The paths of the mp4 and the gif.
    """
    import imageio.v3 as iio

    first = next(iter(rows.values()))[0]
    sheet = _sheet(rows, captions, first.shape[1] * ENLARGE, first.shape[2] * ENLARGE)
    video = np.stack([_fill(sheet, rows, frame) for frame in range(len(first))])
    mp4, gif = folder / "side_by_side.mp4", folder / "side_by_side.gif"
    iio.imwrite(mp4, video, fps=FRAMES_PER_SECOND, codec="libx264")
    _write_gif(gif, video[::GIF_STRIDE])
    return mp4, gif


def write_masks(path: Path, plan: Plan) -> Path:
    """Write a picture of the tile mask of every site: dropped white, kept blue, weighted darker."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    frames = plan.grid.frames
    columns = min(6, len(plan.sites))
    lines = -(-len(plan.sites) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(2.1 * columns, 2.8 * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, site in zip(axes.flat, plan.sites, strict=False):
        axis.imshow(
            _weight(site, frames), cmap="Blues", vmin=0.0, vmax=4.0, interpolation="nearest"
        )
        title = [site.name, *textwrap.wrap(site.describe(frames), 24), f"{site.density:.0%}"]
        axis.set_title("\n".join(title), fontsize=7)
        axis.set(xticks=[], yticks=[])
        axis.axis("on")
    figure.suptitle(
        f"kept tiles{'' if plan.reuse is None else ' between refreshes'}: query frame (down) x key "
        f"frame (across), {frames} latent frames",
        fontsize=9,
    )
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


def _weight(site: SitePlan, frames: int) -> np.ndarray:
    """How often every tile counts; of two rules the mean over heads."""
    first, second = _weights(site.rule, frames), site.second
    if second is None:
        return first
    return first + second.share * (_weights(second.rule, frames) - first)


def _weights(rule: Rule | None, frames: int) -> np.ndarray:
    bias = _bias(rule, frames)
    return np.where(bias == DROPPED, 0.0, 1.0 + bias)


def _bias(rule: Rule | None, frames: int) -> np.ndarray:
    if rule is None:
        return np.zeros((frames, frames))
    if rule.keeps_nothing:
        return np.full((frames, frames), DROPPED)
    return rule.mask(frames).bias.numpy()


def _write_gif(path: Path, video: np.ndarray) -> None:
    from PIL import Image

    first, *others = [
        Image.fromarray(frame).quantize(64, dither=Image.Dither.NONE) for frame in video
    ]
    milliseconds = 1000 * GIF_STRIDE // FRAMES_PER_SECOND
    first.save(path, save_all=True, append_images=others, duration=milliseconds, loop=0)


def _sheet(
    rows: Mapping[str, Sequence[np.ndarray]], captions: Sequence[str], height: int, width: int
) -> np.ndarray:
    """The still part of the picture: captions above, titles at the left, room for the clips."""
    from PIL import Image, ImageDraw, ImageFont

    size = (
        _whole_blocks(TITLE_WIDTH + len(captions) * (width + MARGIN)),
        _whole_blocks(CAPTION_HEIGHT + len(rows) * (height + MARGIN)),
    )
    picture = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(13)
    for column, caption in enumerate(captions):
        text = "\n".join(textwrap.wrap(caption, width // 7))
        draw.text((TITLE_WIDTH + column * (width + MARGIN), 2), text, INK, font=font)
    for row, title in enumerate(rows):
        text = "\n".join(textwrap.wrap(title, TITLE_WIDTH // 7))
        draw.text((4, CAPTION_HEIGHT + row * (height + MARGIN) + height // 3), text, INK, font=font)
    return np.asarray(picture)


def _whole_blocks(pixels: int) -> int:
    """``pixels`` rounded up to the 16 x 16 blocks of H.264."""
    return -(-pixels // 16) * 16


def _fill(sheet: np.ndarray, rows: Mapping[str, Sequence[np.ndarray]], frame: int) -> np.ndarray:
    picture = sheet.copy()
    for row, clips in enumerate(rows.values()):
        for column, clip in enumerate(clips):
            image = (np.clip(clip[frame], 0, 1) * 255).round().astype(np.uint8)
            image = image.repeat(ENLARGE, 0).repeat(ENLARGE, 1)
            top = CAPTION_HEIGHT + row * (image.shape[0] + MARGIN)
            left = TITLE_WIDTH + column * (image.shape[1] + MARGIN)
            picture[top : top + image.shape[0], left : left + image.shape[1]] = image
    return picture
