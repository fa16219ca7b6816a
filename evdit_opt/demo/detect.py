"""Analytic detectors: what does a clip of TinyWan's world show? No learned parts, numpy only.

They read colour, shape and direction back from pixels, so that a generated clip can be checked
against its caption, and measure how steadily the object moves (jerk) and the backdrop stands still
(flicker).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evdit_opt.demo.clips import COLOURS, SHAPES, parse_caption, shape_distance

NOTHING = "none"
"""Reported where there is no object, or no motion."""
SMALLEST_AREA = 60
"""Pixels; a smaller foreground is noise. The smallest object drawn has about 330."""
SMALLEST_MOVE = 6.0
"""Pixels between the first and last frames; clips move by 32 to 38."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Detection:
    """What one clip shows; each word is `NOTHING` where none was found."""

    shape: str
    colour: str
    direction: str
    overlap: float
    """Mean intersection over union with the best template, 0..1."""
    jerk: float
    """Median length of the second difference of the object's track, pixels per frame squared."""
    flicker: float
    """Mean temporal standard deviation of backdrop pixels never touched by the object, 0..1."""
    visible: float
    """Share of frames with an object."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionAccuracy:
    """Shares of clips that show what their captions ask for, 0..1."""

    shape: float
    colour: float
    direction: float
    everything: float
    detections: tuple[Detection, ...]


def caption_accuracy(videos: Sequence[np.ndarray], prompts: Sequence[str]) -> CaptionAccuracy:
    """Compare clips, each [frames, height, width, 3] in 0..1, with their captions."""
    detections = tuple(detect(video) for video in videos)
    labels = [parse_caption(prompt) for prompt in prompts]
    right = np.array(
        [
            (
                found.shape == label.shape,
                found.colour == label.colour,
                found.direction == label.direction,
            )
            for found, label in zip(detections, labels, strict=True)
        ]
    )
    shape, colour, direction = right.mean(axis=0).tolist()
    return CaptionAccuracy(
        shape=shape,
        colour=colour,
        direction=direction,
        everything=float(right.all(axis=1).mean()),
        detections=detections,
    )


def detect(video: np.ndarray) -> Detection:
    """Describe a clip, [frames, height, width, 3] in 0..1."""
    video = np.asarray(video, np.float32)
    masks = foreground(video)
    visible = masks.sum(axis=(1, 2)) >= SMALLEST_AREA  # [frames]
    flicker = _flicker(video, masks)
    if visible.sum() < max(2, len(video) // 4):
        return Detection(
            shape=NOTHING,
            colour=NOTHING,
            direction=NOTHING,
            overlap=0.0,
            jerk=float("nan"),
            flicker=flicker,
            visible=float(visible.mean()),
        )
    track = np.array([_centroid(mask) for mask in masks[visible]])  # [visible frames, 2] as (x, y)
    overlaps = np.mean([template_overlaps(mask) for mask in masks[visible][::3]], axis=0)
    return Detection(
        shape=SHAPES[int(overlaps.argmax())],
        colour=_colour(video[visible], masks[visible]),
        direction=_direction(track),
        overlap=float(overlaps.max()),
        jerk=float(np.median(np.hypot(*np.diff(track, n=2, axis=0).T))) if len(track) > 2 else 0.0,
        flicker=flicker,
        visible=float(visible.mean()),
    )


def foreground(video: np.ndarray) -> np.ndarray:
    """Bright and saturated pixels, [frames, height, width] bool: the backdrop is neither."""
    brightest, darkest = video.max(axis=-1), video.min(axis=-1)
    return (brightest > 0.55) & (brightest - darkest > 0.25)


def template_overlaps(mask: np.ndarray) -> np.ndarray:
    """IoU of a mask [height, width] with each shape at the same centroid and area, [shapes]."""
    rows, columns = np.mgrid[0 : mask.shape[0], 0 : mask.shape[1]]
    x, y = _centroid(mask)
    overlaps = []
    for shape in SHAPES:
        radius = float(np.sqrt(mask.sum() / UNIT_AREAS[shape]))
        template = shape_distance(shape, columns - x, rows - y, radius) < 0
        overlaps.append((mask & template).sum() / (mask | template).sum())
    return np.array(overlaps)


def _unit_areas() -> dict[str, float]:
    """Area of each shape at radius 1, by counting on a fine grid."""
    rows, columns = np.mgrid[-1.5:1.5:601j, -1.5:1.5:601j]
    return {
        shape: float((shape_distance(shape, columns, rows, 1.0) < 0).mean() * 9) for shape in SHAPES
    }


UNIT_AREAS = _unit_areas()


def _centroid(mask: np.ndarray) -> tuple[float, float]:
    rows, columns = np.nonzero(mask)
    return float(columns.mean()), float(rows.mean())


def _colour(video: np.ndarray, masks: np.ndarray) -> str:
    """The palette entry nearest to the mean colour of the foreground, brightness divided out."""
    mean = video[masks].mean(axis=0)  # [3]
    distances = {
        name: float(np.abs(mean / mean.max() - np.array(value) / max(value)).sum())
        for name, value in COLOURS.items()
    }
    return min(distances, key=lambda name: distances[name])


def _direction(track: np.ndarray) -> str:
    """Dominant axis and sign of the way from the first three to the last three positions."""
    move = track[-3:].mean(axis=0) - track[:3].mean(axis=0)
    if np.abs(move).max() < SMALLEST_MOVE:
        return NOTHING
    if abs(move[0]) >= abs(move[1]):
        return "right" if move[0] > 0 else "left"
    return "down" if move[1] > 0 else "up"


def _flicker(video: np.ndarray, masks: np.ndarray) -> float:
    touched = masks.any(axis=0)
    grown = touched.copy()  # two pixels more: outlines are soft
    for _ in range(2):
        padded = np.pad(grown, 1)
        grown = padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:] | grown
    if grown.all():
        return float("nan")
    return float(video[:, ~grown].std(axis=0).mean())
