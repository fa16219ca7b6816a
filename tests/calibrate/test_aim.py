"""What a plan may cost: each setting of the config leads to its budget."""

import math
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from evdit_opt.calibrate.aim import find_budget
from evdit_opt.calibrate.clock import Clock
from evdit_opt.calibrate.kept import Kept
from evdit_opt.calibrate.prices import Prices
from evdit_opt.config import QUALITIES, Config
from evdit_opt.errors import CalibrationError

CLIP = torch.full((3, 16, 16, 3), 0.5)


@dataclass
class Planned:
    """A plan of which only this is asked."""

    density: float

    def fingerprint(self) -> str:
        return str(self.density)


@dataclass
class Pretended:
    """Planner and stage of a model whose clips err by ``error / budget``."""

    config: Config
    error: float = 0.01
    kept: Kept = field(default_factory=Kept)

    @property
    def recording(self) -> Any:
        return SimpleNamespace(results=[CLIP, CLIP])

    def budget_within_threshold(self) -> float:
        return 0.77

    def likeliest(self, budget: float) -> Any:
        return SimpleNamespace(plan=Planned(budget)) if budget > 0.06 else None

    def rehearse(self, plan: Any, items: list[str], *_: Any) -> list[torch.Tensor]:
        return [CLIP + self.error / plan.density for _ in items]


def budget(pretended: Pretended, clock: Clock | None = None) -> float:
    whoever: Any = pretended
    return find_budget(whoever, whoever, clock, ["a prompt"])[0]


def test_what_was_run_on_the_way_is_told() -> None:
    whoever: Any = Pretended(Config(min_psnr=30.0))
    _, explored = find_budget(whoever, whoever, None, ["a prompt"])
    assert len(explored) == 5
    for record in explored:
        assert record.psnr == pytest.approx(-20 * math.log10(0.01 / record.density), abs=1e-3)
        assert record.output == pytest.approx(0.01 / record.density / 0.5, rel=1e-4)
    whoever = Pretended(Config(density=0.3))
    assert find_budget(whoever, whoever, None, ["a prompt"])[1] == ()


def test_a_density_is_the_budget() -> None:
    assert budget(Pretended(Config(density=0.3, min_psnr=50.0))) == 0.3


def test_a_speedup_goes_by_the_clock() -> None:
    clock = Clock(10.0, 4.0, Prices(dense={"a": 1.0}, rules={}), 1, "a device")
    assert budget(Pretended(Config(speedup=2.0)), clock) == pytest.approx(1 / 6)


def test_nothing_given_means_the_threshold() -> None:
    assert budget(Pretended(Config())) == 0.77


@pytest.mark.parametrize("psnr", [24.0, 30.0, 36.0])
def test_the_least_budget_that_keeps_a_floor_is_found_within_a_tenth(psnr: float) -> None:
    exact = 0.01 * 10 ** (psnr / 20)  # the error is error / budget everywhere
    found = budget(Pretended(Config(min_psnr=psnr)))
    assert exact <= found <= 1.1 * exact


def test_out_of_reach_means_dense() -> None:
    assert budget(Pretended(Config(min_psnr=60.0), error=0.1)) == 1.0


def test_qualities_are_floors_and_what_is_given_goes_first() -> None:
    assert Config(quality="high").floors == QUALITIES["high"]
    own = Config(quality="high", min_psnr=20.0).floors
    assert own == QUALITIES["high"]._replace(min_psnr=20.0)
    order = [budget(Pretended(Config(quality=name))) for name in ("fast", "balanced", "high")]
    assert order == sorted(order)


def test_density_and_speedup_exclude_each_other() -> None:
    with pytest.raises(CalibrationError, match="speedup to be None where density is given"):
        replace(Config(density=0.3), speedup=2.0)
