"""What a call of tile attention must satisfy."""

import torch
from torch import Tensor

from evdit_opt.errors import MaskError, UnsupportedInputError
from evdit_opt.kernels.geometry import Geometry

__all__ = ["check_inputs"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MAX_HEAD_DIM = 256


def check_inputs(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, geometry: Geometry
) -> None:
    """Check tensors against each other and against the layout.

    Raises:
        MaskError: if shapes, layout or attn_mask do not fit together.
        UnsupportedInputError: if a dtype or head_dim is not supported, or devices differ.
    """
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise MaskError(
            "expected q, k, v [batch, heads, seq, head_dim] with k and v alike, "
            f"got {_shapes(q, k, v)}"
        )
    if (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise MaskError(
            "expected q and k with equal batch, seq and head_dim (self-attention), "
            f"got {_shapes(q, k, v)}"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise MaskError(
            "expected the heads of q to be a multiple of those of k, "
            f"got {q.shape[1]} and {k.shape[1]}"
        )
    if q.shape[2] != geometry.seq_len or min(geometry.frames, geometry.tokens) < 1:
        raise MaskError(
            f"expected seq = prefix + frames * tokens_per_frame + suffix = {geometry.prefix} + "
            f"{geometry.frames} * {geometry.tokens} + {geometry.suffix} = {geometry.seq_len}, "
            f"got {q.shape[2]}; pass the layout of this sequence"
        )
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        raise UnsupportedInputError(
            "expected q, k, v of one dtype, float32, float16, bfloat16 or float64, "
            f"got {q.dtype}, {k.dtype}, {v.dtype}; cast them"
        )
    if not 1 <= q.shape[3] <= MAX_HEAD_DIM:
        raise UnsupportedInputError(f"expected head_dim in 1..{MAX_HEAD_DIM}, got {q.shape[3]}")
    tensors = [q, k, v] if attn_mask is None else [q, k, v, attn_mask]
    if len({x.device for x in tensors}) > 1:
        raise UnsupportedInputError(
            f"expected all tensors on one device, got {[str(x.device) for x in tensors]}; move them"
        )
    if attn_mask is not None:
        _check_attn_mask(q, attn_mask)


def _check_attn_mask(q: Tensor, attn_mask: Tensor) -> None:
    batch, heads, seq = q.shape[:3]
    shape = tuple(attn_mask.shape)
    fits = len(shape) == 4 and shape[0] in (1, batch) and shape[1] in (1, heads)
    if not fits or shape[2:] != (1, seq):
        raise MaskError(
            f"expected a key-padding attn_mask [{batch} or 1, {heads} or 1, 1, {seq}], got "
            f"{list(shape)}; a mask that depends on the query cannot be combined with a tile mask"
        )
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise UnsupportedInputError(
            f"expected attn_mask bool (True = attend) or floating point, got {attn_mask.dtype}"
        )


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(list(x.shape)) for x in tensors)
