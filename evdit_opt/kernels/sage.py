"""SageAttention as the dense kernel of the decomposition: 8-bit arithmetic, where it is installed.

Its results are not exact, so only a caller who asks for impl="sage" gets it. Not measured: nobody
here has run it on a GPU. Version 2 or later: the one on PyPI is 1, whose merge would be wrong.
"""

import importlib.util
import inspect
from functools import cache

import torch
from torch import Tensor

from evdit_opt.errors import UnsupportedInputError

__all__ = ["attend", "check"]

DEVICES = ("cuda",)
MAX_HEAD_DIM = 128
SOURCE = "https://github.com/thu-ml/SageAttention"


def check(q: Tensor, attn_mask: Tensor | None) -> None:
    """Check that SageAttention can run on tensors like these.

    Raises:
        UnsupportedInputError: if it is not installed, or an older one, or for another device than
            CUDA, another dtype than float16 or bfloat16, a head_dim beyond 128, or with a
            key-padding mask.
    """
    if not _is_installed():
        raise UnsupportedInputError(
            "expected SageAttention 2 for impl='sage', it is not installed; install it from "
            f"{SOURCE}, or use impl='auto'"
        )
    if not _returns_lse():
        raise UnsupportedInputError(
            "expected SageAttention 2 for impl='sage', got an older one, which returns no "
            f"log-sum-exp; install it from {SOURCE}, or use impl='auto'"
        )
    if q.device.type not in DEVICES:
        raise UnsupportedInputError(
            f"expected tensors on a CUDA device for impl='sage', got {q.device}; use impl='auto'"
        )
    if q.dtype not in (torch.float16, torch.bfloat16) or q.shape[-1] > MAX_HEAD_DIM:
        raise UnsupportedInputError(
            f"expected float16 or bfloat16 and head_dim up to {MAX_HEAD_DIM} for impl='sage', got "
            f"{q.dtype} and {q.shape[-1]}; use impl='auto'"
        )
    if attn_mask is not None:
        raise UnsupportedInputError(
            "expected no attn_mask for impl='sage', whose kernels take none; use impl='auto'"
        )


def attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention of every query with every key, in 8 bits.

    Args and returns as in :func:`evdit_opt.kernels.dense.attend`; ``bias`` must be None.
    """
    from sageattention import sageattn  # optional, and imports Triton

    assert bias is None, "check() has refused it"
    out, lse = sageattn(q, k, v, tensor_layout="HND", sm_scale=scale, return_lse=True)
    return out, lse


@cache
def _is_installed() -> bool:
    return importlib.util.find_spec("sageattention") is not None


@cache
def _returns_lse() -> bool:
    """Version 1, which PyPI has, swallows return_lse and returns one tensor."""
    from sageattention import sageattn

    return "return_lse" in inspect.signature(sageattn).parameters
