"""evdit calibrate: options reach make_plan, and whatever happens no broken plan is left."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import evdit_opt.calibrate.make as make
from evdit_opt.cli import app
from evdit_opt.commands.calibrate import read_prompts
from evdit_opt.config import Config
from evdit_opt.errors import CalibrationError, QualityFloorError
from evdit_opt.inspection import target
from evdit_opt.plan import Plan
from tests.models.toy_dit import ToyDiT, toy, toy_inputs
from tests.plans import PLAN

TOY = "tests.commands.test_calibrate:toy_and_calls"


def toy_and_calls() -> tuple[ToyDiT, list[dict[str, Any]]]:
    return toy(1), [toy_inputs(), toy_inputs()]


class Pipe:
    """Something to call, with a transformer."""

    def __init__(self) -> None:
        self.transformer = toy(1)

    def __call__(self, prompt: str) -> None: ...


def calibrate(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["calibrate", *map(str, arguments)])


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, list[str], Config]]:
    """What make_plan was asked for."""
    asked: list[tuple[Any, list[str], Config]] = []

    def make_plan(model: Any, items: Any, config: Config, keep_in: Path) -> Plan:
        print("a library that talks")
        asked.append((model, list(items), config))
        return PLAN

    monkeypatch.setattr(make, "make_plan", make_plan)
    monkeypatch.setattr(target, "load_pipeline", lambda _: Pipe())
    return asked


def test_every_option_reaches_make_plan(made: list[Any], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("# mine\na cat\n\n  a dog  \n")
    options = (
        "--prompts", tmp_path / "prompts.txt", "--prompt", "a bird", "--density", 0.3, "--steps", 7,
        "--frames", 9, "--height", 64, "--width", 32, "--guidance", 3.5, "--no-reuse",
        "--reuse-memory", 1.5, "--held-out", 1, "--min-psnr", 20, "--min-ssim", 0.5,
        "--max-flicker", 2, "--seed", 5, "--min-tokens", 9,
    )  # fmt: skip
    result = calibrate("some/pipe", "--out", tmp_path / "p.json", *options)
    assert result.exit_code == 0, result.output
    [(model, items, config)] = made
    assert isinstance(model, Pipe)
    assert items == ["a cat", "a dog", "a bird"]
    assert config == Config(
        density=0.3, calib_steps=7, reuse=False, reuse_memory=1.5, verify_prompts=1, min_psnr=20.0,
        min_ssim=0.5, max_flicker_ratio=2.0, seed=5, min_tokens=9,
        pipe_kwargs={"num_frames": 9, "height": 64, "width": 32, "guidance_scale": 3.5},
    )  # fmt: skip


def test_defaults_are_those_of_config(made: list[Any], tmp_path: Path) -> None:
    assert calibrate("some/pipe", "--out", tmp_path / "p.json", "--prompt", "a").exit_code == 0
    assert made[0][2] == Config()
    assert Plan.load(tmp_path / "p.json") == PLAN
    options = ("--out", tmp_path / "p.json", "--prompt", "a", "--threshold", 0.2)
    assert calibrate("some/pipe", *options).exit_code == 0
    assert made[1][2] == Config(threshold=0.2)


def test_json_is_all_there_is_on_stdout(made: list[Any], tmp_path: Path) -> None:
    result = calibrate("some/pipe", "--out", tmp_path / "p.json", "--prompt", "a", "--json")
    told = json.loads(result.stdout)
    assert told["out"] == str(tmp_path / "p.json")
    assert told["psnr_db"] == 31.5
    assert "a library that talks" in result.stderr


def test_a_toy_is_calibrated(tmp_path: Path) -> None:
    options = ("--out", tmp_path / "p.json", "--density", 0.7, "--held-out", 1, "--min-tokens", 0)
    result = calibrate(TOY, *options)
    torch._dynamo.reset()
    assert result.exit_code == 0, result.output
    plan = Plan.load(tmp_path / "p.json")
    assert [site.name for site in plan.sites] == ["blocks.0.attn1"]
    assert plan.calibration.prompt_count == 2
    assert plan.calibration.held_out_error is not None
    assert f"written to {tmp_path / 'p.json'}" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "{}/none/p.json", "--prompt", "a"], "expected a file to write in a folder"),
        (["--out", "{}/p.json"], "at least one calibration prompt"),
        (["--out", "{}/p.json", "--prompts", "{}/none.txt"], "to be a text file in UTF-8"),
    ],
    ids=["nowhere to write", "no prompts", "no such file"],
)
def test_what_cannot_work_is_said(tmp_path, monkeypatch, arguments, message) -> None:
    monkeypatch.setattr(target, "load_pipeline", lambda _: Pipe())
    result = calibrate("some/pipe", *(text.format(tmp_path) for text in arguments))
    assert result.exit_code == 1
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_random_inputs_are_nothing_to_calibrate_on(tmp_path: Path) -> None:
    folder = Path(__file__).parents[2] / "evdit_opt/demo/tinywan/transformer"
    options = ("--frames", 3, "--height", 8, "--width", 8)
    result = calibrate(folder, "--out", tmp_path / "p.json", *options)
    assert result.exit_code == 1
    assert "expected what a model really gets" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["tinywan"],
        ["tinywan", "--out", "p", "--density", "0.3", "--threshold", "0.1"],
        ["tinywan", "--out", "p", "--threshold", "0.1", "--min-psnr", "30"],
    ],
    ids=["no out", "density and threshold", "threshold and a floor"],
)
def test_wrong_usage_is_exit_code_2(arguments: list[str]) -> None:
    assert calibrate(*arguments).exit_code == 2


def test_prompts_that_nothing_would_look_at_are_refused(tmp_path: Path) -> None:
    result = calibrate(TOY, "--out", tmp_path / "p.json", "--prompt", "a cat")
    assert result.exit_code == 1
    assert "comes with calls of its own" in result.stderr


def test_a_disk_that_takes_no_plan_is_one_line(made, tmp_path, monkeypatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    result = calibrate("some/pipe", "--out", tmp_path / "p.json", "--prompt", "a")
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(os, "access", lambda *_: False)
    result = calibrate("some/pipe", "--out", tmp_path / "p.json", "--prompt", "a")
    assert "expected a folder that may be written to" in result.stderr
    assert len(made) == 1  # said before anything was done


def test_a_predicted_speedup_is_told(made, tmp_path) -> None:
    result = calibrate("some/pipe", "--out", tmp_path / "p.json", "--prompt", "a", "--json")
    told = json.loads(result.stdout)
    assert (told["speedup"], told["predicted_speedup"]) == pytest.approx((12 / 5, 12 / 4.8))


def test_prompts_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("# nothing\n\n")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for name in ("empty", "bytes", "."):
        with pytest.raises(CalibrationError, match="expected"):
            read_prompts(tmp_path / name)


def test_the_best_plan_below_the_floor_is_kept_beside(made, tmp_path, monkeypatch) -> None:
    def miss(*_: object, **__: object) -> Plan:
        raise QualityFloorError("expected more", PLAN)

    monkeypatch.setattr(make, "make_plan", miss)
    result = calibrate("some/pipe", "--out", tmp_path / "p.json", "--prompt", "a")
    assert result.exit_code == 3
    assert not (tmp_path / "p.json").exists()
    assert Plan.load(tmp_path / "rejected-p.json") == PLAN
    assert "rejected-p.json" in result.stderr


def test_an_interrupted_calibration_leaves_the_old_plan(made, tmp_path, monkeypatch) -> None:
    PLAN.save(tmp_path / "p.json")
    before = (tmp_path / "p.json").read_bytes()
    for place in ((make, "make_plan"), (os, "fsync")):  # while it runs, and while it is written

        def interrupt(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(*place, interrupt)
        assert (
            calibrate("some/pipe", "--out", tmp_path / "p.json", "--prompt", "a").exit_code == 130
        )
        assert (tmp_path / "p.json").read_bytes() == before
        assert [path.name for path in tmp_path.iterdir()] == ["p.json"]
        monkeypatch.undo()
        monkeypatch.setattr(make, "make_plan", lambda *_, **__: PLAN)
        monkeypatch.setattr(target, "load_pipeline", lambda _: Pipe())


def test_a_killed_calibration_leaves_the_old_plan(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "p.json")
    before = (tmp_path / "p.json").read_bytes()
    code = f"""
import os, signal
from tests.commands.test_calibrate import PLAN, Pipe, app, make, target
make.make_plan = lambda *_, **__: PLAN
target.load_pipeline = lambda _: Pipe()
os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # all is written, nothing is in place
app(["calibrate", "some/pipe", "--out", {str(tmp_path / "p.json")!r}, "--prompt", "a"])
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / "p.json").read_bytes() == before


def test_what_is_unfinished_is_not_lost_by_forgetting_resume(made, tmp_path) -> None:
    (tmp_path / "p.json.unfinished").mkdir()
    arguments = ("some/pipe", "--out", tmp_path / "p.json", "--prompt", "a")
    result = calibrate(*arguments)
    assert result.exit_code == 1
    assert "go on with it by --resume" in result.stderr
    assert made == []
    assert calibrate(*arguments, "--resume").exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]
