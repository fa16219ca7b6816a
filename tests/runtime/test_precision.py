"""Inference mode, autocast, and models cast to another dtype."""

import pytest
import torch

from tests.models.case import Shape
from tests.often import often
from tests.runtime.pair import WAN, Pair

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
dtypes = pytest.mark.parametrize("dtype", often(["bf16"], DTYPES))


def test_inference_mode_and_back() -> None:
    pair = Pair(Shape(layers=1))
    pair.apply()
    with torch.inference_mode():
        assert pair.check().is_inference()
    pair.check()
    with torch.enable_grad():
        assert pair.fast(**WAN.inputs(pair.shape))[0].requires_grad
    assert pair.graphs == 3  # inference mode, no gradients, gradients


@dtypes
def test_autocast(dtype: torch.dtype) -> None:
    pair = Pair()
    pair.apply()
    with torch.autocast("cpu", dtype):
        assert pair.check().dtype == dtype
    assert pair.check().dtype == torch.float32


@dtypes
def test_a_model_cast_before_or_after(dtype: torch.dtype) -> None:
    pair = Pair(Shape(layers=1))
    pair.apply()
    pair.check()
    pair.both(lambda model: model.to(dtype))  # also what pipe.to(dtype) does
    assert pair.check(dtype=dtype).dtype == dtype

    pair = Pair(Shape(layers=1))
    pair.both(lambda model: model.to(dtype))
    pair.apply()
    pair.check(dtype=dtype)
