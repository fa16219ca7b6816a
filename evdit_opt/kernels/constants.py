"""Small tensors of known numbers, sent to a device once.

Sending waits for the device, and cannot be recorded in a CUDA graph: no call may do it again.
"""

from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["constant"]


def constant(values: tuple[float, ...], like: Tensor) -> Tensor:
    """``values`` as a tensor ``[len(values)]``, of the dtype and on the device of ``like``."""
    # On a CPU there is no way to save; and what a tracer makes must not be kept.
    if like.device.type == "cpu" or type(like) is not Tensor:
        return like.new_tensor(values)
    return _kept(values, like.dtype, like.device)


@lru_cache(maxsize=256)
def _kept(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)
