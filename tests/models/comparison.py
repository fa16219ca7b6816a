"""A model with a plan applied next to the same model with dense masks, run eagerly."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from evdit_opt.apply import apply_plan
from evdit_opt.plan import Plan
from tests.models.case import Case, Shape
from tests.models.masked import masked_attention
from tests.models.toy_dit import make_plan

# The same arithmetic but for the order of sums. So the bound is a few times what another order of
# the keys does to the masked reference, and one rounding of the output (rms 0.2 eps of its size).
# Errors are root mean squares: in bfloat16 the largest is that of a single unlucky rounding.
REORDERED, ROUNDED = 3, 0.2
# How much further away the dense model must be for a test to mean anything.
APART = 4

Gradients = dict[str, torch.Tensor]


def plan_of(case: Case, model: nn.Module, shape: Shape) -> Plan:
    return make_plan(
        model,
        dict(case.rules(shape)),
        source=case.grid_source(shape),
        grid=shape.grid,
        layouts=case.layouts(shape),
        fullgraph=case.fullgraph,
    )


class Reference:
    """The masked model, and how far an equal computation may be from it."""

    def __init__(self, case: Case, model: nn.Module, call: dict[str, Any], shape: Shape) -> None:
        def run(order: str = "") -> torch.Tensor:
            rules, layouts = case.rules(shape), case.layouts(shape)
            with masked_attention(model, rules, layouts, order) as applied:
                out = model(**call)[0]
            assert all(applied.values()), applied
            return out

        self.dense = model(**call)[0]
        self.out = run()
        reordered = max(far(run(order), self.out) for order in ("backwards", "rotated"))
        rounded = ROUNDED * torch.finfo(self.out.dtype).eps * far(self.out, 0 * self.out)
        self.bound = REORDERED * reordered + rounded
        self.gap = far(self.dense, self.out)

    def check(self, actual: torch.Tensor, times: float = 1, more: float = 0) -> None:
        error, bound = far(actual, self.out), times * self.bound + more
        assert error <= bound, f"{error:.1e} from the masked model, bound {bound:.1e}"
        assert self.gap > APART * bound, f"{bound:.1e} proves little: dense is {self.gap:.1e} away"


def compare_gradients(case: Case, shape: Shape, inner: str = "eager") -> dict[str, float]:
    """Largest difference of a parameter's gradient: of the model with a plan, and of the dense one.

    Returns:
        error: from the masked model. bound: what that may be. gap: from the dense model to it.
    """
    model, call = case.model(shape), case.inputs(shape)

    def gradients(run: Callable[[], torch.Tensor]) -> Gradients:
        model.zero_grad()
        run().square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    def masked(order: str = "") -> torch.Tensor:
        with masked_attention(model, case.rules(shape), case.layouts(shape), order):
            return model(**call)[0]

    dense = gradients(lambda: model(**call)[0])
    expected = gradients(lambda: masked())
    again = gradients(lambda: masked("backwards"))
    apply_plan(model, plan_of(case, model, shape), inner=inner)
    actual = gradients(lambda: model(**call)[0])
    assert actual.keys() == expected.keys()
    rounded = ROUNDED * torch.finfo(torch.float32).eps * apart(expected)
    bound = REORDERED * apart(again, expected) + rounded
    return {"error": apart(actual, expected), "bound": bound, "gap": apart(dense, expected)}


def apart(some: Gradients, others: Gradients | None = None) -> float:
    """The largest root mean square difference of a parameter's gradients; without others, size."""
    return max(far(grad, others[name] if others else 0 * grad) for name, grad in some.items())


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.double() - b.double()).square().mean().sqrt().item()
