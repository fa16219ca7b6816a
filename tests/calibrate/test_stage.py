"""Trying out a plan without compiling it: the numbers of the compiled one."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from evdit_opt.apply import apply_plan, restore
from evdit_opt.calibrate.stage import staged
from evdit_opt.grid import TokenLayout
from evdit_opt.masks import CACHED
from evdit_opt.models import Denoiser
from evdit_opt.plan import Plan, TrendPoint
from evdit_opt.reuse import with_reuse
from tests.models.timed_toy import CLOSE, LEVELS, call, conditioning, timed_toy
from tests.models.toy_dit import GRID, make_plan, toy_rules

RULES = toy_rules(2)
LAYOUTS = dict.fromkeys(RULES, TokenLayout(GRID))


def denoiser(model: torch.nn.Module) -> Denoiser:
    """A sampler of two guidance branches."""

    def run(item: int, seed: int, steps: int) -> torch.Tensor:
        branches = [conditioning(item), conditioning(seed)]
        outputs = [[call(model, one, level) for one in branches] for level in LEVELS[:steps]]
        return torch.stack([torch.stack(step) for step in outputs])

    return Denoiser(model, (1, 2), run, makes_video=True)


def plans(model: torch.nn.Module) -> dict[str, Plan]:
    static = make_plan(model, RULES)
    first = next(iter(RULES))
    often = with_reuse(static, (900.0, 650.0))  # then two steps, the second of them further ahead
    line = (TrendPoint(level=500.0, damping=0.7),)
    return {
        "static": static,
        "reuse": with_reuse(static, (800.0, 300.0)),
        "cached": with_reuse(static, (900.0, 300.0), rule=CACHED),
        "one site": with_reuse(static, (900.0, 300.0), sites=[first]),
        "carried on": replace(often, reuse=replace(often.reuse, trend=line)),
    }


@pytest.mark.parametrize("name", ["static", "reuse", "cached", "one site", "carried on"])
def test_a_rehearsal_equals_the_compiled_plan(name: str) -> None:
    model: Any = timed_toy()
    player, plan = denoiser(model), plans(model)[name]
    dense = [player.run(item, 7 + n, 5) for n, item in enumerate(player.items)]
    with staged(player, LAYOUTS) as stage:
        rehearsed = stage.rehearse(plan, player.items, seed=7, steps=5)
        silent = player.run(1, 7, 5)
    assert torch.equal(silent, dense[0])  # on stage, and nobody plays
    apply_plan(model, plan, inner="eager")
    played = [player.run(item, 7 + n, 5) for n, item in enumerate(player.items)]
    restore(model)
    for mine, right, plain in zip(rehearsed, played, dense, strict=True):
        assert (mine - right).abs().max() < CLOSE
        assert (mine - plain).abs().max() > 1e-2
