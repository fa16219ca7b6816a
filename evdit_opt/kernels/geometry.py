"""Where frames and text lie in a sequence, and views of tensors by frame."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Geometry", "Ranges", "join", "own_windows", "take"]

Ranges = list[tuple[int, int]]
"""Half-open ranges of tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """Where frames and text lie in a sequence, in tokens.

    Attributes:
        frames: latent frames.
        tokens: tokens of one frame.
        prefix: text tokens before the video.
        suffix: text tokens after the video.
    """

    frames: int
    tokens: int
    prefix: int
    suffix: int

    @property
    def seq_len(self) -> int:
        """Tokens of the whole sequence."""
        return self.prefix + self.frames * self.tokens + self.suffix

    @property
    def text(self) -> Ranges:
        """Token ranges of the text."""
        video_stop = self.prefix + self.frames * self.tokens
        return join([(0, self.prefix), (video_stop, self.seq_len)])

    def token(self, frame: int) -> int:
        """Position of the first token of ``frame``."""
        return self.prefix + frame * self.tokens

    def ranges(self, frames: Sequence[tuple[int, int]], with_text: bool = False) -> Ranges:
        """Frame intervals, and the text where asked for, as ascending token ranges."""
        video = [(self.token(start), self.token(stop)) for start, stop in frames]
        return join(sorted(video + self.text) if with_text else video)


def own_windows(
    x: Tensor, geometry: Geometry, first: int, count: int, start: int, stop: int
) -> Tensor:
    """Frames ``row + start .. row + stop`` for each of ``count`` rows from ``first``, as a view.

    Args:
        x: ``[batch, heads, seq, dim]``; batch must be 1 if count is not.

    Returns:
        ``[count | batch, heads, (stop - start) * tokens, dim]``; windows of several rows overlap.
    """
    begin, end = geometry.token(first + start), geometry.token(first + count - 1 + stop)
    if count == 1:
        return x[:, :, begin:end]
    length = (stop - start) * geometry.tokens
    windows = x[0, :, begin:end].unfold(1, length, geometry.tokens)  # [heads, count, dim, length]
    return windows.permute(1, 0, 3, 2)


def join(ranges: Ranges) -> Ranges:
    """Ascending token ranges without the empty ones, touching ones joined."""
    joined: Ranges = []
    for start, stop in ranges:
        if start == stop:
            continue
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined


def take(x: Tensor, ranges: Ranges) -> Tensor:
    """Token ranges of ``x`` ``[batch, heads, seq, dim]`` side by side; a view if there is one."""
    parts = [x[:, :, start:stop] for start, stop in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
