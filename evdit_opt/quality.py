"""How close a video is to its dense twin, and how steady: definitions and units.

A video is a float array or tensor ``[frames, height, width, 3]`` in 0..1. A *twin* is the clip the
dense model makes from the same prompt and noise. Luma is Rec. 709: .2126 R + .7152 G + .0722 B.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from evdit_opt.errors import CalibrationError, NonFiniteOutputError
from evdit_opt.strict_json import OPTIONAL

__all__ = [
    "MAX_PSNR",
    "Measured",
    "QualityReport",
    "compare",
    "flicker",
    "flicker_ratio",
    "motion_consistency",
    "psnr",
    "ssim",
    "static_region",
]

Video = np.ndarray | torch.Tensor
MAX_PSNR = 100.0
"""What a clip counts, in dB, that equals its twin up to rounding, so that means stay finite."""

SSIM_WINDOW = 11  # pixels
SSIM_SMALL = (0.01**2, 0.03**2)  # the paper's C1 and C2, of values in 0..1
STATIC_TOLERANCE = 0.1  # luma; a trained small model's own background noise is below .03
MIN_STATIC_SHARE = 0.01
RESAMPLES = 10_000
FLICKER_FLOOR = 0.5 / 255  # half a step of 8-bit video: nobody can see less


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """A mean over clips.

    Attributes:
        mean: of one value per clip.
        stderr: its standard error, ``s / sqrt(n)`` with the sample deviation s; None for one clip.
        low: lower end of a 95% interval of the mean: a bootstrap over clips (percentiles of 10,000
            resamples with a fixed seed; too narrow for fewer than about ten). None for one clip.
        high: its upper end.
    """

    mean: float
    stderr: float | None
    low: float | None = field(default=None, metadata={OPTIONAL: True})
    high: float | None = field(default=None, metadata={OPTIONAL: True})

    def __post_init__(self) -> None:
        for value in (self.mean, self.stderr, self.low, self.high):
            if value is not None and not math.isfinite(value):
                raise NonFiniteOutputError(f"expected finite quality figures, got {self}")

    @classmethod
    def of(cls, values: Sequence[float]) -> "Measured":
        """The mean of one value per clip, at least one, with its errors."""
        mean, count = float(np.mean(values)), len(values)
        if count == 1:
            return cls(mean=mean, stderr=None)
        stderr = float(np.std(values, ddof=1)) / math.sqrt(count)
        drawn = np.random.default_rng(0).choice(np.asarray(values), (RESAMPLES, count)).mean(1)
        low, high = (float(end) for end in np.quantile(drawn, (0.025, 0.975)))
        return cls(mean=mean, stderr=stderr, low=low, high=high)

    def __str__(self) -> str:
        if self.low is not None and self.high is not None:
            return f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f})"
        return f"{self.mean:.3f}" + (f" ± {self.stderr:.3f}" if self.stderr is not None else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityReport:
    """Clips compared with their dense twins, paired clip by clip.

    Attributes:
        clips: number of pairs.
        psnr: dB, each clip capped at ``MAX_PSNR``; higher is closer.
        ssim: -1 to 1; 1 is identical.
        flicker_ratio: background flicker over the twin's; 1 is as steady as dense, higher is worse.
            None where no clip has a static region (a moving camera).
        motion_consistency: -1 to 1; 1: everything changes as in the twin.
    """

    clips: int
    psnr: Measured
    ssim: Measured
    flicker_ratio: Measured | None
    motion_consistency: Measured

    def describe(self) -> str:
        """One line for people."""
        return (
            f"PSNR {self.psnr} dB, SSIM {self.ssim}, flicker x {self.flicker_ratio or 'n/a'}, "
            f"motion consistency {self.motion_consistency} ({self.clips} clips, 95% intervals)"
        )


def psnr(candidate: Video, dense: Video) -> float:
    """Peak signal-to-noise ratio in dB: ``-10 log10(mean squared error)``, ``inf`` if equal."""
    a, b = _pair(candidate, dense)
    error = (a - b).square().mean().item()
    return math.inf if error == 0.0 else -10.0 * math.log10(error)


def ssim(candidate: Video, dense: Video) -> float:
    """Structural similarity, mean over frames (Gaussian window of 11 pixels, sigma 1.5).

    Wang et al., "Image quality assessment: from error visibility to structural similarity", 2004,
    with frames reflected at their edges, as torchmetrics does.
    """
    a, b = _pair(candidate, dense)
    if min(a.shape[1:3]) < SSIM_WINDOW:
        raise CalibrationError(
            f"expected frames of at least 11 x 11 pixels for SSIM, got {a.shape}"
        )
    small_mean, small_variance = SSIM_SMALL
    total = 0.0
    for one, other in zip(a, b, strict=True):  # a frame at a time stays in the cache
        mean_a, mean_b, aa, bb, ab = _blurred(
            torch.stack([one, other, one * one, other * other, one * other])
        )
        luminance = (2 * mean_a * mean_b + small_mean) / (mean_a**2 + mean_b**2 + small_mean)
        variances = aa - mean_a**2 + bb - mean_b**2
        covariance = ab - mean_a * mean_b
        structure = (2 * covariance + small_variance) / (variances + small_variance)
        total += float((luminance * structure).mean())
    return total / len(a)


def _blurred(images: torch.Tensor) -> torch.Tensor:
    """``[..., height, width, 3]`` under the Gaussian window."""
    side = SSIM_WINDOW // 2
    weights = torch.exp(-(torch.arange(-side, side + 1) ** 2) / (2 * 1.5**2)).tolist()
    for dim in (-3, -2):
        length = images.shape[dim]
        behind = range(length - 2, length - 2 - side, -1)
        reflected = torch.tensor([*range(side, 0, -1), *range(length), *behind])
        images = images.index_select(dim, reflected)
        # Sums of shifted images: ten times faster than convolutions in float64 on a CPU.
        shifted = [images.narrow(dim, start, length) for start in range(SSIM_WINDOW)]
        images = shifted[0] * (weights[0] / sum(weights))
        for image, weight in zip(shifted[1:], weights[1:], strict=True):
            images.add_(image, alpha=weight / sum(weights))
    return images


def static_region(video: Video, tolerance: float = STATIC_TOLERANCE) -> torch.Tensor:
    """Pixels that no motion ever covers: bool ``[height, width]``.

    A pixel is static if, in every frame, its luma is within ``tolerance`` of its median over time.
    """
    luma = _video(video) @ torch.tensor([0.2126, 0.7152, 0.0722], dtype=torch.float64)
    median = torch.from_numpy(np.median(luma.numpy(), axis=0))  # torch's takes the lower of two
    return ((luma - median).abs() <= tolerance).all(0)


def flicker(video: Video, static: torch.Tensor | None = None) -> float:
    """Mean over static pixels and channels of the standard deviation over time, in units of 0..1.

    Args:
        video: the clip.
        static: bool ``[height, width]``; best the twin's :func:`static_region`, so that strong
            flicker is not taken for motion. None: the clip's own.

    Returns:
        The flicker; NaN where less than 1% of the pixels are static, as under a moving camera.
    """
    pixels = _video(video)
    static = static_region(pixels) if static is None else static
    if static.float().mean() < MIN_STATIC_SHARE:
        return math.nan
    return pixels[:, static].std(0, correction=0).mean().item()


def flicker_ratio(candidate: Video, dense: Video) -> float:
    """Flicker of a clip over its twin's, both in the twin's static region.

    Half an 8-bit step is added to each, so that a perfectly still twin does not make noise nobody
    can see look infinite. NaN where the twin has no static region.
    """
    a, b = _pair(candidate, dense)
    static = static_region(b)
    return (flicker(a, static) + FLICKER_FLOOR) / (flicker(b, static) + FLICKER_FLOOR)


def motion_consistency(candidate: Video, dense: Video) -> float:
    """Cosine between the changes from frame to frame of a clip and of its twin, -1 to 1.

    1: everything changes where, when and how it does in the twin (up to one factor); 0: unrelated
    changes. Two clips without any change score 1, one such clip 0.
    """
    a, b = (video.diff(dim=0).flatten() for video in _pair(candidate, dense))
    norms = float(torch.linalg.vector_norm(a)), float(torch.linalg.vector_norm(b))
    if 0.0 in norms:
        return float(norms == (0.0, 0.0))
    return max(-1.0, min(1.0, float(a @ b) / (norms[0] * norms[1])))


def compare(candidates: Sequence[Video], dense: Sequence[Video]) -> QualityReport:
    """Compare clips with their twins, pair by pair.

    Raises:
        NonFiniteOutputError: on NaN or infinity in a video.
        CalibrationError: if there are no clips, or two of a pair differ in shape.
    """
    if len(candidates) != len(dense) or not dense:
        raise CalibrationError(
            "expected as many clips as dense twins, at least one, "
            f"got {len(candidates)} and {len(dense)}"
        )

    def measure(metric: Callable[[Video, Video], float]) -> list[float]:
        return [metric(a, b) for a, b in zip(candidates, dense, strict=True)]

    flickers = [value for value in measure(flicker_ratio) if not math.isnan(value)]
    return QualityReport(
        clips=len(dense),
        psnr=Measured.of([min(value, MAX_PSNR) for value in measure(psnr)]),
        ssim=Measured.of(measure(ssim)),
        flicker_ratio=Measured.of(flickers) if flickers else None,
        motion_consistency=Measured.of(measure(motion_consistency)),
    )


def _pair(a: Video, b: Video) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = _video(a), _video(b)
    if first.shape != second.shape:
        raise CalibrationError(
            f"expected two videos of one shape, got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    return first, second


def _video(video: Video) -> torch.Tensor:
    """The video as a float64 CPU tensor, checked."""
    pixels = torch.as_tensor(video).detach().cpu()
    if pixels.ndim != 4 or pixels.shape[-1] != 3 or 0 in pixels.shape:
        raise CalibrationError(
            f"expected a video [frames, height, width, 3], got {tuple(pixels.shape)}"
        )
    if not pixels.is_floating_point():
        raise CalibrationError(f"expected floats in 0..1, got {pixels.dtype}; divide by 255")
    if not torch.isfinite(pixels).all():
        raise NonFiniteOutputError(
            "expected finite pixels, got NaN or infinity; check the model's dtype"
        )
    return pixels.double()
