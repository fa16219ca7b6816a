"""The demo's pictures: readable files of the right size, showing the clips they were given."""

import imageio.v3 as iio
import numpy as np

from evdit_opt.demo.render import (
    CAPTION_HEIGHT,
    ENLARGE,
    MARGIN,
    TITLE_WIDTH,
    write_masks,
    write_side_by_side,
)
from tests.plans import PLAN


def test_side_by_side_shows_every_clip_where_it_belongs(tmp_path):
    frames, size = 5, 20
    clips = {
        title: [np.full((frames, size, size, 3), value + 0.3 * n) for n in range(2)]
        for title, value in (("dense", 0.1), ("sparse", 0.5))
    }
    mp4, gif = write_side_by_side(tmp_path, clips, ["a red circle", "a blue square"])
    video = iio.imread(mp4)
    assert len(video) == frames
    edge = ENLARGE * size + MARGIN
    for row, values in enumerate(clips.values()):
        for column, clip in enumerate(values):
            y = CAPTION_HEIGHT + row * edge + size // 2
            x = TITLE_WIDTH + column * edge + size // 2
            assert abs(video[0, y, x].astype(int) - 255 * clip[0, 0, 0]).max() < 8
    assert iio.imread(gif).shape[1:] == video.shape[1:]


def test_masks_are_a_picture(tmp_path):
    picture = iio.imread(write_masks(tmp_path / "masks.png", PLAN))
    assert picture.std() > 10
