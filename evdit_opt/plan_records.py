"""The records a plan is made of, but for its sites (see ``site_plan``).

Each refuses values outside its range with a ``PlanError``.
"""

import bisect
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from evdit_opt.errors import PlanError
from evdit_opt.kernels.residual import PRECISIONS, Precision
from evdit_opt.strict_json import OPTIONAL, parse, shorten

__all__ = [
    "MAX_TOKENS",
    "CalibrationRecord",
    "ChangedLayer",
    "FinetuneRecord",
    "ReuseRecord",
    "SpeedRecord",
    "TrendPoint",
    "TrialRecord",
    "call_record",
    "require_int",
    "require_number",
    "require_text",
]

MAX_TOKENS = 2**31 - 1
MAX_REFRESHES = 10_000
MAX_DAMPING = 10.0
MAX_ARGUMENTS, MAX_ARGUMENT = 100, 4000
"""Arguments of a call, and characters of each: a negative prompt of several hundred words fits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrendPoint:
    """How far residuals are carried on at one noise level.

    Attributes:
        level: noise level, in units of the model's timestep argument.
        damping: share of the way that they would go on a straight line through the last two
            refreshes, by noise level; 0: they stay as they were.
    """

    level: float
    damping: float

    def __post_init__(self) -> None:
        require_number("level", self.level, 0.0)
        require_number("damping", self.damping, 0.0, MAX_DAMPING)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReuseRecord:
    """Which sites carry what their mask drops from step to step, and when they renew it.

    Attributes:
        sites: names of the sites; each has a rule, used between refreshes.
        timestep: the parameter of the model's forward that holds the noise level.
        refresh_at: noise levels, in units of that parameter, descending. The first step at or below
            each of them is a refresh; steps above the first are dense.
        levels: noise levels of all steps of the run that this was found for, descending; empty if
            not known.
        trend: how residuals are carried on the way they were going, by noise level, descending;
            interpolated in between. Empty: they stay as they were at the last refresh.
        precision: in which residuals are kept: the model's own, or a smaller one; see
            ``kernels.residual``.
        memory: bytes that the residuals of a run took in calibration; None if not known.
    """

    sites: tuple[str, ...]
    timestep: str
    refresh_at: tuple[float, ...]
    levels: tuple[float, ...] = field(default=(), metadata={OPTIONAL: True})
    trend: tuple[TrendPoint, ...] = field(default=(), metadata={OPTIONAL: True})
    precision: Precision = field(default="model", metadata={OPTIONAL: True})
    memory: int | None = field(default=None, metadata={OPTIONAL: True})

    def __post_init__(self) -> None:
        require_text("timestep", self.timestep, 100)
        if self.precision not in PRECISIONS:
            raise PlanError(f"expected precision to be one of {PRECISIONS}, got {self.precision!r}")
        if self.memory is not None:
            require_int("memory", self.memory, 0, 2**63 - 1)
        for name in self.sites:
            require_text("sites", name, 256)
        if not 1 <= len(self.refresh_at) <= MAX_REFRESHES:
            raise PlanError(
                f"expected 1 to {MAX_REFRESHES} refresh levels, got {len(self.refresh_at)}"
            )
        for level in self.refresh_at:
            require_number("refresh_at", level, 0.0)
        trend = tuple(point.level for point in self.trend)
        for levels in (self.levels, trend):
            if len(levels) > MAX_REFRESHES:
                raise PlanError(f"expected at most {MAX_REFRESHES} levels, got {len(levels)}")
        for level in self.levels:
            require_number("levels", level, 0.0)
        for levels in (self.refresh_at, self.levels, trend):
            if any(a <= b for a, b in itertools.pairwise(levels)):
                raise PlanError("expected noise levels in descending order, each once")
        if self.trend and self.precision == "float8":
            raise PlanError("expected no trend for residuals in float8, which rounds it away")
        if len(set(self.sites)) != len(self.sites) or not 1 <= len(self.sites) <= MAX_REFRESHES:
            raise PlanError(f"expected 1 to {MAX_REFRESHES} sites that reuse, each once")

    def due(self, level: float) -> int:
        """How many refresh levels lie at or above a noise level (up to rounding)."""
        return sum(level <= at * (1 + 1e-6) for at in self.refresh_at)

    def modes(self, levels: Sequence[float]) -> tuple[str, ...]:
        """What every step of a run asks of the sites that reuse: dense, refresh or reuse."""
        due = [0, *(self.due(level) for level in levels)]
        return tuple(
            "dense" if now == 0 else "refresh" if now > before else "reuse"
            for before, now in itertools.pairwise(due)
        )

    def renewals(self, levels: Sequence[float]) -> tuple[int, ...]:
        """Earlier steps of a run on which the residuals of its last step depend.

        Args:
            levels: noise levels of the run, up to that step.

        Returns:
            Numbers of steps: the latest refresh, two where residuals are carried on; none where the
            last step reuses nothing.
        """
        *earlier, last = self.modes(levels)
        refreshes = [step for step, mode in enumerate(earlier) if mode == "refresh"]
        return tuple(refreshes[-2 if self.trend else -1 :]) if last == "reuse" else ()

    def ahead(self, level: float, refreshed: Sequence[float]) -> float:
        """How much of the last change of residuals to add to them.

        Args:
            level: noise level of the step.
            refreshed: those of the last refreshes, the latest one last.
        """
        if not self.trend or len(refreshed) < 2:
            return 0.0
        before, since = refreshed[-2:]
        return self._damping(level) * (since - level) / (before - since)

    def _damping(self, level: float) -> float:
        points = self.trend
        place = bisect.bisect(points, -level, key=lambda point: -point.level)
        left, right = points[max(0, place - 1)], points[min(place, len(points) - 1)]
        if left.level == right.level:
            return left.damping
        share = (left.level - level) / (left.level - right.level)
        return left.damping + share * (right.damping - left.damping)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialRecord:
    """What a plan did to whole calibration runs, compared with the dense runs of the same seeds.

    Attributes:
        name: which plan: its weighting, and whether one rule serves all sites.
        density: mean density over sites.
        output: ``||sparse - dense|| / ||dense||`` of the video (pipeline) or output (module).
        temporal: the same for its change from frame to frame.
        psnr: dB to the dense clips, mean; None for a module, or if not known.
    """

    name: str
    density: float
    output: float
    temporal: float
    psnr: float | None = field(default=None, metadata={OPTIONAL: True})

    def __post_init__(self) -> None:
        require_text("name", self.name, 100)
        require_number("density", self.density, 0.0, 1.0)
        require_number("output", self.output, 0.0)
        require_number("temporal", self.temporal, 0.0)
        if self.psnr is not None:
            require_number("psnr", self.psnr, -1000.0, 1000.0)

    @property
    def score(self) -> float:
        """Trials are ranked by it, the smallest first: the geometric mean of both errors."""
        return (self.output * self.temporal) ** 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationRecord:
    """How a plan was found.

    Attributes:
        prompts_hash: hash of the calibration prompts (or calls).
        prompt_count: how many there were, held-out ones included.
        steps: denoising steps of every run.
        seed: seed of the first run.
        threshold: r of Algorithm 1 that gave the chosen rules.
        trials: plans of about equal density that were run end to end, the chosen one first.
        held_out_error: relative error of what held-out runs returned, video (pipeline) or output
            (module); None if none were held out.
        explored: plans that were run on the way to that density.
        call: the further arguments of every call of the pipeline, such as guidance_scale: names and
            values in JSON (numbers, texts, true, false, null), sorted; see :func:`call_record`.
    """

    prompts_hash: str
    prompt_count: int
    steps: int
    seed: int
    threshold: float
    trials: tuple[TrialRecord, ...] = ()
    held_out_error: float | None = None
    explored: tuple[TrialRecord, ...] = field(default=(), metadata={OPTIONAL: True})
    call: tuple[tuple[str, str], ...] = field(default=(), metadata={OPTIONAL: True})

    def __post_init__(self) -> None:
        require_text("prompts_hash", self.prompts_hash, 128)
        require_int("prompt_count", self.prompt_count, 1, MAX_TOKENS)
        require_int("steps", self.steps, 1, MAX_TOKENS)
        require_int("seed", self.seed, 0, 2**63 - 1)
        require_number("threshold", self.threshold, 0.0)
        if self.held_out_error is not None:
            require_number("held_out_error", self.held_out_error, 0.0)
        if len(self.call) > MAX_ARGUMENTS or list(self.call) != sorted(dict(self.call).items()):
            raise PlanError(f"expected at most {MAX_ARGUMENTS} arguments, each once, sorted")
        for name, text in self.call:
            require_text("call", name, 100)
            require_text(f"call.{name}", text, MAX_ARGUMENT)
            if isinstance(parse(text), (dict, list)):
                raise PlanError(f"expected call.{name} to be one value, got {text[:60]}")

    @property
    def arguments(self) -> dict[str, Any]:
        """Of ``call``, as the pipeline takes them."""
        return {name: parse(text) for name, text in self.call}

    def describe_call(self) -> str:
        """Of ``call``, for people."""
        return ", ".join(f"{name} {shorten(value)}" for name, value in self.arguments.items())


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeedRecord:
    """Time of one denoiser forward at the calibrated grid.

    Attributes:
        dense_ms: median milliseconds, dense, compiled the same way.
        optimized_ms: median milliseconds with the plan applied.
        device: what it ran on.
    """

    dense_ms: float
    optimized_ms: float
    device: str

    def __post_init__(self) -> None:
        require_number("dense_ms", self.dense_ms, 1e-6)
        require_number("optimized_ms", self.optimized_ms, 1e-6)
        require_text("device", self.device, 256)

    @property
    def speedup(self) -> float:
        """``dense_ms / optimized_ms``."""
        return self.dense_ms / self.optimized_ms


@dataclass(frozen=True, kw_only=True, slots=True)
class ChangedLayer:
    """A few weights of a linear layer, as training found and left them: see ``changed_layers``.

    Attributes:
        layer: path of the module.
        shape: of its weight.
        places: of the numbers in the flattened weight.
        before: the numbers that training began with.
        after: the trained ones, with what adapters add.
    """

    layer: str
    shape: tuple[int, int]
    places: tuple[int, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]

    def __post_init__(self) -> None:
        require_text("layer", self.layer, 256)
        for size in self.shape:
            require_int("shape", size, 1, MAX_TOKENS)
        if not 1 <= len(self.places) == len(self.before) == len(self.after) <= 100:
            raise PlanError("expected 1 to 100 places, and a number before and after for each")
        for place in self.places:
            require_int("places", place, 0, self.shape[0] * self.shape[1] - 1)
        for number in (*self.before, *self.after):
            require_number("before and after", number, -math.inf)
        if self.before == self.after:
            raise PlanError(f"expected {self.layer} to have changed, before and after are the same")


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneRecord:
    """The weights a plan is for, where fine-tuning made them, and the schedule they are for.

    Attributes:
        steps: of a run.
        full_steps: of the teacher's schedule.
        time_shift: see ``FewStepScheduler``.
        lora_rank: of the adapters; 0: all weights were trained.
        lora_modules: ends of the paths of the layers with adapters.
        weights_sha256: of ``weights.safetensors`` beside the plan.
        consistency: a step is a segment of a consistency model with guidance in its weights; else
            the wrapped solver steps, and guidance is as before.
        changed: by which these weights are told from those that training began with; empty if not
            known.
    """

    steps: int
    full_steps: int
    time_shift: float
    lora_rank: int
    lora_modules: tuple[str, ...]
    weights_sha256: str
    consistency: bool = field(default=True, metadata={OPTIONAL: True})
    changed: tuple[ChangedLayer, ...] = field(default=(), metadata={OPTIONAL: True})

    def __post_init__(self) -> None:
        require_int("steps", self.steps, 1, MAX_REFRESHES)
        require_int("full_steps", self.full_steps, self.steps, MAX_REFRESHES)
        require_number("time_shift", self.time_shift, 1e-6, 1e6)
        require_int("lora_rank", self.lora_rank, 0, MAX_REFRESHES)
        if len(self.lora_modules) > 100 or bool(self.lora_modules) != bool(self.lora_rank):
            raise PlanError("expected lora_modules, at most 100, where lora_rank is above 0")
        for name in self.lora_modules:
            require_text("lora_modules", name, 256)
        require_text("weights_sha256", self.weights_sha256, 64)
        if len(self.changed) > 100:
            raise PlanError(f"expected at most 100 changed layers, got {len(self.changed)}")

    def scheduler(self, base: Any) -> Any:
        """The few-step scheduler that these weights are for.

        Args:
            base: the pipeline's own scheduler, or one that this made already.
        """
        from evdit_opt.scheduler import FewStepScheduler

        return FewStepScheduler(
            getattr(base, "wrapped", base),
            steps=self.steps,
            segments=self.steps if self.consistency else None,
            full_steps=self.full_steps,
            time_shift=self.time_shift,
        )


def call_record(arguments: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """What of a pipeline's arguments a plan holds: no tensors, pictures, functions, long texts."""
    found = {}
    for name, value in sorted(arguments.items()):
        number = isinstance(value, (int, float)) and math.isfinite(value)
        if number or value is None or isinstance(value, str):
            text = json.dumps(value, ensure_ascii=not str(value).isprintable())
            if len(text) <= MAX_ARGUMENT:
                found[name] = text
    return tuple(list(found.items())[:MAX_ARGUMENTS])


def require_int(name: str, value: Any, low: int, high: int) -> None:
    """Refuse what is not an integer in ``low..high``; a bool is none."""
    if type(value) is not int or not low <= value <= high:
        raise PlanError(f"expected {name} to be an integer in {low}..{high}, got {value!r}")


def require_number(name: str, value: Any, low: float, high: float = math.inf) -> None:
    """Refuse what is not a finite number in ``low..high``."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:
        raise PlanError(f"expected {name} to be a finite number in {low}..{high}, got {value!r}")


def require_text(name: str, value: Any, limit: int) -> None:
    """Refuse what is not a short string that prints on one line."""
    if not isinstance(value, str) or not 1 <= len(value) <= limit or not value.isprintable():
        shown = ascii(value)[:60]
        raise PlanError(f"expected {name} to be 1 to {limit} printable characters, got {shown}")
