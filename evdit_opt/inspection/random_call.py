"""A call of a transformer that nobody said how to call, from its signature and its config."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from evdit_opt.errors import UnsupportedInputError
from evdit_opt.models import config_value

__all__ = ["random_call"]

TEXT_TOKENS = 128
TEXT_WIDTHS = ("text_dim", "text_embed_dim", "caption_channels", "cross_attention_dim")
"""Names under which configs keep the width of the text encoder."""
FRAMES, HEIGHT, WIDTH = 8, 32, 32
NOT_SHAPES = (DataDependentOutputException, DynamicOutputShapeException)
MISFIT = (RuntimeError, ValueError, TypeError, IndexError, AssertionError)


def random_call(
    model: nn.Module,
    num_frames: int = FRAMES,
    height: int = HEIGHT,
    width: int = WIDTH,
    text: int = TEXT_TOKENS,
) -> dict[str, Any]:
    """Random forward kwargs for a transformer of diffusers, or one that names things as it does.

    Where the channels of the latents lie is tried out on fake tensors, which know shapes only.

    Args:
        model: the transformer.
        num_frames: latent frames.
        height: latent rows.
        width: latent columns.
        text: text tokens.

    Raises:
        UnsupportedInputError: if the forward takes what cannot be made up, or no latents fit.
    """
    first = next(model.parameters())
    tried = []
    for latents in _latents(model, num_frames, height, width):
        call = _arguments(model, latents, (num_frames, height, width), text)
        trouble = _misfit(model, call)
        if trouble is None:
            generator = torch.Generator().manual_seed(0)
            return {name: _random(value, first, generator) for name, value in call.items()}
        tried.append(f"{list(latents)}: {trouble}")
    raise UnsupportedInputError(
        f"expected {type(model).__name__} to take random latents of {num_frames} x {height} x "
        f"{width}, it took none of {' | '.join(tried)}; choose sizes its patches divide, or give "
        "module:factory, a function that returns the model and the kwargs of a call"
    )


class _Made:
    """A tensor to make: its shape, and whether it holds numbers, ones (a mask) or a timestep."""

    def __init__(self, *shape: int, kind: str = "normal") -> None:
        self.shape, self.kind = shape, kind


def _latents(model: nn.Module, frames: int, height: int, width: int) -> Iterator[tuple[int, ...]]:
    channels = config_value(model, "in_channels")
    if not isinstance(channels, int):
        raise UnsupportedInputError(
            f"expected the config of {type(model).__name__} to tell its in_channels, it does not; "
            "give module:factory, a function that returns the model and the kwargs of a call"
        )
    yield (1, channels, frames, height, width)
    yield (1, frames, channels, height, width)
    yield (1, frames * height * width, channels)


def _arguments(
    model: nn.Module, latents: tuple[int, ...], sizes: tuple[int, int, int], text: int
) -> dict[str, Any]:
    frames, height, width = sizes
    text_width = next(
        (value for name in TEXT_WIDTHS if isinstance(value := config_value(model, name), int)), None
    )
    pooled = config_value(model, "pooled_projection_dim")
    known: dict[str, Any] = {
        "hidden_states": _Made(*latents),
        "timestep": _Made(1, kind="timestep"),
        "num_frames": frames,
        "height": height,
        "width": width,
        "return_dict": False,
        "encoder_attention_mask": _Made(1, text, kind="mask"),
        "guidance": _Made(1, kind="timestep") if config_value(model, "guidance_embeds") else None,
    }
    if text_width is not None:
        known["encoder_hidden_states"] = _Made(1, text, text_width)
    if isinstance(pooled, int):
        known["pooled_projections"] = _Made(1, pooled)
    call = {}
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if known.get(name) is not None:
            call[name] = known[name]
        elif parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD:
            raise UnsupportedInputError(
                f"expected a forward of {type(model).__name__} that random inputs can be made for, "
                f"it takes {name!r}; give module:factory, a function that returns the model and "
                "the kwargs of a call"
            )
    return call


def _misfit(model: nn.Module, call: dict[str, Any]) -> str | None:
    """What a call with such shapes raises; None if nothing, or only what depends on values."""
    first = next(model.parameters())
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        try:
            model(**{name: _random(value, first, None) for name, value in call.items()})
        except NOT_SHAPES:
            return None
        except MISFIT as error:
            return str(error).splitlines()[0]
    return None


def _random(value: Any, like: torch.Tensor, generator: torch.Generator | None) -> Any:
    if not isinstance(value, _Made):
        return value
    if value.kind == "mask":
        return torch.ones(value.shape, dtype=torch.bool, device=like.device)
    if value.kind == "timestep":
        return torch.full(value.shape, 500.0, device=like.device, dtype=like.dtype)
    made = torch.randn(value.shape, generator=generator)
    return made.to(like.device, like.dtype)
