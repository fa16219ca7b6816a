"""Which sites have their mark and their attention in different graphs of Dynamo's."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from evdit_opt.passes.observe_attention import observe

__all__ = ["find_split_sites"]


def find_split_sites(
    model: nn.Module, names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> frozenset[str]:
    """Mark all sites, run one call through Dynamo, and return those no mark reaches.

    Args:
        model: the denoiser, dense.
        names: module paths of its sites.
        args: positional arguments of a call.
        kwargs: keyword arguments of a call.
    """
    reached = set()
    with torch.no_grad(), observe(model, names, lambda name, *_: reached.add(name)):
        model(*args, **kwargs)
    return frozenset(names) - reached
