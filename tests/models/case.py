"""What a test knows of a small model: how to build and call it, and what is to be found in it."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import nn

from evdit_opt.grid import TokenLayout, VideoGrid
from evdit_opt.masks import Rule
from evdit_opt.passes.grid_source import GridSource

GRID = VideoGrid(6, 3, 4)
TEXT = 7

RULES = (Rule(1), Rule(0, window=1), Rule(2, weighting="balanced"), Rule(1, spacing="centred"))


@dataclass(frozen=True)
class Shape:
    """The sizes of a model and of a call that a test may vary.

    Attributes:
        layers: transformer layers (of each kind).
        heads: attention heads.
        grid: latent grid of the call, in tokens.
        text: text tokens of the call.
        batch: batch size of the call.
    """

    layers: int = 2
    heads: int = 2
    grid: VideoGrid = GRID
    text: int = TEXT
    batch: int = 1


def random_shape(seed: int) -> Shape:
    """Another shape, the same on every run; no two of its sizes are tied to each other."""
    pick = random.Random(seed)
    grid = VideoGrid(pick.randint(4, 7), pick.randint(2, 5), pick.randint(2, 5))
    return Shape(
        pick.randint(1, 3), pick.randint(1, 3), grid, pick.randint(3, 12), pick.choice((1, 2))
    )


Count = Callable[[Shape], int]
Names = Callable[[Shape], tuple[str, ...]]


def none(_shape: Shape) -> int:
    return 0


def text(shape: Shape) -> int:
    return shape.text


def layers(*paths: str) -> Names:
    """``blocks.{}.attn`` -> ``blocks.0.attn``, ``blocks.1.attn``, ... for every layer."""

    def names(shape: Shape) -> tuple[str, ...]:
        return tuple(path.format(n) for path in paths for n in range(shape.layers))

    return names


DOUBLE_AND_SINGLE = layers("transformer_blocks.{}.attn", "single_transformer_blocks.{}.attn")

PADDING = 2
"""Tokens of the text that are none, where a model takes a text mask."""


def nowhere(_shape: Shape) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True)
class Case:
    """A model to test.

    Attributes:
        name: for test ids and the documentation.
        kind: class in diffusers.
        config: its arguments.
        call: forward kwargs.
        sites: paths of its 3D self-attentions, in the order they run.
        source: how the grid is read; None: it does not follow from a call, the caller must say.
        prefix: dense tokens before the video.
        suffix: dense tokens after the video.
        unlike: sites whose sequence is laid out in another way.
        refused: why no plan can be made, as a regular expression; empty if one can.
        fullgraph: True if Dynamo traces it whole.
        tokens: where the sequence is not video plus text, in words.
    """

    name: str
    kind: str
    config: Callable[[Shape], dict[str, Any]]
    call: Callable[[Shape], dict[str, Any]]
    sites: Names = nowhere
    source: GridSource | None = None
    prefix: Count = none
    suffix: Count = none
    unlike: Callable[[Shape], dict[str, TokenLayout]] = field(default=lambda _shape: {})
    refused: str = ""
    fullgraph: bool = True
    tokens: str = ""

    def grid_source(self, shape: Shape = Shape()) -> GridSource:
        """How the grid is read, or what the caller said it is."""
        grid = (shape.grid.frames, shape.grid.height, shape.grid.width)
        given = GridSource(kind="given", input="hidden_states", patch=grid, dims=(2, 3, 4))
        return self.source or given

    def layouts(self, shape: Shape = Shape()) -> dict[str, TokenLayout]:
        """Where the tokens of every site lie."""
        usual = TokenLayout(shape.grid, self.prefix(shape), self.suffix(shape))
        return {**dict.fromkeys(self.sites(shape), usual), **self.unlike(shape)}

    def rules(self, shape: Shape = Shape()) -> dict[str, Rule]:
        """Another rule for every site, as far as there are rules."""
        return {name: RULES[n % len(RULES)] for n, name in enumerate(self.layouts(shape))}

    def model(self, shape: Shape = Shape(), seed: int = 0) -> nn.Module:
        """The model with random weights."""
        torch.manual_seed(seed)
        model: nn.Module = getattr(diffusers, self.kind)(**self.config(shape)).eval()
        # Zero-initialised gates and output layers would hide what attention computes.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.numel() and float(parameter.abs().max()) == 0.0:
                    parameter.normal_(0, 0.2)
        return model

    def inputs(self, shape: Shape = Shape(), seed: int = 1) -> dict[str, Any]:
        """Random forward kwargs."""
        torch.manual_seed(seed)
        return {**self.call(shape), "return_dict": False}


def latents(shape: Shape, channels: int, patch: int = 2) -> torch.Tensor:
    """``[batch, channels, frames, height, width]``"""
    grid = shape.grid
    return torch.randn(shape.batch, channels, grid.frames, patch * grid.height, patch * grid.width)


def tokens(shape: Shape, length: int, channels: int) -> torch.Tensor:
    """``[batch, length, channels]``"""
    return torch.randn(shape.batch, length, channels)


def timestep(shape: Shape) -> torch.Tensor:
    return torch.full((shape.batch,), 300)


def padded(
    shape: Shape, length: int, padding: int, dtype: torch.dtype = torch.bool
) -> torch.Tensor:
    """A text mask ``[batch, length]`` whose last ``padding`` tokens are no text."""
    mask = torch.ones(shape.batch, length, dtype=dtype)
    mask[:, length - padding :] = 0
    return mask


def patches(*patch: int, dims: tuple[int, int, int] = (2, 3, 4)) -> GridSource:
    """The grid follows from ``hidden_states`` divided by ``patch``."""
    time, height, width = patch
    return GridSource(kind="patch", input="hidden_states", patch=(time, height, width), dims=dims)


ARGUMENTS = GridSource(kind="arguments", input="hidden_states", patch=(1, 1, 1), dims=(2, 3, 4))
"""The grid follows from num_frames, height and width."""


def merged(base: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    return {**base, **changes}
