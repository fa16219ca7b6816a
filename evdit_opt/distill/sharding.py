"""Weights, gradients and optimizer spread over the processes: torch's fully sharded data parallel.

accelerate's plugin is not used: on a CPU it does nothing, so that no test could see it work. What
is spread is put together again for a checkpoint, which is therefore the same file for any number of
processes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

__all__ = ["placed_like", "placed_optimizer", "sharded_copy", "take_back", "whole"]


def sharded_copy(model: nn.Module) -> nn.Module:
    """A copy whose parameters are spread over all processes, block by block.

    Blocks are the modules of the classes that a diffusers model names in ``_no_split_modules``;
    what is outside of them is one more block. The model itself waits on the CPU.
    """
    from torch.distributed.fsdp import fully_shard

    model.to("cpu")
    copied = copy.deepcopy(model)
    names = getattr(model, "_no_split_modules", None) or ()
    for module in list(copied.modules()):
        if type(module).__name__ in names:
            fully_shard(module)
    fully_shard(copied)
    return copied


@torch.no_grad()
def take_back(model: nn.Module, worker: nn.Module, device: torch.device) -> None:
    """Give a model the weights of its sharded copy, and its device."""
    held = dict(model.named_parameters())
    for name, value in worker.named_parameters():
        held[name].copy_(whole(value))
    model.to(device)


def whole(value: torch.Tensor) -> torch.Tensor:
    """A tensor put together from all processes, each of which has to ask; others as they are."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def placed_like(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor, spread over the processes as another one of its shape is."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def placed_optimizer(
    state: Mapping[str, Any], parameters: Iterable[torch.Tensor]
) -> dict[str, Any]:
    """An optimizer's whole ``state_dict``, spread as its parameters are; counters stay."""
    likes = list(parameters)
    spread = {
        number: {
            name: value if name == "step" else placed_like(value, likes[number])
            for name, value in values.items()
        }
        for number, values in state["state"].items()
    }
    return {**state, "state": spread}
