"""``Config``: what a person may set about a calibration, with units."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args

from evdit_opt.errors import CalibrationError
from evdit_opt.grid import VideoGrid
from evdit_opt.inner import Inner, wrong_inner
from evdit_opt.kernels.dispatch import IMPLEMENTATIONS
from evdit_opt.kernels.residual import PRECISIONS, Precision
from evdit_opt.masks import Spacing, Weighting
from evdit_opt.quality import QualityReport

__all__ = ["QUALITIES", "Config", "Floors", "Quality"]

Quality = Literal["high", "balanced", "fast"]


class Floors(NamedTuple):
    """What clips must keep, compared with their dense twins; None: no bound.

    Attributes:
        min_psnr: dB.
        min_ssim: -1 to 1.
        max_flicker_ratio: no unit.
    """

    min_psnr: float | None = None
    min_ssim: float | None = None
    max_flicker_ratio: float | None = None


QUALITIES: Mapping[Quality, Floors] = {
    "high": Floors(min_psnr=35.0, max_flicker_ratio=1.1),  # side by side, looks the same
    "balanced": Floors(min_psnr=30.0, max_flicker_ratio=1.2),
    "fast": Floors(min_psnr=25.0, max_flicker_ratio=1.3),  # the same clip, details differ
}
"""What the names of qualities mean."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Settings of ``make_plan`` and ``optimize``. Use ``dataclasses.replace`` to change some.

    Attributes:
        threshold: r of Algorithm 1: the largest relative error of a site's attention output,
            ``||sparse - dense|| / ||dense||``, at which a rule is accepted. No unit. Larger is
            faster and further from the dense video.
            Decides how sparse a plan is only where none of the next six is given: kinds of plan
            are then compared at the lowest density at which some plan keeps it at every site.
        density: kept share of token pairs, mean over sites and steps, 0 to 1, to search for.
        speedup: how many times faster the mean forward of a run is to be, by milliseconds measured
            on this device (the model is compiled twice for it). Not together with ``density``.
        quality: the sparsest plan that looks as good as this: "high", "balanced" or "fast"; the
            floors in ``QUALITIES``. With ``density`` or ``speedup``: floors only.
        min_psnr: quality floor in dB: mean PSNR of clips to their dense twins. Without ``density``
            and ``speedup`` the sparsest plan that keeps it is searched, on calibration clips; all
            floors are checked on the verified clips, and missing one backs off towards dense. No
            floor can be given for a module, which makes no clips.
        min_ssim: quality floor: mean SSIM of the clips, -1 to 1.
        max_flicker_ratio: quality bound: mean ratio of background flicker to that of the dense
            clip, no unit.
        references: numbers of reference frames k to try.
        windows: numbers of frames kept on each side of the diagonal to try.
        weightings: how kept reference tiles are weighted, see ``Rule.weighting``. "fitted": by a
            strength per site; of those tried, 0 is "none" and 1 "balanced".
        spacings: where reference frames are placed, see ``Rule.spacing``.
        max_density: kept share of tiles, 0 to 1, above which a rule cannot pay: not tried.
        min_tokens: sequence length in tokens below which a site runs dense. Attention over short
            sequences is not where the time goes.
        calib_steps: denoising steps of every calibration and verification run. Where residuals are
            reused, best as many as you will use: they are renewed at fixed noise levels, so a run
            of more steps is faster, and one of fewer slower, than calibrated.
        reuse: whether sites may keep what their mask drops from step to step (pipelines only).
        reuse_memory: GiB that the residuals of one run (all sites and guidance branches) may take
            on the model's device; None: a quarter of its memory. 0: as ``reuse=False``. Runs that
            interleave, or whose conditioning is kept alive, hold theirs besides, up to four.
        reuse_trend: whether residuals may be carried on the way they were going between the last
            two refreshes. Closer to the dense clip at the same density; takes twice the memory, and
            is used where that lets all sites reuse.
        reuse_precisions: in which residuals may be kept, from the most exact on; the first in which
            all sites fit ``reuse_memory`` is taken. "model": that of the attention's output;
            "bfloat16"; "float8": e4m3 with a scale per batch entry and head, off by up to 6%.
        trial_prompts: how many calibration prompts (or calls) every candidate plan is run on, end
            to end, to choose between weightings and between searched and uniform masks.
        verify_prompts: how many of the given prompts (the last ones) are kept from the search, to
            measure quality on. 0 skips verification, and the plan then carries no quality; not
            together with a floor.
        seed: seed of the first run's noise; run n uses ``seed + n``.
        max_distinct_rules: different rules a plan may hold, or pairs of rules with their heads.
            Dynamo makes one graph for each when blocks are compiled one by one, and gives up
            after 8.
        grid: latent grid of the calibration calls, in tokens, for models that take tokens and are
            not told num_frames, height and width. The plan then fits clips of this size only.
        inner: what compiles the rewritten graph: "inductor", "eager", "aot_eager", "tensorrt", any
            other backend of torch.compile by name, or a callable.
        impl: implementation of tile attention, see ``evdit_opt.tile_attention``.
        progress: show progress bars on stderr.
        pipe_kwargs: further arguments of every call of a pipeline: num_frames, height, width,
            guidance_scale, negative_prompt, ...

    Raises:
        CalibrationError: if a value is outside its range.
    """

    threshold: float = 0.1
    density: float | None = None
    speedup: float | None = None
    quality: Quality | None = None
    min_psnr: float | None = None
    min_ssim: float | None = None
    max_flicker_ratio: float | None = None
    references: tuple[int, ...] = (0, 1, 2, 3, 4, 6, 8, 12)
    windows: tuple[int, ...] = (0, 1, 2)
    weightings: tuple[Weighting, ...] = ("none", "balanced", "fitted")
    spacings: tuple[Spacing, ...] = ("paper", "centred")
    max_density: float = 0.8
    min_tokens: int = 256
    calib_steps: int = 8
    reuse: bool = True
    reuse_memory: float | None = None
    reuse_trend: bool = True
    reuse_precisions: tuple[Precision, ...] = PRECISIONS
    trial_prompts: int = 2
    verify_prompts: int = 2
    seed: int = 0
    max_distinct_rules: int = 6
    grid: VideoGrid | None = None
    inner: Inner = "inductor"
    impl: str = "auto"
    progress: bool = True
    pipe_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require_number("threshold", self.threshold, 0.0)
        _require_number("max_density", self.max_density, 0.0, 1.0)
        for name, low in (("references", 0), ("windows", 0)):
            for value in _require_choices(name, getattr(self, name)):
                _require_int(name, value, low)
        for name, allowed in (
            ("weightings", get_args(Weighting)),
            ("spacings", ("paper", "centred")),
            ("reuse_precisions", PRECISIONS),
        ):
            for value in _require_choices(name, getattr(self, name)):
                _require_one_of(name, value, allowed)
        for name in ("min_tokens", "verify_prompts", "seed"):
            _require_int(name, getattr(self, name), 0)
        for name in ("calib_steps", "trial_prompts"):
            _require_int(name, getattr(self, name), 1)
        _require_int("max_distinct_rules", self.max_distinct_rules, 1, 8)
        if self.density is not None:
            _require_number("density", self.density, 0.0, 1.0)
        if self.speedup is not None:
            _require_number("speedup", self.speedup, 1.0)
            if self.density is not None:
                raise _wrong("speedup", "None where density is given", self.speedup)
        if self.quality is not None:
            _require_one_of("quality", self.quality, tuple(QUALITIES))
        if self.reuse_memory is not None:
            _require_number("reuse_memory", self.reuse_memory, 0.0)
        if self.min_psnr is not None:
            _require_number("min_psnr", self.min_psnr, 0.0)
        if self.min_ssim is not None:
            _require_number("min_ssim", self.min_ssim, -1.0, 1.0)
        if self.max_flicker_ratio is not None:
            _require_number("max_flicker_ratio", self.max_flicker_ratio, 0.0)
        if self.has_floors and self.verify_prompts == 0:
            raise _wrong("verify_prompts", "1 or more where a quality floor is given", 0)
        _require_one_of("impl", self.impl, IMPLEMENTATIONS)
        if problem := wrong_inner(self.inner, "Config.inner"):
            raise CalibrationError(problem)
        if not isinstance(self.grid, (VideoGrid, NoneType)):
            raise _wrong("grid", "a VideoGrid", self.grid)
        for name in ("progress", "reuse", "reuse_trend"):
            if not isinstance(getattr(self, name), bool):
                raise _wrong(name, "True or False", getattr(self, name))
        if not isinstance(self.pipe_kwargs, Mapping):
            raise _wrong("pipe_kwargs", "a dict of pipeline arguments", self.pipe_kwargs)

    @property
    def repeatable_impl(self) -> str:
        """``impl``, or a rule of thumb in place of what is measured.

        Calibrating twice gives equal plans only if no result depends on which kernel was faster.
        """
        return "static" if self.impl == "auto" else self.impl

    @property
    def floors(self) -> Floors:
        """The floors given, and those of ``quality`` where none is."""
        given = Floors(self.min_psnr, self.min_ssim, self.max_flicker_ratio)
        if self.quality is None:
            return given
        own = QUALITIES[self.quality]
        return Floors(*(a if a is not None else b for a, b in zip(given, own, strict=True)))

    @property
    def has_floors(self) -> bool:
        """Whether clips must keep anything."""
        return any(bound is not None for bound in self.floors)

    def missed_floors(self, quality: QualityReport | None) -> tuple[str, ...]:
        """Which floors clips miss, in words; none if there is nothing to judge."""
        if quality is None:
            return ()
        missed = []
        floors, flicker = self.floors, quality.flicker_ratio
        if floors.min_psnr is not None and quality.psnr.mean < floors.min_psnr:
            missed.append(f"PSNR {quality.psnr.mean:.2f} dB, floor {floors.min_psnr} dB")
        if floors.min_ssim is not None and quality.ssim.mean < floors.min_ssim:
            missed.append(f"SSIM {quality.ssim.mean:.4f}, floor {floors.min_ssim}")
        bound = floors.max_flicker_ratio
        if bound is not None and flicker is not None and flicker.mean > bound:
            missed.append(f"flicker {flicker.mean:.2f} x dense, bound {bound}")
        return tuple(missed)


def _wrong(name: str, expected: str, value: object) -> CalibrationError:
    return CalibrationError(f"expected Config.{name} to be {expected}, got {value!r}")


def _require_int(name: str, value: object, low: int, high: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        bounds = f">= {low}" if high == math.inf else f"in {low}..{high}"
        raise _wrong(name, f"an integer {bounds}", value)


def _require_number(name: str, value: object, low: float, high: float = math.inf) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:  # type: ignore[arg-type, operator]
        bounds = f">= {low}" if high == math.inf else f"in {low}..{high}"
        raise _wrong(name, f"a finite number {bounds}", value)


def _require_choices(name: str, value: object) -> tuple[object, ...]:
    if not isinstance(value, tuple) or not value or any(value.count(v) > 1 for v in value):
        raise _wrong(name, "a non-empty tuple of different values", value)
    return value


def _require_one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise _wrong(name, f"one of {', '.join(allowed)}", value)
