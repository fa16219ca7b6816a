"""Tile attention by PyTorch's FlexAttention: a peer to measure against, and a way to its backends.

The mask becomes a BlockMask: blocks of tokens with every pair kept, and blocks at the edge of a
frame, where a function of the two positions decides. Weights and padding change the scores.
FlexAttention is compiled at the first call of a kind, which takes seconds; so "auto" does not try
it. The backend "FLASH" runs flash-attn 4, where that is installed.
"""

import importlib.util
from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from evdit_opt.errors import UnsupportedInputError
from evdit_opt.kernels.constants import on_device
from evdit_opt.kernels.dense import key_bias, lse_dtype
from evdit_opt.kernels.geometry import Geometry
from evdit_opt.masks import DROPPED, TileMask

__all__ = ["Backend", "check", "forward", "make_block_mask", "make_score_mod"]

Backend = Literal["AUTO", "FLASH"]

BLOCK = 128
# What compiles FlexAttention; tests run it uncompiled by "eager".
COMPILER = "inductor"


def check(q: Tensor, backend: Backend) -> None:
    """Check that FlexAttention can run on these tensors and return the log-sum-exp.

    Raises:
        UnsupportedInputError: if it cannot.
    """
    name = "flex" if backend == "AUTO" else "flex_flash"
    if q.device.type == "cpu" and COMPILER == "inductor":
        raise UnsupportedInputError(
            f"expected tensors on a CUDA device for impl='{name}', got {q.device}, where "
            "FlexAttention returns no log-sum-exp; use impl='auto' or 'decomposed' there"
        )
    if q.dtype == torch.float64 and COMPILER == "inductor":
        raise UnsupportedInputError(
            f"expected float32, float16 or bfloat16 for impl='{name}', got {q.dtype}; "
            "cast q, k, v or use impl='decomposed'"
        )
    if q.shape[-1] < 16 and COMPILER == "inductor":
        raise UnsupportedInputError(
            f"expected head_dim of at least 16 for impl='{name}', got {q.shape[-1]}; "
            "use impl='auto' or 'decomposed'"
        )
    if backend == "FLASH" and not _has_flash():
        raise UnsupportedInputError(
            "expected flash-attn 4 for impl='flex_flash', it is not installed; "
            "pip install flash-attn-4, or use impl='flex'"
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
    backend: Backend = "AUTO",
) -> tuple[Tensor, Tensor]:
    """Tile attention by FlexAttention.

    Args and returns as in :func:`evdit_opt.kernels.decomposed.forward`.

    Raises:
        UnsupportedInputError: if it cannot run on these tensors.
    """
    check(q, backend)
    mask = (intervals, log_weights, geometry, q.device)
    padding = key_bias(attn_mask, q)
    is_weighted = any(log_weights)
    signature = (
        tuple(q.shape), k.shape[1], q.dtype, q.device, is_weighted,
        None if padding is None else tuple(padding.shape), scale, backend,
    )  # fmt: skip
    result, aux = _compiled(signature)(
        q, k, v, make_score_mod(*mask, padding), make_block_mask(*mask), scale,
        {"BACKEND": backend},
    )  # fmt: skip
    out = torch.empty_like(q)
    out.copy_(result)
    lse = q.new_empty(q.shape[:3], dtype=lse_dtype(q.dtype))
    lse.copy_(aux.lse)
    return out, lse


@cache
def make_block_mask(
    intervals: tuple[int, ...],
    log_weights: tuple[float, ...],
    geometry: Geometry,
    device: torch.device,
) -> BlockMask:
    """The mask as FlexAttention takes it, made from frames: no token pair is looked at."""
    bias, frame_of = _tables(intervals, log_weights, geometry, torch.device("cpu"))
    seq = geometry.seq_len
    blocks = -(-seq // BLOCK)
    held = torch.zeros(blocks, bias.shape[0])  # which frames (the last: text) a block has tokens of
    held[torch.arange(seq) // BLOCK, frame_of.long()] = 1.0
    kept = (bias != DROPPED).float()
    some = held @ kept @ held.T > 0
    every = held @ (1.0 - kept) @ held.T == 0
    if seq % BLOCK:
        every[-1] = every[:, -1] = False  # what lies past the end is not kept
    kept_on_device = on_device(bias != DROPPED, device)
    _, frames_on_device = _tables(intervals, log_weights, geometry, device)

    def keeps(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return kept_on_device[frames_on_device[i], frames_on_device[j]]

    partial, full = _blocks_in_row(some & ~every), _blocks_in_row(every)
    mask = BlockMask.from_kv_blocks(*partial, *full, BLOCK, keeps, (seq, seq))
    return on_device(mask, device)


def make_score_mod(
    intervals: tuple[int, ...],
    log_weights: tuple[float, ...],
    geometry: Geometry,
    device: torch.device,
    padding: Tensor | None,
) -> Callable[..., Tensor] | None:
    """What is added to the scores: the weights of tiles, and ``padding`` as of ``key_bias``."""
    if padding is None and not any(log_weights):
        return None
    bias, frame_of = _tables(intervals, log_weights, geometry, device)

    def weigh(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + bias[frame_of[i], frame_of[j]]

    if padding is None:
        return weigh
    over_batch, over_heads = (int(size > 1) for size in padding.shape[:2])
    hidden = padding[:, :, 0]

    def hide(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + hidden[b * over_batch, h * over_heads, j]

    def weigh_and_hide(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return hide(weigh(score, b, h, i, j), b, h, i, j)

    return weigh_and_hide if any(log_weights) else hide


@cache
def _tables(
    intervals: tuple[int, ...],
    log_weights: tuple[float, ...],
    geometry: Geometry,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Bias of a pair of frames ``[frames + 1, frames + 1]``, and the frame of a token ``[seq]``.

    Text is one frame more, the last, that keeps and is kept by everything.
    """
    mask = TileMask.from_segments(geometry.frames, intervals, log_weights)
    bias = torch.zeros(mask.frames + 1, mask.frames + 1)
    bias[:-1, :-1] = mask.bias
    frame_of = torch.full((geometry.seq_len,), mask.frames, dtype=torch.int32)
    video = torch.arange(mask.frames, dtype=torch.int32).repeat_interleave(geometry.tokens)
    frame_of[geometry.prefix : geometry.prefix + len(video)] = video
    return on_device(bias, device), on_device(frame_of, device)


def _blocks_in_row(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks a row has, and which, as ``BlockMask`` takes them."""
    count = chosen.sum(1, dtype=torch.int32)
    order = torch.argsort(chosen.int(), dim=1, descending=True, stable=True).int()
    return count[None, None], order[None, None]


def _attention(
    q: Tensor, k: Tensor, v: Tensor, score_mod: Any, block_mask: Any, scale: float, options: Any
) -> Any:
    return flex_attention(
        q, k, v, score_mod, block_mask, scale,
        enable_gqa=q.shape[1] != k.shape[1], kernel_options=options,
        return_aux=AuxRequest(lse=True),
    )  # fmt: skip


@cache
def _compiled(signature: tuple[Any, ...]) -> Callable[..., Any]:
    """FlexAttention compiled for one kind of call.

    Dynamo counts recompilations per code object and gives up after a few: a copy each.
    """
    function = FunctionType(_attention.__code__.replace(), _attention.__globals__)
    return torch.compile(function, backend=COMPILER, fullgraph=True, dynamic=False)


def _has_flash() -> bool:
    return importlib.util.find_spec("flash_attn") is not None and (
        importlib.util.find_spec("flash_attn.cute") is not None
    )
