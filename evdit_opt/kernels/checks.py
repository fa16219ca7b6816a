"""What a call of tile attention must satisfy, checked before anything is launched or traced."""

from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from evdit_opt.errors import MaskError, UnsupportedInputError
from evdit_opt.grid import TokenLayout
from evdit_opt.kernels.geometry import Geometry
from evdit_opt.masks import TileMask

__all__ = [
    "check_frames", "check_groups", "check_inputs", "check_segments", "check_tangents",
    "check_values",
]  # fmt: skip

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MAX_HEAD_DIM = 256


def check_frames(mask: TileMask, layout: TokenLayout) -> None:
    """Check that a mask is one for the frames of a layout.

    Raises:
        MaskError: if it is not.
    """
    if mask.frames != layout.grid.frames:
        raise MaskError(
            f"expected a mask of {layout.grid.frames} frames for this layout, got {mask.frames}; "
            "use rule.mask(layout.grid.frames)"
        )


def check_groups(q: Tensor, k: Tensor, groups: int) -> None:
    """Check that masks can share the heads: ``groups`` of them, equal ones.

    Raises:
        MaskError: if they cannot.
    """
    fits = q.ndim == k.ndim == 4 and groups > 0
    if not fits or q.shape[1] % groups or k.shape[1] % groups:
        raise MaskError(
            "expected a tile mask, or several that divide the heads of q and k [batch, heads, seq, "
            f"head_dim] into equal groups, got {groups} masks for {_shapes(q, k)}"
        )


def check_inputs(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, geometry: Geometry
) -> None:
    """Check tensors against each other and against the layout.

    Raises:
        MaskError: if shapes, layout or attn_mask do not fit together.
        UnsupportedInputError: if a dtype or head_dim is not supported, devices differ, or a tensor
            carries a tangent (forward-mode differentiation).
    """
    shape, keys, values = q.shape, k.shape, v.shape
    if not len(shape) == len(keys) == len(values) == 4 or any(map(_differ, keys, values)):
        raise MaskError(
            "expected q, k, v [batch, heads, seq, head_dim] with k and v alike, "
            f"got {_shapes(q, k, v)}"
        )
    batch, heads, seq, head_dim = shape
    if _differ(batch, keys[0]) or _differ(seq, keys[2]) or _differ(head_dim, keys[3]):
        raise MaskError(
            "expected q and k with equal batch, seq and head_dim (self-attention), "
            f"got {_shapes(q, k, v)}"
        )
    if keys[1] == 0 or heads % keys[1]:
        raise MaskError(
            f"expected the heads of q to be a multiple of those of k, got {heads} and {keys[1]}"
        )
    lengths = (geometry.frames - 1, geometry.tokens - 1, geometry.prefix, geometry.suffix)
    if _differ(seq, geometry.seq_len) or any(_is_known(n) and n < 0 for n in lengths):
        raise MaskError(
            f"expected seq = prefix + frames * tokens_per_frame + suffix = {geometry.prefix} + "
            f"{geometry.frames} * {geometry.tokens} + {geometry.suffix} = {geometry.seq_len}, "
            f"got {seq}; pass the layout of this sequence"
        )
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        raise UnsupportedInputError(
            "expected q, k, v of one dtype, float32, float16, bfloat16 or float64, "
            f"got {q.dtype}, {k.dtype}, {v.dtype}; cast them"
        )
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise UnsupportedInputError(f"expected head_dim in 1..{MAX_HEAD_DIM}, got {head_dim}")
    tensors = [q, k, v] if attn_mask is None else [q, k, v, attn_mask]
    if any(x.device != q.device for x in tensors):
        raise UnsupportedInputError(
            f"expected all tensors on one device, got {[str(x.device) for x in tensors]}; move them"
        )
    if attn_mask is not None:
        _check_attn_mask(q, attn_mask)
    check_tangents(q, k, v)


def check_tangents(*tensors: Tensor) -> None:
    """Check that nobody differentiates forward: PyTorch drops the tangents of custom operators.

    To be asked before the operator, too: there ``torch.func.jvp`` has unwrapped its tensors.

    Raises:
        UnsupportedInputError: if a tensor carries a tangent.
    """
    if any(unpack_dual(x).tangent is not None for x in tensors):
        raise UnsupportedInputError(
            "expected q, k, v without tangents, as tile attention has no forward-mode derivative; "
            "use reverse mode instead of torch.func.jvp, or attend densely there"
        )


@lru_cache(maxsize=256)
def check_segments(intervals: tuple[int, ...], log_weights: tuple[float, ...], frames: int) -> None:
    """Check that ``TileMask.segments()`` lists are a mask of ``frames`` frames.

    Raises:
        MaskError: if they are not; also if a row keeps no tile.
    """
    TileMask.from_segments(frames, intervals, log_weights)


def check_values(attn_mask: Tensor | None) -> None:
    """Check the numbers of an additive mask: finite, or -inf.

    On a CPU only: elsewhere looking at values would wait for the device, and break CUDA graphs.
    There a NaN or +inf in the mask makes the output NaN.

    Raises:
        MaskError: if a number is NaN or +inf.
    """
    if attn_mask is None or attn_mask.device.type != "cpu" or attn_mask.dtype == torch.bool:
        return
    if not bool((attn_mask < torch.inf).all()):  # False for NaN, too
        raise MaskError(
            "expected finite numbers or -inf in attn_mask, got NaN or +inf; use -inf, or a bool "
            "mask with False, to hide a key"
        )


def _check_attn_mask(q: Tensor, attn_mask: Tensor) -> None:
    batch, heads, seq = q.shape[:3]
    shape = tuple(attn_mask.shape)
    fits = len(shape) == 4 and shape[0] in (1, batch) and shape[1] in (1, heads)
    if not fits or shape[2] != 1 or _differ(shape[3], seq):
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


def _differ(a: int, b: int) -> bool:
    """Whether two sizes differ. While tracing, what only the run can tell is left to the run."""
    if type(a) is int and type(b) is int:
        return a != b
    difference = a - b
    return _is_known(difference) and difference != 0


def _is_known(n: int) -> bool:
    """Whether the tracer knows a value that this size has."""
    return not isinstance(n, torch.SymInt) or n.node.has_hint()
