"""Tile masks and the rules that make them.

A *tile* (i, j) is the block of the attention map where queries of latent frame i meet keys of
latent frame j. A rule is resolution-free; ``rule.mask(frames)`` makes the mask for any frame count.
The family is Efficient-vDiT's (arXiv 2502.06155, Fig. 3 and Table 1), extended by a window around
the diagonal, by centred reference spacing, and by reference weighting.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, get_args

import torch

from evdit_opt.errors import MaskError
from evdit_opt.grid import TokenLayout
from evdit_opt.strict_json import OPTIONAL

__all__ = ["CACHED", "DROPPED", "MAX_FRAMES", "MAX_STRENGTH", "Rule", "TileMask", "block_density"]

DROPPED = -math.inf
MAX_FRAMES = 4096
"""More latent frames than any model has; a bound for what a plan from a stranger may ask for."""

MAX_STRENGTH = 4.0
"""Twice what any layer was seen to want; a bound for plans from strangers, too."""

Weighting = Literal["none", "balanced", "fitted"]
Spacing = Literal["paper", "centred"]


@dataclass(frozen=True)
class TileMask:
    """Which tiles are computed, and how often each counts.

    Attributes:
        rows: ``rows[i][j]`` is the number added to every logit of tile (i, j): ``-inf`` drops the
            tile, ``0.0`` keeps it, ``log w`` keeps it and counts it w times. Values are exactly
            representable in float32, so that every implementation sees the same mask.

    Raises:
        MaskError: if the matrix is empty or not square, holds NaN or +inf, or has a row without any
            kept tile (its softmax would be undefined).
    """

    rows: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        frames = len(self.rows)
        if not 1 <= frames <= MAX_FRAMES:
            raise MaskError(f"expected 1 to {MAX_FRAMES} frames in a tile mask, got {frames}")
        for i, row in enumerate(self.rows):
            if len(row) != frames:
                raise MaskError(
                    f"expected a square mask of {frames} frames, row {i} has {len(row)}"
                )
            if any(math.isnan(value) or value == math.inf for value in row):
                raise MaskError(
                    f"expected -inf or finite numbers in a tile mask, row {i} has NaN or +inf"
                )
            if all(value == DROPPED for value in row):
                raise MaskError(f"expected at least one kept tile in every row, row {i} has none")

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Made once: an eager call of attention looks its mask up, and has frames ** 2 numbers."""
        return hash(self.rows)

    @classmethod
    def from_bias(cls, bias: torch.Tensor) -> "TileMask":
        """Make a mask from ``bias`` ``[frames, frames]`` (rounded to float32)."""
        return cls(tuple(tuple(row) for row in bias.detach().to("cpu", torch.float32).tolist()))

    @classmethod
    def full(cls, frames: int) -> "TileMask":
        """The dense mask: every tile kept with weight 1."""
        return cls(((0.0,) * frames,) * frames)

    @property
    def frames(self) -> int:
        """Number of latent frames F."""
        return len(self.rows)

    @property
    def bias(self) -> torch.Tensor:
        """The mask as a float32 CPU tensor ``[frames, frames]`` (a new one each time)."""
        return torch.tensor(self.rows, dtype=torch.float32)

    @cached_property
    def density(self) -> float:
        """Kept tiles / all tiles; text not counted."""
        return sum(value != DROPPED for row in self.rows for value in row) / self.frames**2

    @property
    def is_dense(self) -> bool:
        """True if every tile is kept with weight 1, i.e. attention is unchanged."""
        return all(value == 0.0 for row in self.rows for value in row)

    def token_density(self, layout: TokenLayout) -> float:
        """Kept / all (query, key) token pairs of a whole sequence, text included."""
        _require_frames(self, layout)
        video = layout.grid.tokens
        return 1.0 - (1.0 - self.density) * video**2 / layout.seq_len**2

    def expand(self, layout: TokenLayout) -> torch.Tensor:
        """The mask at token level: float32 ``[seq, seq]``, text rows and columns 0.

        Quadratic in the sequence: for tests and the reference implementation only.
        """
        _require_frames(self, layout)
        full = torch.zeros(layout.seq_len, layout.seq_len)
        video = slice(layout.prefix, layout.prefix + layout.grid.tokens)
        tokens = layout.grid.tokens_per_frame
        full[video, video] = self.bias.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)
        return full

    def segments(self) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """The kept tiles as small host-side lists, linear in the kept tiles of a row.

        Returns:
            intervals: flat triples ``(row, first key frame, past-the-end key frame)``, rows
                ascending, neighbouring kept tiles of equal weight merged.
            log_weights: one number per triple.
        """
        intervals: list[int] = []
        log_weights: list[float] = []
        for i, row in enumerate(self.rows):
            start = 0
            for j in range(1, self.frames + 1):
                if j < self.frames and row[j] == row[start]:
                    continue
                if row[start] != DROPPED:
                    intervals += (i, start, j)
                    log_weights.append(row[start])
                start = j
        return tuple(intervals), tuple(log_weights)

    @classmethod
    def from_segments(
        cls, frames: int, intervals: Sequence[int], log_weights: Sequence[float]
    ) -> "TileMask":
        """Inverse of :meth:`segments`."""
        if len(intervals) != 3 * len(log_weights):
            raise MaskError(
                f"expected 3 integers per weight, got {len(intervals)} and {len(log_weights)}"
            )
        rows = [[DROPPED] * frames for _ in range(frames)]
        for n, weight in enumerate(log_weights):
            row, start, stop = intervals[3 * n : 3 * n + 3]
            if not (0 <= row < frames and 0 <= start < stop <= frames):
                raise MaskError(
                    f"expected an interval within {frames} frames, got {(row, start, stop)}"
                )
            rows[row][start:stop] = [weight] * (stop - start)
        return cls(tuple(tuple(row) for row in rows))

    def to_json(self) -> list[list[float | None]]:
        """Rows as JSON numbers; ``null`` for a dropped tile."""
        return [[None if value == DROPPED else value for value in row] for row in self.rows]

    @classmethod
    def from_json(cls, rows: Iterable[Iterable[float | None]]) -> "TileMask":
        """Inverse of :meth:`to_json`."""
        return cls(tuple(tuple(DROPPED if v is None else float(v) for v in row) for row in rows))


