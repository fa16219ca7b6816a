"""Tile attention as one dense attention call with the mask of every token pair added to the logits.

It computes every tile, the dropped ones too, and holds numbers for all pairs of tokens; but it is a
single call, and for short sequences nothing else is faster.
"""

from collections.abc import Callable
from functools import cache, lru_cache

import torch
from torch import Tensor

from evdit_opt.errors import UnsupportedInputError
from evdit_opt.grid import TokenLayout, VideoGrid
from evdit_opt.kernels import dense
from evdit_opt.kernels.constants import on_device
from evdit_opt.kernels.dense import key_bias, lse_dtype
from evdit_opt.kernels.geometry import Geometry
from evdit_opt.masks import TileMask

__all__ = ["MAX_SEQ", "attend_pairs", "check", "forward", "pair_bias", "pair_dtype"]

# Tokens of the longest sequence: its mask takes 16 MiB in float32, and the last few are kept.
MAX_SEQ = 2048

Attend = Callable[..., tuple[Tensor, Tensor]]  # as dense.attend


def check(geometry: Geometry) -> None:
    """Check that the mask of all token pairs is small.

    Raises:
        UnsupportedInputError: if the sequence is longer than ``MAX_SEQ``.
    """
    if geometry.seq_len > MAX_SEQ:
        raise UnsupportedInputError(
            f"expected at most {MAX_SEQ} tokens for impl='masked', whose memory grows with their "
            f"square, got {geometry.seq_len}; use impl='auto' or 'decomposed'"
        )


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    intervals: tuple[int, ...],
    log_weights: tuple[float, ...],
    geometry: Geometry,
    scale: float,
    attend: Attend = dense.attend,
) -> tuple[Tensor, Tensor]:
    """Tile attention in one call of ``attend``.

    Args and returns as in :func:`evdit_opt.kernels.decomposed.forward`.

    Raises:
        UnsupportedInputError: if the sequence is longer than ``MAX_SEQ``.
    """
    check(geometry)
    # A recorded CUDA graph keeps the address: there, a mask must live as long as the process.
    keep = pair_bias if q.device.type == "cpu" else _forever
    bias = keep(intervals, log_weights, geometry, lse_dtype(q.dtype), q.device)
    return attend_pairs(q, k, v, attn_mask, bias, scale, attend)


def attend_pairs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    bias: Tensor,
    scale: float,
    attend: Attend = dense.attend,
) -> tuple[Tensor, Tensor]:
    """The call itself, for a ``bias`` ``[1, 1, seq, seq]`` as of ``pair_bias``; can be traced."""
    q_call, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    padding = key_bias(attn_mask, q)
    if padding is not None:
        bias = bias + padding  # [batch | 1, heads | 1, seq, seq]
    result, lse = attend(q_call, k, v, bias, scale, may_be_empty=padding is not None)
    out = torch.empty_like(q)
    if result.stride() == out.stride():
        return result, lse.contiguous()
    return out.copy_(result), lse.contiguous()


def pair_dtype(log_weights: tuple[float, ...], dtype: torch.dtype) -> torch.dtype:
    """The dtype of a mask for inputs of ``dtype`` on a CPU, where its bytes cost time.

    Zeros and -inf are exact in any, weights are not.
    """
    return lse_dtype(dtype) if any(log_weights) else dtype


def _pair_bias(
    intervals: tuple[int, ...],
    log_weights: tuple[float, ...],
    geometry: Geometry,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """The mask at token level, ``[1, 1, seq, seq]``."""
    mask = TileMask.from_segments(geometry.frames, intervals, log_weights)
    grid = VideoGrid(geometry.frames, geometry.tokens, 1)
    layout = TokenLayout(grid, prefix=geometry.prefix, suffix=geometry.suffix)
    return on_device(mask.expand(layout).to(dtype), device)[None, None]


pair_bias, _forever = lru_cache(maxsize=16)(_pair_bias), cache(_pair_bias)
