"""Small models with a plan that `api.apply_plan` accepts, for exporting."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from evdit_opt.apply import apply_plan, restore
from evdit_opt.models import config_hash
from evdit_opt.plan import Plan
from tests.models.case import Shape
from tests.models.comparison import plan_of
from tests.models.small_models import BY_NAME
from tests.models.toy_dit import make_plan, toy, toy_inputs, toy_rules


@dataclass(frozen=True)
class Planned:
    """A model, one call of it, and a plan with another rule at every site.

    Attributes:
        model: random weights.
        call: forward kwargs.
        plan: for this model.
    """

    model: nn.Module
    call: dict[str, Any]
    plan: Plan

    @torch.no_grad()
    def optimized(self) -> torch.Tensor:
        """What the optimized model computes eagerly."""
        apply_plan(self.model, self.plan, inner="eager")
        try:
            return first(self.model(**self.call))
        finally:
            restore(self.model)

    @torch.no_grad()
    def dense(self) -> torch.Tensor:
        """What the model computes without the plan."""
        return first(self.model(**self.call))


def first(output: Any) -> torch.Tensor:
    """The tensor in what a model returns."""
    return output[0] if isinstance(output, tuple) else output


def planned(name: str, layers: int = 2) -> Planned:
    """A small diffusers model."""
    case, shape = BY_NAME[name], Shape(layers=layers)
    model = case.model(shape)
    plan = replace(plan_of(case, model, shape), model_config_hash=config_hash(model))
    return Planned(model, case.inputs(shape), plan)


def planned_toy(**options: Any) -> Planned:
    """The toy transformer; options as of ``make_plan``."""
    model = toy()
    plan = make_plan(model, dict(toy_rules()), **options)
    return Planned(model, toy_inputs(), replace(plan, model_config_hash=config_hash(model)))
