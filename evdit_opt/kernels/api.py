"""Tile attention for people: a mask and a layout instead of lists of integers."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, overload

import torch
from torch import Tensor

from evdit_opt.grid import TokenLayout
from evdit_opt.kernels import ops, short_calls  # noqa: F401  (ops: registers torch.ops.evdit)
from evdit_opt.kernels.checks import check_frames, check_groups, check_tangents
from evdit_opt.masks import TileMask

__all__ = ["tile_attention"]


@overload
def tile_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: TileMask | Sequence[TileMask], layout: TokenLayout, *,
    scale: float | None = ..., attn_mask: Tensor | None = ..., impl: str = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def tile_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: TileMask | Sequence[TileMask], layout: TokenLayout, *,
    scale: float | None = ..., attn_mask: Tensor | None = ..., impl: str = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def tile_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: TileMask | Sequence[TileMask],
    layout: TokenLayout,
    *,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    impl: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention that computes only the tiles a mask keeps, exact at token level.

    A query token of frame i attends to every token of frame j with ``mask.bias[i, j]`` added to the
    logits. Text (prefix and suffix of the layout) attends to, and is attended by, everything.
    Differentiable in q, k and v. The method is Efficient-vDiT's, arXiv 2502.06155.

    Args:
        q: ``[batch, heads, seq, head_dim]``, any strides; float32, float16, bfloat16, or float64
            (not "triton").
        k: ``[batch, kv_heads, seq, head_dim]``; heads is a multiple of kv_heads.
        v: like k.
        mask: the tile mask, for ``layout.grid.frames`` frames; or several, each for an equal share
            of the heads, in their order: one launch each, and no copies of q, k and v.
        layout: where frames and text lie in the sequence.
        scale: multiplies the logits; None is ``1 / sqrt(head_dim)``.
        attn_mask: the model's own key-padding mask, kept in addition to the tile mask:
            ``[batch | 1, heads | 1, 1, seq]``, bool (True = attend) or additive float. It gets no
            gradient. Where it hides every kept key of a query, out is 0 and lse is -inf.
        impl: "auto" (the fastest of the exact implementations: measured the first time a kind of
            call is seen, and remembered in the user's cache folder), "static" (one chosen by a rule
            of thumb, without measuring), "reference" (quadratic memory), "decomposed" (dense
            attention calls), "masked" (one call, at most 2048 tokens), "triton" (the fused kernel),
            "flex" or "flex_flash" (FlexAttention, by Triton or by flash-attn 4; CUDA only), "sage"
            (decomposed, by SageAttention's 8-bit kernels: not exact, no gradient; CUDA only). An
            explicit choice never falls back to another.
        return_lse: also return the log-sum-exp.

    Returns:
        ``[batch, heads, seq, head_dim]``, strides like ``torch.empty_like(q)``; with ``return_lse``
        also ``[batch, heads, seq]``, the natural log of the sum of exp(weighted logits), float32
        (float64 for float64 inputs), not differentiable.

    Raises:
        MaskError: if mask, layout, tensors, ``attn_mask`` or ``impl`` do not fit together.
        UnsupportedInputError: if dtype, device or head_dim are not supported, or for forward-mode
            differentiation.
    """
    if not isinstance(mask, TileMask):
        return _by_group(q, k, v, mask, layout, scale, attn_mask, impl, return_lse)
    compiling = torch.compiler.is_compiling()
    is_plain = not (compiling or return_lse) and attn_mask is None
    if is_plain and short_calls.is_short(q, k, v, impl):
        return short_calls.attend(q, k, v, mask, layout, scale, impl)
    check_frames(mask, layout)
    if not compiling:
        check_tangents(q, k, v)
    intervals, log_weights = mask.segments() if compiling else _segments(mask)
    out, lse = torch.ops.evdit.tile_attention(
        q, k, v, attn_mask, intervals, log_weights,
        layout.grid.frames, layout.grid.tokens_per_frame, layout.prefix, layout.suffix,
        scale, impl,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _by_group(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    masks: Sequence[TileMask],
    layout: TokenLayout,
    scale: float | None,
    attn_mask: Tensor | None,
    impl: str,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """A mask per group of heads; args, returns and errors as of :func:`tile_attention`."""
    check_groups(q, k, len(masks))
    parts = []
    for n, mask in enumerate(masks):
        heads, key_heads = (
            slice(n * x.shape[1] // len(masks), (n + 1) * x.shape[1] // len(masks)) for x in (q, k)
        )
        padding = attn_mask
        if attn_mask is not None and attn_mask.ndim == 4 and attn_mask.shape[1] == q.shape[1]:
            padding = attn_mask[:, heads]
        part = tile_attention(
            q[:, heads], k[:, key_heads], v[:, key_heads], mask, layout,
            scale=scale, attn_mask=padding, impl=impl, return_lse=True,
        )  # fmt: skip
        parts.append((heads, *part))
    # Not torch.cat, which would put the heads outside.
    out = torch.empty_like(q, dtype=parts[0][1].dtype)
    for heads, part_out, _ in parts:
        out[:, heads] = part_out
    return (out, torch.cat([lse for *_, lse in parts], dim=1)) if return_lse else out


# Not for Dynamo, which ignores the cache and warns.
_segments = lru_cache(maxsize=256)(TileMask.segments)
