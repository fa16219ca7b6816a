"""The operator ``torch.ops.evdit.row_error``: a few rows of an attention's output against dense.

It costs ``rows / seq`` of a dense attention, and its result stays on the device.
"""

import torch
from torch import Tensor

from evdit_opt.kernels.dense import attend, key_bias

__all__ = ["row_error_op"]


@torch.library.custom_op(
    "evdit::row_error",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? attn_mask, Tensor out, Tensor rows, "
    "SymInt frames, SymInt tokens_per_frame, SymInt prefix, float? scale) -> Tensor",
)
def row_error_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    out: Tensor,
    rows: Tensor,
    frames: int,
    tokens_per_frame: int,
    prefix: int,
    scale: float | None,
) -> Tensor:
    """How far ``out`` is from dense attention at some queries of the video.

    Args:
        q: ``[batch, heads, seq, head_dim]``.
        k: ``[batch, kv_heads, seq, head_dim]``; heads is a multiple of kv_heads.
        v: like k.
        attn_mask: None, or a key-padding mask ``[batch | 1, heads | 1, 1, seq]``.
        out: like q: what was computed in the place of dense attention.
        rows: ``[rows]``, floating point in 0..1: which queries, as shares of the video.
        frames: latent frames.
        tokens_per_frame: tokens of a frame.
        prefix: text tokens before the video.
        scale: multiplies the logits; None is ``1 / sqrt(head_dim)``.

    Returns:
        ``[2]``, float32: the sums of squares of ``out - dense`` and of ``dense``.
    """
    video = frames * tokens_per_frame
    tokens = prefix + (rows.to(q.device) * video).long().clamp_(max=video - 1)
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    right, _ = attend(q[:, :, tokens], k, v, key_bias(attn_mask, q), scale)
    wrong = out[:, :, tokens].float() - right.float()
    return torch.stack([wrong.square().sum(), right.float().square().sum()])


@row_error_op.register_fake
def _fake(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(2, dtype=torch.float32)
