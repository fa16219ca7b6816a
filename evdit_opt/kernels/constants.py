"""Small tensors of known numbers, sent to a device once.

Sending waits for the device, and cannot be recorded in a CUDA graph: no call may do it again. What
is sent is never thrown away, because a recorded graph keeps its address.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["constant", "on_device"]


def constant(values: tuple[float, ...], like: Tensor) -> Tensor:
    """``values`` as a tensor ``[len(values)]``, of the dtype and on the device of ``like``."""
    # On a CPU there is no way to save; and what a tracer makes must not be kept.
    if like.device.type == "cpu" or type(like) is not Tensor:
        return like.new_tensor(values)
    return _kept(values, like.dtype, like.device)


@cache
def _kept(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return on_device(torch.tensor(values, dtype=dtype), device)


def on_device(x: Any, device: torch.device) -> Any:
    """A copy of a tensor (or what else has ``to``) on ``device``, in memory of its ordinary pool.

    torch.compile's CUDA graphs warm up with all allocations of the calling thread in the pool of
    the graph, and reject what outlives the call there. So another thread allocates.
    """
    if device.type != "cuda":
        return x.to(device)
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(x.to, device).result()
