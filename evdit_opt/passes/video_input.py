"""Which argument of a model's forward holds the video, and how its grid may be read."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from evdit_opt.errors import LayoutError
from evdit_opt.grid import VideoGrid
from evdit_opt.passes.grid_source import GRID_ARGUMENTS, TOKENS, GridSource

__all__ = ["VideoInput", "bind_arguments", "grid_sources", "video_input"]

USUAL_NAME = "hidden_states"


@dataclass(frozen=True)
class VideoInput:
    """The video argument of one call.

    Attributes:
        name: its name.
        tensor: its value, 5-D latents, ``[batch, tokens, channels]``, or a list of patches
            ``[batch, tokens, channels, time, height, width]``.
    """

    name: str
    tensor: torch.Tensor

    @property
    def batch(self) -> int:
        """Batch size of the call."""
        return int(self.tensor.shape[0])


def bind_arguments(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a forward by name; what it takes as ``**kwargs`` included."""
    return {**dict(zip(inspect.signature(model.forward).parameters, args, strict=False)), **kwargs}


def video_input(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> VideoInput:
    """The argument that holds the video: the only 5-D one, or the one called ``hidden_states``.

    Raises:
        LayoutError: if no argument can be it.
    """
    arguments = bind_arguments(model, args, kwargs)
    floating = {
        name: value
        for name, value in arguments.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }
    volumes = [name for name, value in floating.items() if value.ndim == 5]
    if volumes:
        name = USUAL_NAME if USUAL_NAME in volumes else volumes[0]
        return VideoInput(name, floating[name])
    if USUAL_NAME in floating and floating[USUAL_NAME].ndim in TOKENS:
        return VideoInput(USUAL_NAME, floating[USUAL_NAME])
    shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in floating.items())
    raise LayoutError(
        "expected a 5-D video latent, or tokens named hidden_states, among the arguments of "
        f"{type(model).__name__}, got {shapes or 'no tensors'}; this is no video model, or call it "
        "through a module whose forward takes one"
    )


def grid_sources(
    model: nn.Module,
    video: VideoInput,
    arguments: Mapping[str, Any],
    grid: VideoGrid | None = None,
) -> Iterator[GridSource]:
    """How the grid may be read from such calls, the likeliest first. Each needs a check.

    Args:
        model: the denoiser.
        video: its video argument.
        arguments: all arguments of a call.
        grid: the grid of this call, if the caller knows it.
    """
    if video.tensor.ndim != 5:
        if all(isinstance(arguments.get(name), int) for name in GRID_ARGUMENTS):
            yield _source("arguments", video, (1, 1, 1), (2, 3, 4))
        elif grid is not None:
            yield _source("given", video, (grid.frames, grid.height, grid.width), (2, 3, 4))
        return
    for patch in dict.fromkeys(_patches(model)):
        for dims in _dims(model, video):
            yield _source("patch", video, patch, dims)


def _patches(model: nn.Module) -> Iterator[tuple[int, int, int]]:
    config = getattr(model, "config", None)
    size = _read(config, "patch_size")
    time = _read(config, "patch_size_t") or _read(config, "temporal_patch_size") or 1
    if isinstance(size, int) and isinstance(time, int):
        yield (time, size, size)
    elif isinstance(size, (tuple, list)) and len(size) == 3:
        yield (int(size[0]), int(size[1]), int(size[2]))
    elif isinstance(size, (tuple, list)) and len(size) == 2 and isinstance(time, int):
        yield (time, int(size[0]), int(size[1]))
    for module in model.modules():
        # A patch embedding: a convolution whose steps do not overlap.
        if isinstance(module, nn.Conv3d) and module.kernel_size == module.stride:
            yield (module.stride[0], module.stride[1], module.stride[2])
        elif isinstance(module, nn.Conv2d) and module.kernel_size == module.stride:
            yield (1, module.stride[0], module.stride[1])
    yield (1, 1, 1)


def _dims(model: nn.Module, video: VideoInput) -> Iterator[tuple[int, int, int]]:
    shape = video.tensor.shape
    # Channels lie in one of three places; where the model tells how many it takes, that one first.
    places = {1: (2, 3, 4), 2: (1, 3, 4), 4: (1, 2, 3)}
    channels = _read(getattr(model, "config", None), "in_channels")
    yield from (places[dim] for dim in sorted(places, key=lambda dim: shape[dim] != channels))


def _source(
    kind: Literal["patch", "arguments", "given"],
    video: VideoInput,
    patch: tuple[int, int, int],
    dims: tuple[int, int, int],
) -> GridSource:
    return GridSource(kind=kind, input=video.name, patch=patch, dims=dims)


def _read(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
