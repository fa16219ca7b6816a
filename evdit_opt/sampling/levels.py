"""What a scheduler's numbers mean: ``z = alpha * clean + sigma * noise`` for every wrapped class.

All coefficients are Python floats, so nothing is rounded before it meets a tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from evdit_opt.errors import SchedulerError, UnsupportedInputError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "PREDICTIONS",
    "TABLE_CLASSES",
    "WRAPPABLE",
    "NoiseLevels",
    "check_first_order",
    "clean_and_noise",
    "convention_of",
    "noise_levels",
    "prediction_type_of",
    "quieter_level",
]

SIGMA_CLASSES = (
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "UniPCMultistepScheduler",
)
TABLE_CLASSES = ("CogVideoXDDIMScheduler", "DDIMScheduler")
"""Schedulers without ``sigmas``: their level is looked up in ``alphas_cumprod`` by timestep."""
WRAPPABLE = tuple(sorted(SIGMA_CLASSES + TABLE_CLASSES))
PREDICTIONS = ("epsilon", "flow_prediction", "sample", "v_prediction")


@dataclass(frozen=True, kw_only=True, slots=True)
class NoiseLevels:
    """Signal and noise at the points of a schedule, the terminal point last.

    Attributes:
        alpha: what the clean sample is multiplied with, one float a point.
        sigma: standard deviation of the noise, one float a point, falling from point to point
            relative to alpha.
    """

    alpha: tuple[float, ...]
    sigma: tuple[float, ...]

    def at(self, points: Sequence[int]) -> NoiseLevels:
        """The levels at some of the points."""
        return NoiseLevels(
            alpha=tuple(self.alpha[i] for i in points), sigma=tuple(self.sigma[i] for i in points)
        )

    def log_snr(self) -> tuple[float, ...]:
        """``log(alpha / sigma)``, one a point; infinite for pure noise and for no noise."""
        return tuple(
            (math.log(a) if a > 0 else -math.inf) - (math.log(s) if s > 0 else -math.inf)
            for a, s in zip(self.alpha, self.sigma, strict=True)
        )


def convention_of(scheduler: Any) -> str:
    """Which of four conventions a diffusers scheduler follows.

    Returns:
        "flow" (alpha = 1 - sigma), "inverted flow" (Mochi's, sigma counts the signal),
        "exploding" (alpha = 1, the model sees a scaled input) or "preserving"
        (alpha^2 + sigma^2 = 1).

    Raises:
        UnsupportedInputError: a class that is not in ``WRAPPABLE``.
    """
    name = type(scheduler).__name__
    if name not in WRAPPABLE:
        other = (
            "convert it first, for example UniPCMultistepScheduler.from_config(scheduler.config)"
        )
        if name == "FewStepScheduler":
            other = "give the one it is made of, scheduler.wrapped"
        raise UnsupportedInputError(
            f"expected a scheduler among {', '.join(WRAPPABLE)}, got {name}; {other}"
        )
    if name == "FlowMatchEulerDiscreteScheduler":
        return "inverted flow" if scheduler.config.invert_sigmas else "flow"
    if name == "EulerDiscreteScheduler":
        return "exploding"
    return "flow" if scheduler.config.get("use_flow_sigmas") else "preserving"


def prediction_type_of(scheduler: Any) -> str:
    """What the model behind a scheduler predicts: one of ``PREDICTIONS``.

    Raises:
        SchedulerError: unknown, or one that has no meaning at the scheduler's noise levels.
    """
    flow = convention_of(scheduler).endswith("flow")
    kind = scheduler.config.get("prediction_type", "flow_prediction")
    fitting = ("flow_prediction", "sample") if flow else ("epsilon", "sample", "v_prediction")
    if kind not in fitting:
        levels = "flow sigmas" if flow else "alphas_cumprod"
        raise SchedulerError(
            f"expected a prediction_type among {', '.join(fitting)} for a scheduler with {levels}, "
            f"got {kind!r}; set prediction_type and use_flow_sigmas as the model was trained"
        )
    return str(kind)


def noise_levels(scheduler: Any) -> NoiseLevels:
    """Levels of a scheduler's present ``timesteps``, and the terminal one."""
    if type(scheduler).__name__ in TABLE_CLASSES:
        table = scheduler.alphas_cumprod.double()
        shares = [*table[scheduler.timesteps.long().cpu()].tolist(), scheduler.final_alpha_cumprod]
        squares = [float(share) for share in shares]
        return NoiseLevels(
            alpha=tuple(math.sqrt(share) for share in squares),
            sigma=tuple(math.sqrt(1 - share) for share in squares),
        )
    pairs = [_level(convention_of(scheduler), sigma) for sigma in scheduler.sigmas.tolist()]
    return NoiseLevels(alpha=tuple(a for a, _ in pairs), sigma=tuple(s for _, s in pairs))


def quieter_level(scheduler: Any, point: int, gamma: float) -> tuple[float, float]:
    """(alpha, sigma) at ``1 - gamma`` of the time of a point, after TCD (arXiv 2402.19159, eq. 12).

    Time is the noise level itself for flow matching and the training timestep, rounded down as TCD
    does, for all others.
    """
    convention = convention_of(scheduler)
    if convention == "flow":
        return _level(convention, (1 - gamma) * float(scheduler.sigmas[point]))
    if convention == "inverted flow":
        return _level(convention, 1 - (1 - gamma) * (1 - float(scheduler.sigmas[point])))
    timestep = math.floor((1 - gamma) * float(scheduler.timesteps[point]))
    share = float(scheduler.alphas_cumprod[timestep].double())
    ratio = math.sqrt((1 - share) / share)
    if type(scheduler).__name__ not in TABLE_CLASSES:
        # Rounded timesteps of Karras and similar spacings may lie on the noisier side of the point.
        ratio = min(ratio, float(scheduler.sigmas[point]))
    return _level(convention, ratio)


def clean_and_noise(
    kind: str,
    output: torch.Tensor,
    sample: torch.Tensor,
    alpha: float | torch.Tensor,
    sigma: float | torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a model's output says about the clean sample and the noise in ``sample``.

    Args:
        kind: one of ``PREDICTIONS``; the velocity of "flow_prediction" points towards the noise.
        output: the model's, any shape, float32 or float64.
        sample: ``alpha * clean + sigma * noise``, of the same shape and dtype.
        alpha: at the sample's level, or at each sample's (a tensor that broadcasts); not 0 for
            "epsilon".
        sigma: the same; not 0 for "sample".

    Returns:
        clean and noise, of the same shape and dtype.
    """
    if kind == "epsilon":
        return (sample - sigma * output) / alpha, output
    if kind == "sample":
        return output, (sample - alpha * output) / sigma
    if kind == "flow_prediction":
        return sample - sigma * output, sample + alpha * output
    # The velocity belongs to the sample scaled to unit variance: length is 1 unless exploding.
    if isinstance(alpha, torch.Tensor) and isinstance(sigma, torch.Tensor):
        length: Any = torch.hypot(alpha, sigma)
    else:
        length = math.hypot(alpha, sigma)
    clean = (alpha / length**2) * sample - (sigma / length) * output
    return clean, (sigma / length**2) * sample + (alpha / length) * output


def check_first_order(scheduler: Any) -> None:
    """Refuse what a deterministic first-order step would quietly leave out."""
    config = scheduler.config
    contradictions = {
        "stochastic_sampling=True": config.get("stochastic_sampling"),
        f"algorithm_type={config.get('algorithm_type')!r}": str(
            config.get("algorithm_type")
        ).startswith("sde"),
        f"variance_type={config.get('variance_type')!r}": config.get("variance_type"),
    }
    for setting, given in contradictions.items():
        if given:
            raise SchedulerError(
                f"expected a deterministic wrapped scheduler for first-order steps, got {setting}; "
                "turn it off, gamma is the setting for noise"
            )


def _level(convention: str, value: float) -> tuple[float, float]:
    """(alpha, sigma) for a number of a scheduler's ``sigmas``."""
    if convention == "flow":
        return 1 - value, value
    if convention == "inverted flow":
        return value, 1 - value
    if convention == "exploding":
        return 1.0, value
    length = math.hypot(1.0, value)
    return 1 / length, value / length
