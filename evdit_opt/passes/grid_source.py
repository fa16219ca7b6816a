"""Where a forward's video grid is read from: ``GridSource``."""

from dataclasses import dataclass
from typing import Literal

from evdit_opt.errors import LayoutError

__all__ = ["GridSource"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GridSource:
    """How the latent grid follows from the arguments of a forward.

    Attributes:
        kind: "patch": from the shape of a 5-D latent input, divided by the patch size. "arguments":
            from num_frames, height and width arguments.
        input: name of the argument that holds the video.
        patch: patch size (time, height, width).
        dims: axes of time, height and width in that input.

    Raises:
        LayoutError: if a value is outside its range.
    """

    kind: Literal["patch", "arguments"]
    input: str
    patch: tuple[int, int, int]
    dims: tuple[int, int, int]

    def __post_init__(self) -> None:
        if self.kind not in ("patch", "arguments"):
            raise LayoutError(f"expected GridSource.kind 'patch' or 'arguments', got {self.kind!r}")
        if not self.input.isidentifier():
            raise LayoutError(
                f"expected GridSource.input to be an argument name, got {self.input!r}"
            )
        if not all(1 <= size <= 1024 for size in self.patch):
            raise LayoutError(f"expected patch sizes in 1..1024, got {self.patch}")
        if not all(0 <= dim <= 8 for dim in self.dims) or len(set(self.dims)) != 3:
            raise LayoutError(f"expected three different dims in 0..8, got {self.dims}")
