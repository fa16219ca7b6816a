"""A generation of several steps, with residual reuse, by whatever computes one step."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from evdit_opt.apply import apply_plan, restore
from evdit_opt.masks import CACHED
from evdit_opt.models import config_hash
from evdit_opt.plan import TrendPoint
from evdit_opt.reuse import with_reuse
from tests.export.planned import Planned, first, planned
from tests.models.timed_toy import conditioning, timed_toy
from tests.models.toy_dit import make_plan, toy_rules

LEVELS = (950.0, 900.0, 800.0, 650.0, 500.0, 400.0, 250.0, 100.0)
MODES = ("dense", "refresh", "reuse", "refresh", "reuse", "reuse", "refresh", "reuse")
REFRESH_AT = (900.0, 650.0, 250.0)
TREND = (TrendPoint(level=700.0, damping=0.4), TrendPoint(level=300.0, damping=0.8))
STEP = 0.1
"""Of Euler's method."""

Predict = Callable[[Tensor, float], Tensor]
"""``predict(latents, level)``: what the model says in one step."""


def reusing(name: str, trend: bool = True) -> Planned:
    """A small model of three layers: one reuses by its rule, one by ``CACHED``, one is static."""
    if name == "toy":
        model = timed_toy(layers=3)
        plan = make_plan(model, dict(toy_rules(3)))
        call = {**conditioning(), "timestep": torch.full((1,), 300.0)}
        given = Planned(model, call, replace(plan, model_config_hash=config_hash(model)))
    else:
        given = planned(name, layers=3)
    names = [site.name for site in given.plan.sites]
    plan = with_reuse(given.plan, REFRESH_AT, sites=names[:2], levels=LEVELS)
    sites = [replace(s, rule=CACHED, density=0.0) if s.name == names[1] else s for s in plan.sites]
    assert plan.reuse is not None
    record = replace(plan.reuse, trend=TREND if trend else ())
    return replace(given, plan=replace(plan, sites=tuple(sites), reuse=record))


def at(given: Planned, latents: Tensor, level: float) -> dict[str, Any]:
    """The arguments of one step; the conditioning stays the same tensors."""
    timestep = torch.full_like(given.call["timestep"], level)
    return {**given.call, "hidden_states": latents, "timestep": timestep}


@torch.no_grad()
def generate(given: Planned, predict: Predict) -> list[Tensor]:
    """The predictions of all steps, each from what the ones before made of the latents."""
    latents, predictions = given.call["hidden_states"], []
    for level in LEVELS:
        predictions.append(predict(latents, level).clone())
        latents = latents - STEP * predictions[-1].reshape(latents.shape)
    return predictions


def in_this_package(given: Planned) -> list[Tensor]:
    """The generation of the optimized model, eagerly."""
    apply_plan(given.model, given.plan, inner="eager")
    try:
        return generate(given, lambda x, level: first(given.model(**at(given, x, level))))
    finally:
        restore(given.model)


def apart(some: list[Tensor], others: list[Tensor]) -> float:
    """The largest relative error of a step."""
    return max(
        ((a.double() - b.double()).norm() / b.double().norm()).item()
        for a, b in zip(some, others, strict=True)
    )
