"""Detectors are trusted because they are perfect on real clips and blind to shuffled captions."""

import numpy as np
import pytest

from evdit_opt.demo.clips import FRAMES, LABELS, draw_clip, sample_clip
from evdit_opt.demo.detect import NOTHING, caption_accuracy, detect


@pytest.fixture(scope="module")
def real() -> tuple[list[np.ndarray], list[str]]:
    clips = [sample_clip(100 + index, LABELS[2 * index]) for index in range(40)]
    return [draw_clip(clip) for clip in clips], [clip.caption for clip in clips]


def test_detectors_are_perfect_on_real_clips(real: tuple[list[np.ndarray], list[str]]) -> None:
    accuracy = caption_accuracy(*real)
    assert (accuracy.shape, accuracy.colour, accuracy.direction) == (1.0, 1.0, 1.0)
    assert min(found.overlap for found in accuracy.detections) > 0.9
    assert max(found.jerk for found in accuracy.detections) < 0.5
    # The mean of 33 equal float32 numbers is off by at most 33 half-steps; so is their deviation.
    still = FRAMES * np.finfo(np.float32).eps / 2
    assert max(found.flicker for found in accuracy.detections) < still


def test_detectors_are_near_chance_on_shuffled_captions(
    real: tuple[list[np.ndarray], list[str]],
) -> None:
    videos, captions = real
    shuffled = [captions[i] for i in np.random.default_rng(0).permutation(len(captions))]
    accuracy = caption_accuracy(videos, shuffled)
    assert max(accuracy.shape, accuracy.direction) < 0.5
    assert accuracy.colour < 0.45
    assert accuracy.everything < 0.2


def test_nothing_is_found_in_noise_or_darkness() -> None:
    dark = np.full((33, 80, 80, 3), 0.2, np.float32)
    assert detect(dark).shape == detect(dark).colour == detect(dark).direction == NOTHING


def test_flicker_and_jerk_respond(real: tuple[list[np.ndarray], list[str]]) -> None:
    video = real[0][0]
    random = np.random.default_rng(0)
    blinking = video * random.uniform(0.9, 1.0, size=(33, 1, 1, 1)).astype(np.float32)
    assert detect(blinking).flicker > 0.003
    shaken = np.stack([np.roll(frame, random.integers(-2, 3), axis=0) for frame in video])
    assert detect(shaken).jerk > 1.0 > detect(video).jerk


def test_a_still_object_has_no_direction(real: tuple[list[np.ndarray], list[str]]) -> None:
    still = np.repeat(real[0][0][:1], 33, axis=0)
    assert detect(still).direction == NOTHING
