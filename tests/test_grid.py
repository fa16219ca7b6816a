import pytest
from hypothesis import given
from hypothesis import strategies as st

from evdit_opt.errors import MaskError
from evdit_opt.grid import TokenLayout, VideoGrid

SIZES = st.integers(1, 50)


@given(SIZES, SIZES, SIZES, st.integers(0, 600), st.integers(0, 600))
def test_frames_tile_the_video_part_of_the_sequence(
    frames: int, height: int, width: int, prefix: int, suffix: int
) -> None:
    layout = TokenLayout(VideoGrid(frames, height, width), prefix, suffix)
    ends = [layout.prefix]
    for frame in range(frames):
        part = layout.frame_slice(frame)
        assert part.start == ends[-1]
        assert part.stop - part.start == layout.grid.tokens_per_frame == height * width
        ends.append(part.stop)
    assert ends[-1] == layout.prefix + layout.grid.tokens == layout.seq_len - layout.suffix
    assert layout.text_tokens == prefix + suffix


def test_the_paper_s_720p_grid() -> None:
    assert VideoGrid(8, 45, 80).tokens == 28_800
    assert VideoGrid(24, 45, 80).tokens == 86_400


@pytest.mark.parametrize("bad", [0, -1, 2.0, True, "3", None], ids=repr)
def test_a_size_that_is_no_positive_integer_is_refused(bad: object) -> None:
    for sizes in ((bad, 1, 1), (1, bad, 1), (1, 1, bad)):
        with pytest.raises(MaskError, match=r"expected VideoGrid\..* got"):
            VideoGrid(*sizes)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [-1, 2.0, True, "3", None], ids=repr)
def test_a_text_length_that_is_no_count_is_refused(bad: object) -> None:
    for name in ("prefix", "suffix"):
        with pytest.raises(MaskError, match=f"expected TokenLayout.{name}"):
            TokenLayout(VideoGrid(1, 1, 1), **{name: bad})  # type: ignore[arg-type]
