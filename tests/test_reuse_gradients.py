"""Training under a plan that reuses: what was kept is a constant of the step that adds it."""

from typing import Any

import pytest
import torch

from evdit_opt.apply import apply_plan
from tests.models.timed_toy import (
    LEVELS,
    conditioning,
    reused_attention,
    reusing_plan,
    timed_toy,
)
from tests.models.toy_dit import toy_rules

SITES = tuple(toy_rules(2))


def gradients(model: torch.nn.Module, inputs: Any, level: float) -> list[torch.Tensor]:
    model.zero_grad()
    timestep = torch.full((1,), level)
    model(**inputs, timestep=timestep).square().mean().backward()
    return [value.grad.clone() for value in model.parameters()]


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_gradients_are_those_of_the_reference(inner: Any) -> None:
    """Of a refresh, of a step that reuses, and of one more, weights unchanged."""
    model, inputs, residuals = timed_toy(), conditioning(), {}
    right = []
    for mode, level in zip(("refresh", "reuse", "reuse"), LEVELS, strict=False):
        modes = dict.fromkeys(SITES, mode)
        with reused_attention(model, toy_rules(2), modes, residuals):
            right.append(gradients(model, inputs, level))
        residuals = {site: kept.detach() for site, kept in residuals.items()}
    largest = max(float(grad.abs().max()) for step in right for grad in step)

    apply_plan(model, reusing_plan(model, (900.0,)), inner=inner)
    for level, wanted in zip(LEVELS, right, strict=False):
        for one, other in zip(gradients(model, inputs, level), wanted, strict=True):
            # float32 sums of some 64 terms in another order, relative to the largest gradient
            assert float((one - other).abs().max()) < 64 * 2**-23 * largest
