"""The drawn world: deterministic, with a closed vocabulary and labels that are never drawn."""

import numpy as np
import pytest

from evdit_opt.demo.clips import (
    HELD_OUT,
    LABELS,
    TRAINED,
    VOCABULARY,
    draw_clip,
    evaluation_pairs,
    parse_caption,
    sample_clip,
)


def test_clips_are_a_function_of_the_seed() -> None:
    clip = sample_clip(7)
    assert clip == sample_clip(7) != sample_clip(8)
    video = draw_clip(clip)
    assert video.shape == (33, 80, 80, 3)
    assert video.dtype == np.float32
    assert 0 <= video.min() < video.max() <= 1
    np.testing.assert_array_equal(video, draw_clip(sample_clip(7)))


def test_captions_stay_in_the_vocabulary_and_say_what_is_drawn() -> None:
    for seed in range(200):
        clip = sample_clip(seed)
        assert set(clip.caption.split()) <= set(VOCABULARY)
        assert parse_caption(clip.caption) == clip.label


def test_held_out_labels_are_never_drawn_but_can_be_asked_for() -> None:
    assert len(HELD_OUT) == len(set(HELD_OUT)) == 12
    assert set(HELD_OUT) | set(TRAINED) == set(LABELS)
    assert {sample_clip(seed).label for seed in range(1500)} == set(TRAINED)
    assert sample_clip(3, HELD_OUT[0]).label == HELD_OUT[0]


def test_every_word_is_still_trained_in_some_combination() -> None:
    for field in ("shape", "colour", "direction"):
        trained = {getattr(label, field) for label in TRAINED}
        assert trained == {getattr(label, field) for label in LABELS}


def test_evaluation_pairs_mix_all_labels() -> None:
    pairs = evaluation_pairs(64)
    assert len({seed for seed, _ in pairs}) == len({label for _, label in pairs}) == 64
    assert any(label in HELD_OUT for _, label in pairs)


def test_a_caption_without_a_direction_is_refused() -> None:
    with pytest.raises(ValueError, match="exactly one"):
        parse_caption("a red circle")
