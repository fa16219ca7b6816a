"""Tile attention as one softmax over the expanded mask: the oracle, quadratic in memory."""

import torch
from torch import Tensor

from evdit_opt.grid import TokenLayout, VideoGrid
from evdit_opt.kernels.dense import key_bias, lse_dtype
from evdit_opt.kernels.geometry import Geometry
from evdit_opt.masks import TileMask

__all__ = ["forward"]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    intervals: tuple[int, ...],
    log_weights: tuple[float, ...],
    geometry: Geometry,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Tile attention in float32 (float64 for float64 inputs).

    Args and returns as in :func:`evdit_opt.kernels.decomposed.forward`.
    """
    mask = TileMask.from_segments(geometry.frames, intervals, log_weights)
    grid = VideoGrid(geometry.frames, geometry.tokens, 1)
    layout = TokenLayout(grid, prefix=geometry.prefix, suffix=geometry.suffix)
    wide = lse_dtype(q.dtype)
    groups = q.shape[1] // k.shape[1]
    k_wide, v_wide = (x.to(wide).repeat_interleave(groups, dim=1) for x in (k, v))
    logits = q.to(wide) @ k_wide.transpose(-1, -2) * scale + mask.expand(layout).to(q.device)
    bias = key_bias(attn_mask, q)
    if bias is not None:
        logits = logits + bias
    lse = torch.logsumexp(logits, dim=-1)  # [batch, heads, seq]
    # A query whose keys are all hidden: exp(-inf - inf) = 0 instead of NaN.
    weights = (logits - lse.masked_fill(lse.isneginf(), torch.inf).unsqueeze(-1)).exp()
    out = torch.empty_like(q)
    out.copy_(weights @ v_wide)
    return out, lse
