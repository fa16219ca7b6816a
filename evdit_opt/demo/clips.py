"""Procedurally drawn, captioned clips: the whole world TinyWan knows.

One clip shows one big shape of one colour crossing a softly lit studio backdrop in one
direction. Every clip is a pure function of an integer seed, so a data set is a range of seeds and
nothing has to be stored or downloaded.

Two properties of the world are there for the model's sake, because `WanTransformer3DModel` sees
only *relative* positions (RoPE) and therefore has to infer where it is from what it sees:

- start and end of the path are tied to the direction (moving right begins on the left), so the
  direction is part of the low-frequency layout and can be decided at the highest noise level;
- the light always comes from the upper left, so the backdrop itself carries coordinates.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

SHAPES = ("circle", "square", "triangle", "plus")
COLOURS = {
    "red": (0.92, 0.16, 0.14),
    "green": (0.16, 0.80, 0.26),
    "blue": (0.18, 0.38, 0.98),
    "yellow": (0.98, 0.86, 0.14),
    "purple": (0.76, 0.24, 0.92),
}
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
TEMPLATES = (
    "a {colour} {shape} moving {direction}",
    "a {colour} {shape} moves {direction}",
    "the {colour} {shape} is moving {direction}",
)
VOCABULARY = (
    *sorted({word for text in TEMPLATES for word in text.split() if "{" not in word}),
    *COLOURS,
    *SHAPES,
    *DIRECTIONS,
)

FRAMES = 33
SIZE = 80
"""Pixels; clips are square."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Label:
    """What a caption asks for and what a detector reports."""

    shape: str
    colour: str
    direction: str

    def caption(self, template: int = 0) -> str:
        """The caption in one of `TEMPLATES`; 0 is the plainest wording."""
        return TEMPLATES[template].format(
            shape=self.shape, colour=self.colour, direction=self.direction
        )


LABELS = tuple(
    Label(shape=shape, colour=colour, direction=direction)
    for shape, colour, direction in itertools.product(SHAPES, COLOURS, DIRECTIONS)
)


def _held_out() -> tuple[Label, ...]:
    """Twelve combinations: three per shape, direction and (2 to 3) per colour."""
    colours = tuple(COLOURS)
    directions = tuple(DIRECTIONS)
    return tuple(
        Label(
            shape=shape,
            colour=colours[(2 * row + 3 * column) % len(colours)],
            direction=directions[(row + column) % len(directions)],
        )
        for row, shape in enumerate(SHAPES)
        for column in range(3)
    )


HELD_OUT = _held_out()
"""Combinations that are never trained on; the demo uses them to show composition."""
TRAINED = tuple(label for label in LABELS if label not in HELD_OUT)


def parse_caption(caption: str) -> Label:
    """Read the label back from a caption of the closed vocabulary."""
    words = caption.lower().split()
    found = {
        "shape": [word for word in words if word in SHAPES],
        "colour": [word for word in words if word in COLOURS],
        "direction": [word for word in words if word in DIRECTIONS],
    }
    if any(len(values) != 1 for values in found.values()):
        raise ValueError(
            f"expected exactly one shape, colour and direction in a caption, got {caption!r}; "
            f"write it like {LABELS[0].caption()!r}"
        )
    return Label(**{name: values[0] for name, values in found.items()})


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """Everything needed to draw one clip; lengths in pixels of an 80 x 80 picture."""

    label: Label
    caption: str
    radius: float
    centre: tuple[float, float]
    """Where the object is in the middle of the clip, (x, y)."""
    travel: float
    """Distance between the first and the last frame."""
    tint: tuple[float, float, float]
    """Backdrop colour where the light falls, (r, g, b) in 0..1."""
    contrast: float
    shade: float
    """Brightness factor of the object's colour."""


def sample_clip(seed: int, label: Label | None = None) -> Clip:
    """Choose a clip; without a label, one of the trained combinations."""
    random = np.random.default_rng(seed)
    drawn = TRAINED[random.integers(len(TRAINED))]
    label = label or drawn
    travel = random.uniform(32.0, 38.0)
    along, across = random.uniform(-2.0, 2.0), random.uniform(-5.0, 5.0)
    x_step, y_step = DIRECTIONS[label.direction]
    middle = (SIZE - 1) / 2
    return Clip(
        label=label,
        caption=label.caption(int(random.integers(len(TEMPLATES)))),
        radius=random.uniform(13.5, 16.0),
        centre=(
            middle + abs(x_step) * along + abs(y_step) * across,
            middle + abs(y_step) * along + abs(x_step) * across,
        ),
        travel=travel,
        tint=tuple(random.uniform(0.22, 0.34, size=3).tolist()),
        contrast=random.uniform(0.6, 0.8),
        shade=random.uniform(0.94, 1.0),
    )


def draw_clip(clip: Clip, lead: int = 0) -> np.ndarray:
    """Draw a clip, [lead + 33, height, width, 3] float32 in 0..1.

    Args:
        clip: what to draw.
        lead: frames to draw before the first one, the motion continued backwards.
    """
    frames, size = lead + FRAMES, SIZE
    rows, columns = np.mgrid[0:size, 0:size].astype(np.float32)
    light = 1 - clip.contrast * (0.6 * rows + 0.4 * columns) / (size - 1)  # [height, width]
    backdrop = light[..., None] * np.asarray(clip.tint, np.float32)  # [height, width, 3]
    colour = np.asarray(COLOURS[clip.label.colour], np.float32) * clip.shade
    x_step, y_step = DIRECTIONS[clip.label.direction]
    video = np.empty((frames, size, size, 3), np.float32)
    for frame, progress in enumerate(np.linspace(-0.5 - lead / (FRAMES - 1), 0.5, frames)):
        distance = shape_distance(
            clip.label.shape,
            columns - clip.centre[0] - x_step * clip.travel * progress,
            rows - clip.centre[1] - y_step * clip.travel * progress,
            clip.radius,
        )
        coverage = np.clip(0.5 - distance, 0, 1)[..., None]  # one pixel of anti-aliasing
        video[frame] = backdrop + coverage * (colour - backdrop)
    return video


def shape_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance in pixels to the shape's outline, negative inside; y points down."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.88 * radius
    if shape == "triangle":  # equilateral, tip up, the centroid in the origin
        slope = 0.5 * np.sqrt(3.0) * abs(x) - 0.5 * y
        return np.maximum(slope, y) - 0.62 * radius
    if shape == "plus":
        wide, narrow = 1.05 * radius, 0.36 * radius
        return np.minimum(
            np.maximum(abs(x) - wide, abs(y) - narrow), np.maximum(abs(x) - narrow, abs(y) - wide)
        )
    raise ValueError(f"expected a shape of {SHAPES}, got {shape!r}")


def evaluation_pairs(count: int, first_seed: int = 10_000_000) -> tuple[tuple[int, Label], ...]:
    """(noise seed, label) pairs that walk evenly through all combinations, held-out ones included.

    Training draws its clips from seeds below `first_seed`.
    """
    order = np.random.default_rng(first_seed).permutation(len(LABELS))
    return tuple((first_seed + index, LABELS[order[index % len(LABELS)]]) for index in range(count))
