"""Where video tokens lie in a sequence: ``VideoGrid`` and ``TokenLayout``."""

from dataclasses import dataclass

from evdit_opt.errors import MaskError

__all__ = ["TokenLayout", "VideoGrid"]


@dataclass(frozen=True)
class VideoGrid:
    """The latent patch grid of one clip, in tokens, flattened frame-major (time, height, width).

    Attributes:
        frames: latent frames F, at least 1.
        height: token rows of a frame, at least 1.
        width: token columns of a frame, at least 1.

    Raises:
        MaskError: if a size is not a positive integer.
    """

    frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        for name in ("frames", "height", "width"):
            _require_int(f"VideoGrid.{name}", getattr(self, name), minimum=1)

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of one latent frame, ``height * width``."""
        return self.height * self.width

    @property
    def tokens(self) -> int:
        """Tokens of the whole clip, ``frames * height * width``."""
        return self.frames * self.tokens_per_frame


@dataclass(frozen=True)
class TokenLayout:
    """A token sequence: ``[prefix text][video, frame-major][suffix text]``.

    Attributes:
        grid: the video part.
        prefix: text (or other dense extra) tokens before the video.
        suffix: text (or other dense extra) tokens after the video.

    Raises:
        MaskError: if prefix or suffix is not a non-negative integer.
    """

    grid: VideoGrid
    prefix: int = 0
    suffix: int = 0

    def __post_init__(self) -> None:
        _require_int("TokenLayout.prefix", self.prefix, minimum=0)
        _require_int("TokenLayout.suffix", self.suffix, minimum=0)

    @property
    def seq_len(self) -> int:
        """Length of the whole sequence in tokens."""
        return self.prefix + self.grid.tokens + self.suffix

    @property
    def text_tokens(self) -> int:
        """Tokens outside the video."""
        return self.prefix + self.suffix

    def frame_slice(self, frame: int) -> slice:
        """Token positions of one latent frame."""
        start = self.prefix + frame * self.grid.tokens_per_frame
        return slice(start, start + self.grid.tokens_per_frame)


def _require_int(name: str, value: object, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise MaskError(f"expected {name} to be an integer >= {minimum}, got {value!r}")
