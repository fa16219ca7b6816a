"""Where a forward's video grid is read from: ``GridSource``."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from evdit_opt.errors import LayoutError
from evdit_opt.grid import VideoGrid

__all__ = ["GRID_ARGUMENTS", "TOKENS", "GridSource"]

GRID_ARGUMENTS = ("num_frames", "height", "width")
"""How models that take tokens are told the latent grid (LTX-Video)."""

TOKENS = (3, 6)
"""Dimensions of a video given as tokens, or as a list of patches: the second one counts them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GridSource:
    """How the latent grid follows from the arguments of a forward.

    Attributes:
        kind: "patch": from the shape of a 5-D latent input, divided by the patch size. "arguments":
            from num_frames, height and width arguments. "given": it does not follow from any call;
            somebody said so of one size of clip, and no other is known.
        input: name of the argument that holds the video.
        patch: patch size (time, height, width); for "given" the whole clip, in tokens.
        dims: axes of time, height and width in that input; means nothing for tokens.

    Raises:
        LayoutError: if a value is outside its range.
    """

    kind: Literal["patch", "arguments", "given"]
    input: str
    patch: tuple[int, int, int]
    dims: tuple[int, int, int]

    def __post_init__(self) -> None:
        if self.kind not in ("patch", "arguments", "given"):
            raise LayoutError(
                f"expected GridSource.kind 'patch', 'arguments' or 'given', got {self.kind!r}"
            )
        if not self.input.isidentifier():
            raise LayoutError(
                f"expected GridSource.input to be an argument name, got {self.input!r}"
            )
        if not all(1 <= size <= 1024 for size in self.patch):
            raise LayoutError(f"expected patch sizes in 1..1024, got {self.patch}")
        if not all(0 <= dim <= 8 for dim in self.dims) or len(set(self.dims)) != 3:
            raise LayoutError(f"expected three different dims in 0..8, got {self.dims}")

    def sizes(self, arguments: Mapping[str, Any]) -> tuple[int, int, int]:
        """Frames, height and width in tokens; Dynamo traces this, so they may be symbolic.

        Args:
            arguments: the arguments of the model's forward by name.

        Raises:
            LayoutError: if an argument is missing or has too few dimensions.
        """
        if self.kind == "given":
            return self._given(arguments)
        if self.kind == "arguments":
            missing = [name for name in GRID_ARGUMENTS if arguments.get(name) is None]
            if missing:
                raise LayoutError(
                    f"expected the arguments {', '.join(GRID_ARGUMENTS)} in this forward, got "
                    f"{', '.join(arguments)}; pass them, the token grid cannot be known otherwise"
                )
            video = [arguments[name] for name in GRID_ARGUMENTS]
        else:
            latent = arguments.get(self.input)
            if latent is None or latent.ndim <= max(self.dims):
                raise LayoutError(
                    f"expected the video in argument {self.input!r} with more than "
                    f"{max(self.dims)} dimensions; call the model as it was called in calibration"
                )
            video = [latent.shape[dim] for dim in self.dims]
        frames, height, width = (
            size // patch for size, patch in zip(video, self.patch, strict=True)
        )
        return frames, height, width

    def _given(self, arguments: Mapping[str, Any]) -> tuple[int, int, int]:
        tokens = arguments.get(self.input)
        if tokens is None or tokens.ndim not in TOKENS or tokens.shape[1] != math.prod(self.patch):
            raise LayoutError(
                f"expected {math.prod(self.patch)} tokens in argument {self.input!r}, the clip of "
                f"{self.patch} tokens this plan was made for; make a plan for clips of this size"
            )
        return self.patch

    def read(self, arguments: Mapping[str, Any]) -> VideoGrid:
        """The grid of one forward, from its arguments by name.

        Raises:
            LayoutError: as :meth:`sizes`, or if the video is smaller than one patch.
        """
        frames, height, width = (int(size) for size in self.sizes(arguments))
        if min(frames, height, width) < 1:
            raise LayoutError(
                f"expected at least one patch of {self.patch} in the video, got a grid of "
                f"{(frames, height, width)}"
            )
        return VideoGrid(frames, height, width)
