"""The few-step scheduler: a diffusers scheduler made of another one.

Sources: multistep consistency models (Heek et al., arXiv 2403.06807, Algorithm 2) for the segments,
trajectory consistency distillation (arXiv 2402.19159, section 4.2) for gamma.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import diffusers
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from evdit_opt.errors import SchedulerError, UnsupportedInputError
from evdit_opt.sampling.levels import (
    TABLE_CLASSES,
    WRAPPABLE,
    NoiseLevels,
    check_first_order,
    clean_and_noise,
    convention_of,
    noise_levels,
    prediction_type_of,
    quieter_level,
)
from evdit_opt.sampling.settings import FewStepSettings

__all__ = ["FewStepOutput", "FewStepScheduler", "SchedulerMixin"]

OWN_KEYS = frozenset({"wrapped", *(field.name for field in fields(FewStepSettings))})


@dataclass
class FewStepOutput(BaseOutput):
    """What a step returns.

    Attributes:
        prev_sample: the sample at the next point, in the dtype of the model's output.
        pred_original_sample: the clean sample the model saw, float32 or float64.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


class FewStepScheduler(SchedulerMixin, ConfigMixin):
    """Runs a wrapped diffusers scheduler in few steps.

    The wrapped scheduler lays out its own schedule of ``full_steps``, with its shift and spacing;
    this one takes ``steps`` of its points. Everything that is not listed here (``timesteps``,
    ``sigmas``, ``add_noise``, ``scale_noise``, ``scale_model_input``, ``init_noise_sigma``, ...) is
    the wrapped scheduler's, on the shortened schedule, and exists where it does there.

    Without ``segments`` the wrapped solver itself steps from point to point: a step reducer for any
    model. With ``segments`` it is the sampler of multistep consistency models: the model predicts
    the clean sample at the start of a segment, and a deterministic first-order (DDIM) step carries
    it to the segment's edge; nothing is remembered between segments, because to a consistency model
    every segment is another function. At ``segments == steps == full_steps`` that is the wrapped
    scheduler's own first-order solver.

    Pipelines may ask for any ``num_inference_steps >= steps``, and always get ``steps``; where a
    pipeline counts on its own number (video to video with ``strength``), ask for ``steps``. Custom
    ``sigmas`` or ``timesteps`` replace the schedule of ``full_steps`` as the one shortened.

    Args:
        scheduler: one of ``levels.WRAPPABLE``; it is copied.
        steps: calls of the model.
        segments: of a consistency model, at most ``steps``; None for others.
        full_steps: length of the schedule that is shortened: the teacher's.
        placement: "even" in the schedule's own time (what consistency models are trained with),
            "log_snr", or positions in [0, 1), one a segment (a step, without segments), for example
            of `measure_placement`.
        time_shift: for "even": r of ``w -> r w / (1 + (r - 1) w)``, on top of the wrapped
            scheduler's own shift; see `placement.even`.
        gamma: TCD's stochasticity, 0 to 1: a segment's step lands at ``1 - gamma`` of the edge's
            time and adds noise up to the edge. Needs segments. The last step adds none.

    Attributes:
        generator: makes that noise where ``step`` is given no generator (Wan's pipeline gives
            none); None takes torch's global one.
        landing: numbers of the steps that land on a segment's edge; without segments, all.

    Raises:
        UnsupportedInputError: a scheduler that cannot be wrapped.
        SchedulerError: a setting out of range, or one the wrapped scheduler contradicts.
    """

    # What pipelines record: the module diffusers looks in, which does not need diffusers itself.
    __module__ = "evdit_opt.scheduler"
    order = 1

    def __init__(
        self,
        scheduler: SchedulerMixin,
        *,
        steps: int,
        segments: int | None = None,
        full_steps: int = 50,
        placement: str | Sequence[float] = "even",
        time_shift: float = 1.0,
        gamma: float = 0.0,
    ) -> None:
        self._settings = FewStepSettings(
            steps=steps,
            segments=segments,
            full_steps=full_steps,
            placement=tuple(placement) if isinstance(placement, (list, tuple)) else placement,
            time_shift=time_shift,
            gamma=gamma,
        )
        self._convention = convention_of(scheduler)
        self._prediction = prediction_type_of(scheduler)
        if gamma and scheduler.config.get("timestep_type") == "continuous":
            raise SchedulerError(
                f"expected gamma 0 with continuous timesteps, got {gamma}: its time is that of the "
                "training timesteps, of which this scheduler knows none"
            )
        # DDIM's own step knows only equal steps of the timesteps; first order is all it is.
        self._first_order = segments is not None or type(scheduler).__name__ in TABLE_CLASSES
        if self._first_order:
            check_first_order(scheduler)
        self._wrapped = copy.deepcopy(scheduler)
        self._levels: NoiseLevels | None = None
        self.landing: frozenset[int] = frozenset()
        self.generator: torch.Generator | None = None
        public = {key: value for key, value in scheduler.config.items() if key[0] != "_"}
        own = asdict(self._settings)
        if isinstance(self._settings.placement, tuple):
            own["placement"] = list(self._settings.placement)
        self.register_to_config(**public, wrapped=type(scheduler).__name__, **own)

    def __getattr__(self, name: str) -> Any:
        wrapped = self.__dict__.get("_wrapped")
        if wrapped is not None and not name.startswith("_") and hasattr(wrapped, name):
            return getattr(wrapped, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def wrapped(self) -> Any:
        """The scheduler this one is made of, a copy of the one given."""
        return self._wrapped

    @property
    def levels(self) -> NoiseLevels:
        """Signal and noise at ``timesteps`` and at the terminal point, for anyone who trains."""
        if self._levels is None:
            raise SchedulerError("expected set_timesteps first; call it with the step count")
        return self._levels

    def __len__(self) -> int:
        """Training timesteps of the wrapped scheduler."""
        return len(self._wrapped)

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any] | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Make one from its own configuration, or from that of a scheduler loaded from a file.

        Args:
            config: flat: the wrapped scheduler's entries and this class's arguments.
            return_unused_kwargs: also return what neither of the two knows.
            kwargs: override entries.

        Raises:
            UnsupportedInputError: the configuration names no scheduler that can be wrapped.
            SchedulerError: ``steps`` is missing, or a value out of range.
        """
        if not isinstance(config, Mapping):
            raise UnsupportedInputError(f"expected a configuration, got {config!r}")
        entries = {**config, **kwargs}
        name = entries.get("wrapped", entries.get("_class_name"))
        if name not in WRAPPABLE:
            raise UnsupportedInputError(
                f"expected a configuration of {', '.join(WRAPPABLE)}, got {name!r}; pass the "
                "scheduler itself: FewStepScheduler(pipe.scheduler, steps=8)"
            )
        if "steps" not in entries:
            raise SchedulerError("expected steps, got none; say how many, for example steps=8")
        theirs = {key: value for key, value in config.items() if key not in OWN_KEYS}
        overrides = {key: value for key, value in kwargs.items() if key not in OWN_KEYS}
        wrapped, unused = getattr(diffusers, name).from_config(
            {**theirs, "_class_name": name}, return_unused_kwargs=True, **overrides
        )
        own = {key: entries[key] for key in OWN_KEYS - {"wrapped"} if key in entries}
        made = cls(wrapped, **own)
        return (made, unused) if return_unused_kwargs else made

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        *,
        sigmas: Sequence[float] | None = None,
        timesteps: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Lay out the wrapped scheduler's schedule and keep ``steps`` points of it.

        Args:
            num_inference_steps: at least ``steps``; the result is the same for all of them.
            device: where ``timesteps`` go.
            sigmas: a schedule to shorten, in the wrapped scheduler's convention.
            timesteps: the same, as timesteps.
            mu: of dynamic shifting.

        Raises:
            SchedulerError: fewer steps asked for than ``steps``, a schedule the wrapped scheduler
                does not accept, or a first point of pure noise under epsilon prediction.
        """
        wrapped, settings = self._wrapped, self._settings
        given = {"sigmas": sigmas, "timesteps": timesteps, "mu": mu}
        given = {name: value for name, value in given.items() if value is not None}
        accepted = inspect.signature(wrapped.set_timesteps).parameters
        for name in given.keys() - accepted.keys():
            raise SchedulerError(
                f"expected no {name} for {type(wrapped).__name__}, whose set_timesteps does not "
                "take it; leave it out"
            )
        if num_inference_steps is not None and num_inference_steps < settings.steps:
            raise SchedulerError(
                f"expected num_inference_steps of at least steps ({settings.steps}), got "
                f"{num_inference_steps}; make a FewStepScheduler with fewer steps"
            )
        if sigmas is None and timesteps is None:
            given["num_inference_steps"] = settings.full_steps
        try:
            wrapped.set_timesteps(device=device, **given)
        except ValueError as error:
            raise SchedulerError(
                f"expected a schedule that {type(wrapped).__name__} accepts, got {given}: {error}; "
                "full_steps says how long it is, unless sigmas or timesteps do"
            ) from error
        full = noise_levels(wrapped)
        indices, self.landing = settings.indices(full)
        terminal = len(wrapped.timesteps)
        self._levels = full.at([*indices, terminal])
        if self._prediction == "epsilon" and self._levels.alpha[0] == 0:
            raise SchedulerError(
                "expected some signal at the first point, got none: noise prediction says nothing "
                "about the clean sample there; set rescale_betas_zero_snr=False"
            )
        wrapped.timesteps = wrapped.timesteps[indices]
        if type(wrapped).__name__ not in TABLE_CLASSES:
            wrapped.sigmas = wrapped.sigmas[[*indices, terminal]]
        wrapped.num_inference_steps = settings.steps

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        *,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        **extra: Any,
    ) -> Any:
        """From this point to the next.

        Args:
            model_output: any shape, float; of the wrapped scheduler's prediction type.
            timestep: one of ``timesteps``.
            sample: of the same shape, in the wrapped scheduler's convention.
            generator: for gamma's noise, or for the wrapped solver's.
            return_dict: a `FewStepOutput` (the wrapped scheduler's own output without segments), or
                else a tuple that starts with the new sample.
            extra: arguments of the wrapped solver's ``step``; none with segments.

        Raises:
            SchedulerError: no ``set_timesteps`` before, a timestep that is not in the schedule, a
                step after the last, or an argument that has no meaning.
        """
        levels = self.levels
        if not self._first_order:
            if "generator" in inspect.signature(self._wrapped.step).parameters:
                extra["generator"] = self.generator if generator is None else generator
            return self._wrapped.step(
                model_output, timestep, sample, return_dict=return_dict, **extra
            )
        if extra:
            raise SchedulerError(
                f"expected no {', '.join(sorted(extra))}: segments are run by first-order steps; "
                "leave it out, gamma is the setting for noise"
            )
        point = self._point(timestep)
        clean, noise = self.predict(model_output, sample, point)
        alpha, sigma = levels.alpha[point + 1], levels.sigma[point + 1]
        gamma = self._settings.gamma
        if gamma and point in self.landing and point + 1 < self._settings.steps:
            quiet_alpha, quiet_sigma = quieter_level(self._wrapped, point + 1, gamma)
            landed = quiet_alpha * clean + quiet_sigma * noise
            kept = alpha / quiet_alpha
            added = max(sigma**2 - (kept * quiet_sigma) ** 2, 0.0) ** 0.5
            fresh = randn_tensor(
                landed.shape,
                generator=self.generator if generator is None else generator,
                device=landed.device,
                dtype=landed.dtype,
            )
            result = kept * landed + added * fresh
        else:
            result = alpha * clean + sigma * noise
        if type(self._wrapped).__name__ not in TABLE_CLASSES:
            self._wrapped._step_index += 1
        result = result.to(model_output.dtype)
        return FewStepOutput(result, clean) if return_dict else (result, clean)

    def predict(
        self, model_output: torch.Tensor, sample: torch.Tensor, point: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The clean sample and the noise that a model's output implies.

        Args:
            model_output: any shape, float.
            sample: the model's (unscaled) input, of the same shape.
            point: number of the step, from 0.

        Returns:
            clean and noise, of the same shape, in float32, or float64 if the sample is. Clipping
            and thresholding of the wrapped scheduler are applied.
        """
        dtype = torch.promote_types(sample.dtype, torch.float32)
        output, sample = model_output.to(dtype), sample.to(dtype)
        if self._convention == "inverted flow":
            output = -output
        alpha, sigma = self.levels.alpha[point], self.levels.sigma[point]
        clean, noise = clean_and_noise(self._prediction, output, sample, alpha, sigma)
        config = self._wrapped.config
        ddim = type(self._wrapped).__name__ == "DDIMScheduler"
        if config.get("thresholding"):
            clean = self._wrapped._threshold_sample(clean)
        elif ddim and config.clip_sample:
            clean = clean.clamp(-config.clip_sample_range, config.clip_sample_range)
        else:
            return clean, noise
        # DDIM keeps the model's noise beside a clipped sample, the exponential solvers do not.
        return clean, noise if ddim else (sample - alpha * clean) / sigma

    def _point(self, timestep: float | torch.Tensor) -> int:
        """Which step this is; starts the wrapped scheduler's counter where it has one."""
        wrapped = self._wrapped
        counts = type(wrapped).__name__ not in TABLE_CLASSES
        if counts and wrapped.step_index is not None:
            point = int(wrapped.step_index)
        else:
            value = float(timestep)
            matches = [i for i, t in enumerate(wrapped.timesteps.tolist()) if t == value]
            if not matches:
                raise SchedulerError(
                    f"expected a timestep among {wrapped.timesteps.tolist()}, got {value}; pass "
                    "one of scheduler.timesteps"
                )
            if not counts:
                return matches[0]
            wrapped._init_step_index(timestep)
            point = int(wrapped.step_index)
        if point >= self._settings.steps:
            raise SchedulerError(
                f"expected at most {self._settings.steps} steps, got one more; call set_timesteps "
                "to start again"
            )
        return point
