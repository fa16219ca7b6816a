"""The operator ``torch.ops.evdit.tile_attention``: schema, fake, autograd, autocast.

Importing this module needs PyTorch only. The mask travels as ``TileMask.segments()``, static lists
in frame units, so its structure is known on the host and the token counts may be symbolic.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from evdit_opt.kernels import dispatch
from evdit_opt.kernels.checks import check_inputs, check_segments, check_values
from evdit_opt.kernels.dense import lse_dtype
from evdit_opt.kernels.geometry import Geometry

__all__ = ["tile_attention_op"]

LAYOUT = "SymInt frames, SymInt tokens_per_frame, SymInt prefix, SymInt suffix, float? scale"
MASK = f"Tensor? attn_mask, int[] intervals, float[] log_weights, {LAYOUT}"


def _geometry(frames: int, tokens_per_frame: int, prefix: int, suffix: int) -> Geometry:
    return Geometry(frames=frames, tokens=tokens_per_frame, prefix=prefix, suffix=suffix)


def _scale(scale: float | None, q: Tensor) -> float:
    return 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale


@torch.library.custom_op(
    "evdit::tile_attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {MASK}, str impl) -> (Tensor out, Tensor lse)",
)
def tile_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    intervals: Sequence[int],
    log_weights: Sequence[float],
    frames: int,
    tokens_per_frame: int,
    prefix: int,
    suffix: int,
    scale: float | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Attention over the kept tiles; see ``evdit_opt.kernels.tile_attention`` for people's version.

    Args:
        q: ``[batch, heads, seq, head_dim]``, float32, float16 or bfloat16 (float64 except Triton).
        k: ``[batch, kv_heads, seq, head_dim]``.
        v: like k.
        attn_mask: None, or a key-padding mask ``[batch | 1, heads | 1, 1, seq]``.
        intervals: ``TileMask.segments()[0]``.
        log_weights: ``TileMask.segments()[1]``.
        frames: latent frames.
        tokens_per_frame: tokens of a frame; seq = prefix + frames * tokens_per_frame + suffix.
        prefix: text tokens before the video.
        suffix: text tokens after the video.
        scale: multiplies the logits; None is 1 / sqrt(head_dim).
        impl: one of ``dispatch.IMPLEMENTATIONS``.

    Returns:
        out: strides of ``torch.empty_like(q)``; 0 where ``attn_mask`` hides every kept key.
        lse: ``[batch, heads, seq]``, contiguous, natural log of the sum of exp(weighted logits),
            float32 (float64 for float64 inputs); -inf where ``attn_mask`` hides every kept key.

    Raises:
        MaskError: if mask, layout and tensors do not fit together.
        UnsupportedInputError: if dtype, device or head_dim are not supported.
    """
    geometry = _geometry(frames, tokens_per_frame, prefix, suffix)
    mask = tuple(intervals), tuple(log_weights)
    _check(q, k, v, attn_mask, *mask, geometry, impl)
    check_values(attn_mask)
    return dispatch.forward(q, k, v, attn_mask, *mask, geometry, _scale(scale, q), impl)


@tile_attention_op.register_fake
def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    intervals: Sequence[int],
    log_weights: Sequence[float],
    frames: int,
    tokens_per_frame: int,
    prefix: int,
    suffix: int,
    scale: float | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    geometry = _geometry(frames, tokens_per_frame, prefix, suffix)
    _check(q, k, v, attn_mask, tuple(intervals), tuple(log_weights), geometry, impl)
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=lse_dtype(q.dtype))


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    intervals: tuple[int, ...],
    log_weights: tuple[float, ...],
    geometry: Geometry,
    impl: str,
) -> None:
    """What can be said about a call without its values, when it runs and when it is traced."""
    check_inputs(q, k, v, attn_mask, geometry)
    check_segments(intervals, log_weights, int(geometry.frames))
    dispatch.check(impl, q, geometry, attn_mask)


@torch.library.custom_op(
    "evdit::tile_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {MASK},"
    " str impl='auto') -> (Tensor, Tensor, Tensor)",
)
def tile_attention_backward_op(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    intervals: Sequence[int],
    log_weights: Sequence[float],
    frames: int,
    tokens_per_frame: int,
    prefix: int,
    suffix: int,
    scale: float | None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in the strides of ``torch.empty_like`` of each.

    Args and errors as of the forward operator, whose ``impl`` also decides here.
    """
    return dispatch.backward(
        grad_out,
        q,
        k,
        v,
        out,
        lse,
        attn_mask,
        tuple(intervals),
        tuple(log_weights),
        _geometry(frames, tokens_per_frame, prefix, suffix),
        _scale(scale, q),
        impl,
    )


@tile_attention_backward_op.register_fake
def _fake_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, attn_mask, *rest = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, attn_mask)
    ctx.mark_non_differentiable(lse)
    ctx.arguments = rest


def _backward(ctx: Any, grad_out: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, attn_mask = ctx.saved_tensors
    grads = torch.ops.evdit.tile_attention_backward(
        grad_out, q, k, v, out, lse, attn_mask, *ctx.arguments
    )
    return (*grads, *(None,) * 9)


tile_attention_op.register_autograd(_backward, setup_context=_setup_context)

# torch.library.register_autocast casts to one fixed dtype; autocast may be float16 or bfloat16.
_LIBRARY = torch.library.Library("evdit", "FRAGMENT")


def _autocast(device_type: str) -> Any:
    def cast(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        dtype = torch.get_autocast_dtype(device_type)
        q, k, v = (x.to(dtype) if x.dtype != torch.float64 else x for x in (q, k, v))
        with torch.amp.autocast(device_type, enabled=False):
            out, lse = torch.ops.evdit.tile_attention(q, k, v, *rest)
            return out, lse

    return cast


_LIBRARY.impl("tile_attention", _autocast("cpu"), "AutocastCPU")
_LIBRARY.impl("tile_attention", _autocast("cuda"), "AutocastCUDA")
