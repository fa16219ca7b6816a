"""What calibration makes of settings that leave little to choose from, or that contradict."""

import itertools
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evdit_opt.calibrate import make
from evdit_opt.calibrate.clock import Clock
from evdit_opt.calibrate.draft import Drafter
from evdit_opt.calibrate.make import make_plan
from evdit_opt.calibrate.prices import Prices, RulePrice
from evdit_opt.calibrate.record import Recording
from evdit_opt.config import Config
from evdit_opt.errors import CalibrationError, QualityFloorError
from evdit_opt.grid import VideoGrid
from evdit_opt.quality import Measured, QualityReport
from tests.calibrate.killed import CONFIG, Pipe
from tests.models.toy_dit import toy, toy_inputs

PROMPTS = ("a cat", "a bird")
SETTINGS = replace(CONFIG, inner="eager", trial_prompts=1)


def calls(frames: int) -> list[dict[str, Any]]:
    return [toy_inputs(VideoGrid(frames, 2, 3)) for _ in range(2)]


def test_a_density_that_masks_alone_do_not_reach_is_kept(tmp_path: Path, caplog) -> None:
    """The sparsest mask of four frames keeps 0.625: a run with one refresh is what fits."""
    plan = make_plan(Pipe(tmp_path / "runs"), PROMPTS, replace(SETTINGS, density=0.2))
    assert plan.density == pytest.approx(1 / 6)
    assert "out of reach" not in caplog.text


def test_below_that_it_is_the_cheapest_plan_and_said(tmp_path: Path, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        plan = make_plan(Pipe(tmp_path / "runs"), PROMPTS, replace(SETTINGS, density=0.05))
    assert plan.density == pytest.approx(1 / 6)
    assert "density 0.05 is out of reach" in caplog.text


def test_two_frames_leave_no_mask_to_choose() -> None:
    plan = make_plan(toy(1), calls(2), SETTINGS)
    assert not plan.rules
    assert "no rule has a density <= 0.8 at 2 frames" in plan.sites[0].reason


def test_a_dense_answer_says_why_and_what_was_run(tmp_path: Path) -> None:
    settings = replace(SETTINGS, density=None, min_psnr=99.0)
    plan = make_plan(Pipe(tmp_path / "runs"), PROMPTS, settings)
    assert not plan.rules
    assert plan.sites[0].reason == "dense: no cheaper plan kept the quality floor"
    assert len(plan.calibration.explored) == 5
    plan = make_plan(toy(1), calls(4), replace(SETTINGS, density=1.0))
    assert plan.sites[0].reason == "dense: that is all that was asked for"


def test_where_no_rule_is_faster_it_stays_dense_and_that_is_said(monkeypatch, caplog) -> None:
    site = "blocks.0.attn1"

    def slow(_: Drafter, recording: Recording) -> Clock:
        rules = {own.rule: RulePrice(2.0, 2.0, 3.0) for own in recording.errors[site]}
        return Clock(10.0, 4.0, Prices({site: 1.0}, {site: rules}), 1, "a device")

    monkeypatch.setattr(make, "measure_clock", slow)
    with caplog.at_level(logging.WARNING):
        plan = make_plan(toy(1), calls(4), replace(SETTINGS, density=None, speedup=1.2))
    assert plan.sites[0].reason == "dense: no rule is cheaper here"
    assert "speedup 1.2 is out of reach" in caplog.text


def test_of_the_plans_that_miss_the_floor_the_best_is_attached(tmp_path, monkeypatch) -> None:
    """Held-out clips may like a denser plan less: here it is 20 dB worse."""
    real, worse = make.compare, itertools.count(step=20)

    def compare(*clips: Any) -> QualityReport:
        found = real(*clips)
        return replace(found, psnr=Measured.of([found.psnr.mean - next(worse)]))

    monkeypatch.setattr(make, "compare", compare)
    monkeypatch.setattr(make, "BACK_OFFS", 1)
    with pytest.raises(QualityFloorError, match="floor 99") as caught:
        make_plan(Pipe(tmp_path / "runs"), PROMPTS, replace(SETTINGS, min_psnr=99.0))
    plan: Any = caught.value.plan
    assert plan.density == 0.5
    assert [trial.density for trial in plan.calibration.explored] == pytest.approx([4 / 6])
    assert plan.calibration.trials


def test_a_floor_that_nothing_could_be_held_to_is_refused_at_once() -> None:
    with pytest.raises(CalibrationError, match="no quality floor for a module"):
        make_plan(toy(1), calls(4), replace(SETTINGS, min_psnr=20.0))
    with pytest.raises(CalibrationError, match=r"verify_prompts to be 1 or more"):
        Config(quality="high", verify_prompts=0)


def test_arguments_that_every_run_has_its_own_of_are_refused(tmp_path: Path) -> None:
    settings = replace(SETTINGS, pipe_kwargs={"num_inference_steps": 9})
    with pytest.raises(CalibrationError, match="without num_inference_steps, which every run"):
        make_plan(Pipe(tmp_path / "runs"), PROMPTS, settings)


def test_a_callable_may_take_any_argument(tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []

    class Open(Pipe):
        def __call__(self, prompt: str, **more: Any) -> Any:
            asked.append({name: more.pop(name) for name in ("flavour",)})
            return super().__call__(prompt, **more)

    settings = replace(SETTINGS, density=1.0, calib_steps=2, pipe_kwargs={"flavour": "sweet"})
    make_plan(Open(tmp_path / "runs"), PROMPTS, settings)
    assert asked[0] == {"flavour": "sweet"}
