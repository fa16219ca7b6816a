"""Attention of a few queries, one frame of keys at a time.

Every tile mask is a choice among these parts, put together by log-sum-exp. So one pass over q, k, v
serves all candidate masks, and a few positions of every frame stand for all of them: the cost is
``positions / tokens per frame`` of one dense attention, and memory is linear in the sequence.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from evdit_opt.grid import TokenLayout
from evdit_opt.kernels.dense import attend, key_bias

__all__ = ["Parts", "tile_parts"]

MAX_ELEMENTS = 1 << 22
"""Numbers that the parts of some heads may take at once: 16 MiB in float32. What all rules together
make of them is several times as large."""


@dataclass(frozen=True)
class Parts:
    """Attention of sampled video queries over every part of the keys.

    Attributes:
        out: ``[batch, heads, frames, positions, parts, head_dim]``, float32. The parts are the
            frames of the video and, where there is text, all of it.
        lse: ``[batch, heads, frames, positions, parts]``, float32; -inf where padding hides a part.
        frames: latent frames of the video.
    """

    out: Tensor
    lse: Tensor
    frames: int

    def combine(self, bias: Tensor) -> Tensor:
        """The output under several masks at once.

        Args:
            bias: ``[masks, frames, frames]``, ``TileMask.bias`` of each.

        Returns:
            ``[masks, batch, heads, frames, positions, head_dim]``, float32; 0 where padding hides
            every kept key.
        """
        return self.mix(self.shares(bias))

    def mix(self, shares: Tensor) -> Tensor:
        """What :meth:`combine` returns, from the :meth:`shares` of the same masks."""
        # One small matrix product per query: broadcasting over masks would copy ``out`` for each.
        return (shares.movedim(0, -2) @ self.out).movedim(-2, 0)

    def mass(self) -> Tensor:
        """Share of the dense attention that each part gets, ``[heads, frames, parts]``.

        Mean over batch and positions. Rows add up to 1.
        """
        return self.shares(self.lse.new_zeros(1, self.frames, self.frames))[0].mean((0, 3))

    def shares(self, bias: Tensor) -> Tensor:
        """What every part gets of a row under several masks at once; a row adds up to 1.

        Args:
            bias: as in :meth:`combine`.

        Returns:
            ``[masks, batch, heads, frames, positions, parts]``, float32.
        """
        text = self.lse.shape[-1] - self.frames
        bias = torch.nn.functional.pad(bias.to(self.lse), (0, text))
        logits = self.lse + bias[:, None, None, :, None, :]
        return logits.softmax(-1).nan_to_num_(0.0)


def tile_parts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TokenLayout,
    positions: Tensor,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Iterator[Parts]:
    """Attention of the queries at some positions of every frame, a few heads at a time.

    Args:
        q: ``[batch, heads, seq, head_dim]``.
        k: ``[batch, kv_heads, seq, head_dim]``; heads is a multiple of kv_heads.
        v: like k.
        layout: where frames and text lie in the sequence.
        positions: ``[positions]``, integers below ``layout.grid.tokens_per_frame``.
        attn_mask: None, or a key-padding mask ``[batch | 1, heads | 1, 1, seq]``.
        scale: multiplies the logits; None is ``1 / sqrt(head_dim)``.

    Yields:
        The parts of successive heads, in order.
    """
    grid = layout.grid
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    text = layout.text_tokens > 0
    video = slice(layout.prefix, layout.prefix + grid.tokens)
    groups = q.shape[1] // k.shape[1]
    bias = key_bias(attn_mask, q)
    sampled = q[:, :, video].unflatten(2, (grid.frames, -1))[:, :, :, positions.to(q.device)]
    size = sampled[:, 0].numel() * (grid.frames + text)
    step = max(1, MAX_ELEMENTS // size)
    for first in range(0, q.shape[1], step):
        heads = slice(first, first + step)
        own = [head // groups for head in range(q.shape[1])[heads]]
        rows = sampled[:, heads].flatten(2, 3)
        own_bias = bias if bias is None or bias.shape[1] == 1 else bias[:, heads]
        found = [_frames(rows, k[:, own, video], v[:, own, video], own_bias, layout, scale)]
        if text:
            found.append(_text(rows, k[:, own], v[:, own], own_bias, layout, scale))
        out = torch.cat([out for out, _ in found])  # [parts, batch, heads, rows, head_dim]
        lse = torch.cat([lse for _, lse in found])
        yield Parts(
            out.movedim(0, -2).unflatten(2, (grid.frames, -1)).float(),
            lse.movedim(0, -1).unflatten(2, (grid.frames, -1)).float(),
            grid.frames,
        )


def _frames(
    rows: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, layout: TokenLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """Every frame of keys, as the batch of one call."""
    grid, batch = layout.grid, rows.shape[0]
    k, v = (x.unflatten(2, (grid.frames, -1)).movedim(2, 0).flatten(0, 1) for x in (k, v))
    if bias is not None:
        own = bias[..., layout.prefix : layout.prefix + grid.tokens].expand(batch, -1, -1, -1)
        bias = own.unflatten(3, (grid.frames, -1)).movedim(3, 0).flatten(0, 1)
    q = rows.expand(grid.frames, *rows.shape).flatten(0, 1)
    out, lse = attend(q, k, v, bias, scale)
    return out.unflatten(0, (grid.frames, batch)), lse.unflatten(0, (grid.frames, batch))


def _text(
    rows: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, layout: TokenLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """The text on both sides of the video, as one part."""
    stop = layout.prefix + layout.grid.tokens
    k, v = (torch.cat([x[:, :, : layout.prefix], x[:, :, stop:]], 2) for x in (k, v))
    if bias is not None:
        bias = torch.cat([bias[..., : layout.prefix], bias[..., stop:]], -1)
    out, lse = attend(rows, k, v, bias, scale)
    return out.unsqueeze(0), lse.unsqueeze(0)
