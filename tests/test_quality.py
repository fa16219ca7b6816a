import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from evdit_opt.errors import CalibrationError, NonFiniteOutputError
from evdit_opt.quality import (
    FLICKER_FLOOR,
    MAX_PSNR,
    Measured,
    compare,
    flicker,
    flicker_ratio,
    motion_consistency,
    psnr,
    ssim,
    static_region,
)

FRAMES, HEIGHT, WIDTH = 10, 32, 48


def noise(scale: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(FRAMES, HEIGHT, WIDTH, 3, generator=generator)


def moving_square(speed: int = 3) -> torch.Tensor:
    """A white square of 8 x 8 moves right over a grey background."""
    video = torch.full((FRAMES, HEIGHT, WIDTH, 3), 0.3)
    for frame in range(FRAMES):
        left = 2 + speed * frame
        video[frame, 12:20, left : left + 8] = 0.9
    return video


def flashing(video: torch.Tensor, amplitude: float) -> torch.Tensor:
    """Everything but the square goes up and down by ``amplitude`` from frame to frame."""
    sign = torch.tensor([1.0, -1.0]).repeat(FRAMES // 2)[:, None, None, None]
    return torch.where(video == 0.3, video + amplitude * sign, video)


def test_psnr_of_equal_videos_is_infinite() -> None:
    assert psnr(moving_square(), moving_square().clone()) == math.inf


@pytest.mark.parametrize("offset", [0.5, 0.1, 0.001])
def test_psnr_of_a_constant_error_is_known(offset: float) -> None:
    video = torch.zeros(2, 16, 16, 3, dtype=torch.float64)
    assert psnr(video + offset, video) == pytest.approx(-20 * math.log10(offset))


def test_psnr_of_noise_is_known() -> None:
    video = moving_square()
    assert psnr(video + noise(0.05), video) == pytest.approx(-20 * math.log10(0.05), abs=0.1)


def test_ssim_is_one_for_equal_and_falls_with_noise() -> None:
    video = moving_square()
    values = [ssim(video + noise(scale), video) for scale in (0.0, 0.02, 0.1)]
    assert values[0] == pytest.approx(1.0)
    assert values[0] > values[1] > values[2]
    assert abs(ssim(noise(1.0, seed=1), noise(1.0, seed=2))) < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ssim_is_that_of_torchmetrics(dtype: torch.dtype) -> None:
    video, other = moving_square().to(dtype), (moving_square(2) + noise(0.1)).clamp(0, 1).to(dtype)
    frames = [clip.double().permute(0, 3, 1, 2) for clip in (video, other)]
    expected = float(structural_similarity_index_measure(*frames, data_range=1.0))
    # torchmetrics makes its window in float32
    assert ssim(video, other) == pytest.approx(expected, rel=20 * torch.finfo(torch.float32).eps)


def test_ssim_of_two_flat_videos_is_known() -> None:
    flat = torch.ones(2, 16, 16, 3)
    a, b, c1 = 0.4, 0.6, 0.01**2  # with no variance, only the luminance term is left
    expected = (2 * a * b + c1) / (a**2 + b**2 + c1)
    assert ssim(a * flat, b * flat) == pytest.approx(expected, abs=1e-5)


def test_a_still_video_does_not_flicker() -> None:
    assert flicker(moving_square()[:1].expand(FRAMES, -1, -1, -1)) == 0.0


def test_motion_over_a_still_background_is_no_flicker() -> None:
    video = moving_square()
    region = static_region(video)
    assert flicker(video) == 0.0
    assert not region[12:20, 2:37].any()
    assert region[:12].all()
    assert region[20:].all()


@pytest.mark.parametrize("amplitude", [0.02, 0.05])
def test_a_flashing_background_is_flicker_of_its_deviation(amplitude: float) -> None:
    video = moving_square()
    flashed = flashing(video, amplitude)
    assert flicker(flashed) == pytest.approx(amplitude, rel=1e-4)
    expected = (amplitude + FLICKER_FLOOR) / FLICKER_FLOOR
    assert flicker_ratio(flashed, video) == pytest.approx(expected, rel=1e-4)
    assert flicker_ratio(video, flashed) == pytest.approx(1 / expected, rel=1e-4)


def test_strong_flicker_is_not_taken_for_motion_when_the_twin_stands_still() -> None:
    video = moving_square()
    strong = flashing(video, 0.25)
    assert flicker(strong, static_region(video)) == pytest.approx(0.25, rel=1e-4)
    assert flicker_ratio(strong, video) > 100


def test_a_moving_camera_has_no_static_region() -> None:
    stripes = torch.zeros(FRAMES, HEIGHT, WIDTH, 3)
    for frame in range(FRAMES):
        stripes[frame, :, (torch.arange(WIDTH) + frame) % 4 < 2] = 1.0
    assert not static_region(stripes).any()
    assert math.isnan(flicker(stripes))
    assert math.isnan(flicker_ratio(stripes, stripes))
    assert compare([stripes], [stripes]).flicker_ratio is None


def test_motion_consistency_knows_direction_speed_and_stillness() -> None:
    video = moving_square()
    still = video[:1].expand_as(video)
    assert motion_consistency(video, video) == pytest.approx(1.0)
    assert motion_consistency(video.flip(0), video) < 0
    assert motion_consistency(moving_square(speed=1), video) < 0.6
    assert motion_consistency(still, still) == 1.0
    assert motion_consistency(still, video) == 0.0
    assert motion_consistency(0.5 * video + 0.2, video) == pytest.approx(1.0)


def test_compare_pairs_clip_by_clip() -> None:
    video = moving_square()
    report = compare([video + 0.1, video + 0.01], [video, video])
    assert report.clips == 2
    assert report.psnr.mean == pytest.approx(30.0, abs=1e-3)
    assert report.psnr.stderr == pytest.approx(10.0, abs=1e-3)  # 20 and 40 dB: s = 14.1, / sqrt 2
    assert report.flicker_ratio is not None
    assert report.flicker_ratio.mean == pytest.approx(1.0)
    assert report.flicker_ratio.stderr == pytest.approx(0.0)
    assert report.motion_consistency.mean == pytest.approx(1.0)
    assert "30.000 (20.000 to 40.000) dB" in report.describe()


def test_compare_of_equal_clips_is_finite() -> None:
    video = moving_square().numpy()
    report = compare([video], [video])
    assert report.psnr == Measured(mean=MAX_PSNR, stderr=None)
    assert report.ssim.mean == pytest.approx(1.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize(
    "metric",
    [psnr, ssim, flicker_ratio, motion_consistency, lambda a, b: compare([a], [b])],
    ids=["psnr", "ssim", "flicker_ratio", "motion_consistency", "compare"],
)
def test_a_video_that_is_not_finite_is_refused(
    metric: Callable[[torch.Tensor, torch.Tensor], object], bad: float
) -> None:
    broken = moving_square()
    broken[3, 4, 5, 1] = bad
    for pair in ((broken, moving_square()), (moving_square(), broken)):
        with pytest.raises(NonFiniteOutputError, match="NaN or infinity"):
            metric(*pair)


@pytest.mark.parametrize(
    ("a", "b", "match"),
    [
        (np.zeros((2, 16, 16, 3), np.uint8), np.zeros((2, 16, 16, 3), np.uint8), "divide by 255"),
        (torch.zeros(2, 3, 16, 16), torch.zeros(2, 3, 16, 16), r"\[frames, height, width, 3\]"),
        (torch.zeros(2, 16, 16, 3), torch.zeros(3, 16, 16, 3), "of one shape"),
        (torch.zeros(0, 16, 16, 3), torch.zeros(0, 16, 16, 3), "expected a video"),
    ],
    ids=["uint8", "channels-first", "shapes-differ", "no-frames"],
)
def test_what_is_no_pair_of_videos_is_refused(a: object, b: object, match: str) -> None:
    with pytest.raises(CalibrationError, match=match):
        psnr(a, b)  # type: ignore[arg-type]


def test_clips_without_twins_are_refused() -> None:
    for candidates, dense in (([], []), ([moving_square()], [])):
        with pytest.raises(CalibrationError, match="as many clips as dense twins"):
            compare(candidates, dense)


def test_frames_too_small_for_ssim_are_refused() -> None:
    with pytest.raises(CalibrationError, match="at least 11 x 11"):
        ssim(torch.zeros(2, 10, 16, 3), torch.zeros(2, 10, 16, 3))


def test_intervals_hold_the_mean_and_shrink_with_more_clips() -> None:
    chance = np.random.default_rng(1)
    widths = []
    for count in (8, 128):
        measured = Measured.of(chance.normal(30.0, 2.0, count).tolist())
        assert measured.low is not None
        assert measured.high is not None
        assert measured.stderr is not None
        assert measured.low < measured.mean < measured.high
        # Normal values: about 1.96 standard errors to each side, less for few (percentiles).
        assert 0.8 * 1.96 < (measured.high - measured.low) / 2 / measured.stderr < 1.1 * 1.96
        widths.append(measured.high - measured.low)
    assert widths[1] < widths[0] / 2
    assert Measured.of([30.0]).low is None
