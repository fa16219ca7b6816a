"""torchao's weight quantization of the linear layers, before and after a plan is applied."""

import pytest
from torch import nn

from tests.models.case import Shape
from tests.runtime.pair import FUSED, Pair

quantization = pytest.importorskip(
    "torchao.quantization", reason="needs torchao: pip install --no-deps torchao"
)

CONFIGS = (
    "Int8WeightOnlyConfig",
    "Int8DynamicActivationInt8WeightConfig",
    "Float8WeightOnlyConfig",
)


def quantize(model: nn.Module, config: str = CONFIGS[0]) -> None:
    quantization.quantize_(model, getattr(quantization, config)())


@pytest.mark.parametrize("config", CONFIGS)
def test_a_quantized_model(config: str) -> None:
    pair = Pair(Shape(layers=1))
    pair.both(lambda model: quantize(model, config))
    assert type(pair.fast.blocks[0].attn1.to_q.weight) is not nn.Parameter
    pair.apply()
    pair.check()


def test_a_model_quantized_afterwards() -> None:
    pair = Pair(Shape(layers=1))
    pair.apply()
    pair.check()
    pair.both(quantize)
    pair.check()
    assert pair.graphs == 2


@pytest.mark.slow
@pytest.mark.nightly  # the eager ones above run always
def test_a_quantized_model_through_inductor() -> None:
    pair = Pair(Shape(layers=1))
    pair.both(quantize)
    pair.apply(inner="inductor")
    pair.check(times=FUSED)
