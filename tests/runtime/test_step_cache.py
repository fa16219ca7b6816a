"""A cache that skips blocks of a step (diffusers' FirstBlockCache) on an optimized model."""

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from torch import Tensor, nn

from evdit_opt.apply import report
from tests.models.case import Shape
from tests.models.masked import masked_attention
from tests.runtime.pair import APART, REORDERED, ROUNDED, WAN, Pair, far


@torch.no_grad()
def second_step(model: nn.Module, shape: Shape) -> Tensor:
    """The second of two calls at different noise levels."""
    call = WAN.inputs(shape)
    with model.cache_context("cond"):
        model(**call)
        out: Tensor = model(**{**call, "timestep": call["timestep"] - 10})[0]
    model._reset_stateful_cache()
    return out


@pytest.mark.parametrize("when", [pytest.param("before", marks=pytest.mark.nightly), "after"])
def test_skipped_blocks_are_those_of_the_plain_model(when: str) -> None:
    pair = Pair(Shape(layers=3))
    cache = FirstBlockCacheConfig(threshold=10.0)  # the second step skips all blocks but the first
    if when == "before":
        pair.both(lambda model: model.enable_cache(cache))
    pair.apply()
    if when == "after":
        pair.check()
        pair.both(lambda model: model.enable_cache(cache))

    def masked(order: str) -> Tensor:
        with masked_attention(pair.plain, pair.rules, WAN.layouts(pair.shape), order):
            return second_step(pair.plain, pair.shape)

    right, *others = (masked(order) for order in ("", "backwards", "rotated"))
    eps = torch.finfo(right.dtype).eps
    bound = REORDERED * max(far(other, right) for other in others) + ROUNDED * eps * far(right)
    assert far(second_step(pair.fast, pair.shape), right) <= bound
    assert report(pair.fast).rewritten == tuple(pair.rules)
    assert far(second_step(pair.plain, pair.shape), right) > APART * bound
    pair.plain.disable_cache()
    with masked_attention(pair.plain, pair.rules, WAN.layouts(pair.shape)):
        call = WAN.inputs(pair.shape)
        with torch.no_grad():
            full = pair.plain(**{**call, "timestep": call["timestep"] - 10})[0]
    assert far(full, right) > APART * bound, "nothing was skipped"
