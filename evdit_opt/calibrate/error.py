"""How far each candidate rule moves the attention output of a site.

One dense recording pass gives q, k, v of every site; each candidate is run on them at once and only
running sums are kept, so memory does not grow with prompts or steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from evdit_opt.grid import TokenLayout
from evdit_opt.kernels import tile_attention
from evdit_opt.masks import Rule

__all__ = ["CandidateError", "SiteErrors"]


@dataclass(frozen=True)
class CandidateError:
    """What one rule costs at one site, relative to dense attention on the same q, k, v.

    Attributes:
        rule: the candidate.
        density: kept / all token pairs at the calibrated layout, text included.
        output: ``||sparse - dense|| / ||dense||`` over video tokens, all recorded calls (the
            paper's Algorithm 1 thresholds a loss of this kind; relative, so a threshold means the
            same on every model).
        temporal: the same for the change from each latent frame to the next at the same position.
            Its numerator sees errors that differ between frames, which become flicker, and is
            blind to errors that stay the same along the clip.
    """

    rule: Rule
    density: float
    output: float
    temporal: float


@dataclass
class SiteErrors:
    """Running error sums of all candidates at one site."""

    layout: TokenLayout
    candidates: Sequence[Rule]
    impl: str = "auto"
    calls: int = 0
    _error: torch.Tensor = field(init=False)
    _scale: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        # One row per candidate, columns: output, temporal.
        self._error = torch.zeros(len(self.candidates), 2, dtype=torch.float64)
        self._scale = torch.zeros(2, dtype=torch.float64)

    def add(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        scale: float | None = None,
    ) -> None:
        """Measure every candidate on one call.

        Args:
            q: ``[batch, heads, seq, head_dim]``.
            k: ``[batch, kv_heads, seq, head_dim]``.
            v: ``[batch, kv_heads, seq, head_dim]``.
            attn_mask: the model's own key-padding mask, or None.
            scale: softmax scale, None for ``head_dim ** -0.5``.
        """
        gqa = q.shape[1] != k.shape[1]
        dense = self._frames(
            F.scaled_dot_product_attention(q, k, v, attn_mask, scale=scale, enable_gqa=gqa)
        )
        self._scale += _squares(dense)
        for row, rule in enumerate(self.candidates):
            mask = rule.mask(self.layout.grid.frames)
            sparse = tile_attention(
                q, k, v, mask, self.layout, scale=scale, attn_mask=attn_mask, impl=self.impl
            )
            self._error[row] += _squares(self._frames(sparse) - dense)
        self.calls += 1

    def result(self) -> tuple[CandidateError, ...]:
        """Errors of all candidates over the calls added so far, in the order given."""
        relative = (self._error / self._scale.clamp_min(1e-300)).sqrt()
        return tuple(
            CandidateError(
                rule,
                rule.mask(self.layout.grid.frames).token_density(self.layout),
                float(relative[row, 0]),
                float(relative[row, 1]),
            )
            for row, rule in enumerate(self.candidates)
        )

    def _frames(self, out: torch.Tensor) -> torch.Tensor:
        grid = self.layout.grid
        video = out[:, :, self.layout.prefix : self.layout.prefix + grid.tokens]
        # [batch, heads, frames, tokens_per_frame, head_dim]
        return video.unflatten(2, (grid.frames, grid.tokens_per_frame)).float()


def _squares(frames: torch.Tensor) -> torch.Tensor:
    """Sum of squares of a signal and of its frame-to-frame change: ``[2]``, fp64, on the CPU."""
    change = frames[:, :, 1:] - frames[:, :, :-1]
    return torch.stack([frames.square().sum(), change.square().sum()]).to("cpu", torch.float64)