@dataclass(frozen=True)
class Rule:
    """A resolution-free recipe for a tile mask.

    Tile (i, j) is kept iff ``|i - j| <= window`` or i or j is a reference frame; reference frames
    attend to, and are attended by, every frame.

    Attributes:
        references: number of reference frames k asked for; at most k are placed (fewer where
            ``ceil(F / k)`` steps over the end, all where k >= F).
        window: frames kept on each side of the diagonal; 0 is the paper's family, "k:(F-k)". -1,
            only without references, keeps nothing at all: see :data:`CACHED`.
        weighting: "none" is the paper's. "balanced": in the row of a non-reference frame every kept
            tile of a reference frame gets ``log(1 + dropped / placed references)``, so the kept
            references stand for the ``dropped`` tiles that row lost. "fitted": that log-weight
            times ``strength``, which calibration fits to the site.
        spacing: "paper": references at ``range(0, F, ceil(F / k))`` (the reading of Table 1 that
            reproduces all nine printed sparsities). "centred": in the middle of k equal parts.
        strength: what a fitted weighting multiplies the balanced log-weight by, 0 to 4, no unit: 0
            is "none", 1 is "balanced". 1 with any other weighting.

    Raises:
        MaskError: if a value is outside its range.
    """

    references: int = 2
    window: int = 0
    weighting: Weighting = "none"
    spacing: Spacing = "paper"
    strength: float = field(default=1.0, metadata={OPTIONAL: True})

    def __post_init__(self) -> None:
        for name, low in (("references", 0), ("window", -1 if self.references == 0 else 0)):
            value = getattr(self, name)
            if (
                isinstance(value, bool)
                or not isinstance(value, int)
                or not low <= value <= MAX_FRAMES
            ):
                raise MaskError(
                    f"expected Rule.{name} to be an integer in {low}..{MAX_FRAMES}, got {value!r}"
                )
        if self.weighting not in get_args(Weighting):
            raise MaskError(
                f"expected Rule.weighting 'none', 'balanced' or 'fitted', got {self.weighting!r}"
            )
        if self.spacing not in ("paper", "centred"):
            raise MaskError(f"expected Rule.spacing 'paper' or 'centred', got {self.spacing!r}")
        # An integer would be equal to its float, and read differently in a plan.
        fits = type(self.strength) is float and 0.0 <= self.strength <= MAX_STRENGTH
        if not fits or (self.strength != 1.0 and self.weighting != "fitted"):
            raise MaskError(
                f"expected Rule.strength to be a float in 0.0..{MAX_STRENGTH}, and 1.0 unless the "
                f"weighting is 'fitted', got {self.strength!r} with {self.weighting!r}"
            )

    @property
    def keeps_nothing(self) -> bool:
        """True for :data:`CACHED`."""
        return self.window < 0

    def density(self, layout: TokenLayout) -> float:
        """Kept / all token pairs of a whole sequence, text included."""
        if self.keeps_nothing:
            return 0.0
        return self.mask(layout.grid.frames).token_density(layout)

    def reference_frames(self, frames: int) -> tuple[int, ...]:
        """The reference frames for a clip of ``frames`` latent frames, ascending."""
        if self.references == 0:
            return ()
        count = min(self.references, frames)
        if self.spacing == "paper":
            return tuple(range(0, frames, math.ceil(frames / count)))
        return tuple((2 * part + 1) * frames // (2 * count) for part in range(count))

    def mask(self, frames: int) -> TileMask:
        """The tile mask for ``frames`` latent frames.

        Raises:
            MaskError: if ``frames`` is not in 1..4096.
        """
        if not 1 <= frames <= MAX_FRAMES:
            raise MaskError(f"expected 1 to {MAX_FRAMES} frames, got {frames}")
        if self.keeps_nothing:
            raise MaskError("expected a rule that keeps something, this one only reuses")
        references = frozenset(self.reference_frames(frames))
        return TileMask(tuple(self._row(i, frames, references) for i in range(frames)))

    def _row(self, i: int, frames: int, references: frozenset[int]) -> tuple[float, ...]:
        if i in references:
            return (0.0,) * frames
        kept = [abs(i - j) <= self.window or j in references for j in range(frames)]
        weight = 0.0
        if self.weighting != "none" and references:
            balanced = math.log1p((frames - sum(kept)) / len(references))
            weight = _float32(self.strength * balanced)
        return tuple(
            DROPPED if not kept[j] else weight if j in references else 0.0 for j in range(frames)
        )

    def describe(self, frames: int | None = None) -> str:
        """A short name such as ``2:6``, ``2:6 fitted 0.5`` or ``1 reference + window 1``."""
        if self.keeps_nothing:
            return "cached output"
        if self.window == 0 and frames is not None:
            placed = len(self.reference_frames(frames))
            text = f"{placed}:{frames - placed}"
        else:
            text = f"{self.references} reference{'s' * (self.references != 1)}"
            if self.window:
                text += f" + window {self.window}"
        if self.weighting != "none":
            text += f" {self.weighting}"
        if self.weighting == "fitted":
            text += f" {self.strength:.6g}"
        return text + (" centred" if self.spacing == "centred" and self.references else "")


CACHED = Rule(references=0, window=-1)
"""Keeps nothing: between refreshes the site returns its last output, and computes no attention."""


def block_density(mask: TileMask, layout: TokenLayout, block: int = 128) -> float:
    """Share of ``block`` x ``block`` token blocks that hold at least one kept pair.

    Block-sparse kernels, and the paper's Table 1, count so: a partly kept block is computed.
    """
    _require_frames(mask, layout)
    blocks = math.ceil(layout.seq_len / block)
    touches = torch.zeros(blocks, mask.frames)
    text = torch.zeros(blocks, dtype=torch.bool)
    for b in range(blocks):
        first, last = b * block, min((b + 1) * block, layout.seq_len) - 1
        video_first = max(first - layout.prefix, 0)
        video_last = min(last - layout.prefix, layout.grid.tokens - 1)
        text[b] = first < layout.prefix or last >= layout.prefix + layout.grid.tokens
        if video_first <= video_last:
            tokens = layout.grid.tokens_per_frame
            touches[b, video_first // tokens : video_last // tokens + 1] = 1.0
    kept = (mask.bias != DROPPED).float()
    touched = (touches @ kept @ touches.T > 0) | text[:, None] | text[None, :]
    return touched.float().mean().item()


def _require_frames(mask: TileMask, layout: TokenLayout) -> None:
    if mask.frames != layout.grid.frames:
        raise MaskError(
            f"expected a mask of {layout.grid.frames} frames for this layout, got {mask.frames}"
        )


def _float32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()
