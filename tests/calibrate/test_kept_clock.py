"""A calibration that is taken up goes by the times it was begun with."""

from pathlib import Path
from typing import Any

from evdit_opt.calibrate.clock import Clock
from evdit_opt.calibrate.kept import Kept
from evdit_opt.calibrate.kept_clock import kept_clock
from evdit_opt.calibrate.prices import Prices, RulePrice
from evdit_opt.config import Config
from evdit_opt.masks import CACHED, Rule

PURPOSE = {"model": "a"}
RULES = {
    CACHED: RulePrice(0.1, 0.0, 1.0),
    Rule(2, weighting="fitted", strength=0.25): RulePrice(1 / 3, 0.3, 1.3),
}
CLOCK = Clock(12.3, 4.5, Prices({"a": 1.1, "b": 0.9}, {"a": RULES, "b": {}}), 2, "a device")


def never() -> Clock:
    raise AssertionError("was timed again")


def test_times_are_taken_once_in_a_calibration(tmp_path: Path) -> None:
    kept: Any = (Kept(tmp_path / "new", PURPOSE), Config(speedup=1.5), "a device")
    assert kept_clock(*kept, lambda: CLOCK) == CLOCK
    again: Any = (Kept(tmp_path / "new", PURPOSE), Config(speedup=2.0), "a device")
    assert kept_clock(*again, never) == CLOCK


def test_what_times_depend_on_is_timed_anew(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "new", PURPOSE)
    asked = []
    settings = (
        (Config(), "a device"), (Config(inner="eager"), "a device"),
        (Config(min_tokens=5), "a device"), (Config(), "another"),
    )  # fmt: skip
    for config, device in settings:
        kept_clock(kept, config, device, lambda: asked.append(0) or CLOCK)
    assert len(asked) == len(settings)
    kept_clock(Kept(), Config(), "a device", lambda: asked.append(0) or CLOCK)
    assert len(asked) == len(settings) + 1
