"""A few exact rows of the attention map: sampled video queries against all keys, head by head."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from evdit_opt.grid import TokenLayout
from evdit_opt.kernels.dense import key_bias, lse_dtype

__all__ = ["RowSample", "attention_rows", "sample_rows"]

FRAMES, POSITIONS = 4, 4
"""Query frames, and positions in each, that stand for all: 16 rows, whatever the sequence."""

MAX_ELEMENTS = 1 << 22
"""Weights of some heads at once, in numbers: 16 MiB in float32."""


@dataclass(frozen=True)
class RowSample:
    """Which queries are looked at.

    Attributes:
        frames: ``[frames]``, ascending latent frames.
        positions: ``[positions]``, the same ones in each of them.
    """

    frames: Tensor
    positions: Tensor


def sample_rows(layout: TokenLayout, generator: torch.Generator) -> RowSample:
    """A random sample; all rows where there are no more."""
    grid = layout.grid
    frames = torch.randperm(grid.frames, generator=generator)[:FRAMES].sort().values
    positions = torch.randperm(grid.tokens_per_frame, generator=generator)[:POSITIONS]
    return RowSample(frames, positions.sort().values)


def attention_rows(
    q: Tensor,
    k: Tensor,
    layout: TokenLayout,
    sample: RowSample,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Iterator[Tensor]:
    """The softmax of the sampled queries over all keys: memory is linear in the sequence.

    Args:
        q: ``[batch, heads, seq, head_dim]``.
        k: ``[batch, kv_heads, seq, head_dim]``; heads is a multiple of kv_heads.
        layout: where the video lies in the sequence.
        sample: which queries.
        attn_mask: None, or a key-padding mask ``[batch | 1, heads | 1, 1, seq]``.
        scale: multiplies the logits; None is ``1 / sqrt(head_dim)``.

    Yields:
        ``[batch, heads, frames, positions, seq]`` of successive heads, float32 (float64 for float64
        inputs); 0 where padding hides every key.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    groups = q.shape[1] // k.shape[1]
    bias = key_bias(attn_mask, q)
    starts = layout.prefix + sample.frames * layout.grid.tokens_per_frame
    tokens = (starts[:, None] + sample.positions).to(q.device)
    step = max(1, MAX_ELEMENTS // (q.shape[0] * tokens.numel() * q.shape[2]))
    for first in range(0, q.shape[1], step):
        own = [head // groups for head in range(first, min(first + step, q.shape[1]))]
        rows = q[:, first : first + step][:, :, tokens.flatten()].to(lse_dtype(q.dtype))
        # In float32: what is summed up here is compared between calls.
        logits = rows * scale @ k[:, own].to(rows.dtype).transpose(2, 3)
        if bias is not None:
            logits += bias if bias.shape[1] == 1 else bias[:, first : first + step]
        yield logits.softmax(-1).nan_to_num_(0.0).unflatten(2, tuple(tokens.shape))
