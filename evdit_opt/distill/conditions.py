"""What a denoiser is told besides sample and noise level: a prompt's part of its call.

Taken from the pipeline's own first call, so text encoders, masks and rotary tables need no code
here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from evdit_opt.distill.consistency import Model
from evdit_opt.errors import DistillationError
from evdit_opt.models import USUAL_STEPS, as_denoiser, config_value, first_call, output_tensor

__all__ = ["Conditions"]

OWN = ("hidden_states", "timestep", "return_dict")
OF_A_PROMPT = ("encoder_", "pooled_")
"""Arguments that begin so have a row for each clip; all others are shared by a batch."""


class Conditions:
    """The conditions of some prompts, computed once.

    Args:
        pipe: a diffusers pipeline whose denoiser takes ``hidden_states`` and ``timestep``.
        prompts: doubles are computed once.
        call: further arguments of the pipeline's calls; the guidance scale is set to 1 here.
        stored: further prompts with their part of the call, from `text_of` of an earlier run.
        steps: to ask the pipeline for, which lays out its scheduler.

    Attributes:
        shape: of one clip's latents, [channels, frames, height, width] or as the model has it.
        dtype: that the pipeline gives them to the model in.

    Raises:
        DistillationError: a denoiser that is called in another way, is given more than noised
            latents, or is told a guidance scale; prompts of several lengths.
    """

    @torch.no_grad()
    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[str],
        call: Mapping[str, Any],
        stored: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
        steps: int = USUAL_STEPS,
    ) -> None:
        self.stored = stored or {}
        self.of: dict[str, dict[str, Any]] = {}
        self.shape: tuple[int, ...] = ()
        unguided = {**call, "guidance_scale": 1.0}
        for prompt in dict.fromkeys(prompts):
            denoiser = as_denoiser(pipe, [prompt], unguided)
            args, kwargs = first_call(denoiser, steps)
            if args or not {"hidden_states", "timestep"} <= kwargs.keys():
                raise DistillationError(
                    f"expected {type(pipe).__name__} to call its denoiser with hidden_states and "
                    f"timestep by name, got {len(args)} positional arguments and {sorted(kwargs)}"
                )
            _require_plain(denoiser.model, kwargs)
            self.shape = tuple(kwargs["hidden_states"].shape[1:])
            self.dtype = kwargs["hidden_states"].dtype
            self.of[prompt] = {name: kwargs[name] for name in kwargs if name not in OWN}
        widths = {
            tuple(value.shape[1:])
            for condition in self.of.values()
            for name, value in condition.items()
            if name == "encoder_hidden_states"
        }
        if len(widths) > 1:
            raise DistillationError(
                f"expected text of one length for all prompts, got {sorted(widths)}; pad it, for "
                "example with max_sequence_length"
            )

    def text_of(self, prompt: str) -> dict[str, torch.Tensor]:
        """What only this prompt's calls are given: tensors [1, ...] by argument, to be stored."""
        return {
            name: value
            for name, value in self.of[prompt].items()
            if name.startswith(OF_A_PROMPT) and isinstance(value, torch.Tensor)
        }

    def _row(self, prompt: str) -> dict[str, Any]:
        if prompt in self.of:
            return self.of[prompt]
        shared, text = next(iter(self.of.values())), self.stored[prompt]
        return {
            name: text[name].to(value.device) if name in text else value
            for name, value in shared.items()
        }

    def bind(self, model: nn.Module, prompts: Sequence[str]) -> Model:
        """The model with a batch of prompts, as a function of input and timesteps."""
        rows = [self._row(prompt) for prompt in prompts]
        kwargs = {
            name: torch.cat([row[name] for row in rows])
            if name.startswith(OF_A_PROMPT) and isinstance(value, torch.Tensor)
            else value
            for name, value in rows[0].items()
        }

        def call(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            given = sample.to(self.dtype)
            output = model(hidden_states=given, timestep=timestep, return_dict=False, **kwargs)
            return output_tensor(output).to(sample.dtype)

        return call


def _require_plain(model: nn.Module, kwargs: Mapping[str, Any]) -> None:
    """A model that makes what it is given, and knows of no guidance."""
    given, made = (config_value(model, f"{way}_channels") for way in ("in", "out"))
    if type(given) is type(made) is int and given != made:
        raise DistillationError(
            f"expected a {type(model).__name__} that is given noised latents alone, it takes "
            f"{given} channels and makes {made}; a condition beside the latents (image to video) "
            "is not supported"
        )
    if kwargs.get("guidance") is not None:
        raise DistillationError(
            f"expected a {type(model).__name__} without embedded guidance, it is called with a "
            "guidance scale; models whose guidance is distilled already are not supported"
        )
