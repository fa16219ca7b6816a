"""A small Wan twice: one is optimized, the other, never compiled, says what it must compute."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from evdit_opt.apply import apply_plan, report
from evdit_opt.masks import Rule
from evdit_opt.plan import Plan
from tests.models.case import Shape
from tests.models.masked import masked_attention
from tests.models.toy_dit import make_plan
from tests.models.wan_models import WAN_CASES

WAN = WAN_CASES[0]

# The same arithmetic but for the order of sums: a few times what other orders of the keys do to the
# masked model, and one rounding of the output. Errors are root mean squares.
REORDERED, ROUNDED = 3, 0.2
# Inductor also fuses and reorders the rest of the model.
FUSED = 4
# How much further away the dense model must be for a test to mean anything.
APART = 4


class Pair:
    """Two equal models, and the plan of one.

    Args:
        shape: sizes of the models, and of the calls if those have none; a usual one if None.
        rules: rule per site; a different one at every site if None.
    """

    def __init__(self, shape: Shape | None = None, rules: dict[str, Rule] | None = None) -> None:
        shape = shape or Shape()
        self.shape, self.rules = shape, rules or WAN.rules(shape)
        self.fast, self.plain = WAN.model(shape), WAN.model(shape)

    @property
    def plan(self) -> Plan:
        """A plan with the rules."""
        return make_plan(
            self.fast, dict(self.rules), source=WAN.grid_source(), grid=self.shape.grid
        )

    @property
    def graphs(self) -> int:
        """Graphs compiled for the optimized model so far."""
        return report(self.fast).graphs

    def apply(self, **options: Any) -> None:
        """Optimize one of the two."""
        apply_plan(self.fast, self.plan, **{"inner": "eager", **options})

    def both(self, change: Callable[[nn.Module], Any]) -> None:
        """Do the same to both."""
        change(self.fast)
        change(self.plain)

    @torch.no_grad()
    def check(
        self, shape: Shape | None = None, dtype: torch.dtype | None = None, times: float = 1
    ) -> Tensor:
        """Run both; assert that every planned site is sparse and the outputs are equal.

        Args:
            shape: sizes of the call.
            dtype: dtype of its floating point arguments.
            times: how much larger the bound is.

        Returns:
            The output of the optimized model.
        """
        shape = shape or self.shape
        call = {name: cast(value, dtype) for name, value in WAN.inputs(shape).items()}

        def masked(order: str = "") -> Tensor:
            with masked_attention(self.plain, self.rules, WAN.layouts(shape), order) as applied:
                out: Tensor = self.plain(**call)[0]
            assert all(applied.values()), applied
            return out

        dense, right = self.plain(**call)[0], masked()
        reordered = max(far(masked(order), right) for order in ("backwards", "rotated"))
        rounded = ROUNDED * torch.finfo(right.dtype).eps * far(right)
        bound = times * (REORDERED * reordered + rounded)
        out: Tensor = self.fast(**call)[0]
        assert out.dtype == right.dtype
        assert far(out, right) <= bound, f"{far(out, right):.1e} off, bound {bound:.1e}"
        assert far(dense, right) > APART * bound, "a dense model would pass as well"
        assert report(self.fast).rewritten == tuple(self.rules)
        return out


def far(a: Tensor, b: Tensor | float = 0.0) -> float:
    """Root mean square of the difference."""
    b = b.double() if isinstance(b, Tensor) else b
    return (a.double() - b).square().mean().sqrt().item()


def cast(value: Any, dtype: torch.dtype | None) -> Any:
    """A tensor of floating point numbers in another dtype; anything else as it is."""
    if dtype is not None and isinstance(value, Tensor) and value.is_floating_point():
        return value.to(dtype)
    return value
