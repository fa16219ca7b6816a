"""evdit plan retarget: a grid, or a model that tells its own and is run."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from evdit_opt.calibrate import verify
from evdit_opt.calibrate.verify import verify_plan
from evdit_opt.cli import app
from evdit_opt.config import Config
from evdit_opt.errors import PlanMismatchError
from evdit_opt.grid import VideoGrid
from evdit_opt.inspection import target
from evdit_opt.models import config_hash
from evdit_opt.plan import Plan
from evdit_opt.plan_records import FinetuneRecord, call_record
from evdit_opt.retarget import retarget as move
from tests.models.toy_dit import ToyDiT, make_plan, toy, toy_inputs, toy_rules
from tests.plans import PLAN

LONGER = VideoGrid(6, 2, 3)
TOY = "tests.commands.test_retarget:longer_toy"


def longer_toy() -> tuple[ToyDiT, dict[str, Any]]:
    return toy(1), toy_inputs(LONGER)


def toy_plan() -> Plan:
    """Of the toy, at four frames."""
    return replace(make_plan(toy(1), toy_rules(1)), model_config_hash=config_hash(toy(1)))


def retarget(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["plan", "retarget", *map(str, arguments)])


def test_to_a_grid(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "old.json")
    arguments = (tmp_path / "old.json", "--grid", 12, 4, 5, "--out", tmp_path / "new.json")
    result = retarget(*arguments)
    assert result.exit_code == 0, result.output
    assert "assumed: errors, trials, quality and speed were measured at 8 x 4 x 5" in result.stdout
    moved = Plan.load(tmp_path / "new.json")
    assert moved.grid == VideoGrid(12, 4, 5)
    told = json.loads(retarget(*arguments, "--json").stdout)
    assert told["grid"] == {"frames": 12, "height": 4, "width": 5}
    assert told["calibrated_at"] == {"frames": 8, "height": 4, "width": 5}
    assert told["density"] == moved.density
    assert len(told["extrapolated"]) >= 2


def test_to_what_a_model_is_called_with_and_verified(tmp_path: Path) -> None:
    toy_plan().save(tmp_path / "old.json")
    result = retarget(
        tmp_path / "old.json", "--model", TOY, "--out", tmp_path / "new.json", "--json"
    )
    torch._dynamo.reset()
    assert result.exit_code == 0, result.output
    moved = Plan.load(tmp_path / "new.json")
    assert (moved.grid, moved.calibrated_at) == (LONGER, toy_plan().grid)
    error = moved.calibration.held_out_error
    assert error is not None
    assert 0.0 < error < 1.0
    assert json.loads(result.stdout)["held_out_error"] == error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.json", "old.json"]


def test_an_interrupted_verification_goes_on(tmp_path: Path, monkeypatch) -> None:
    model, call = longer_toy()
    moved = move(toy_plan(), LONGER).plan
    given: tuple[Any, ...] = (model, [call], Config(progress=False, inner="eager"), moved)

    def interrupted(*_: object, **__: object) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(verify, "run_with_plan", interrupted)
    with pytest.raises(KeyboardInterrupt):
        verify_plan(*given, keep_in=tmp_path / "kept")
    monkeypatch.undo()
    runs = []
    hook = model.register_forward_hook(lambda *_: runs.append(1))
    verify_plan(*given, keep_in=tmp_path / "kept")
    hook.remove()
    assert len(runs) == 1  # the dense run was kept


class Pipe:
    """A pipeline of six frames that tells how it was called."""

    def __init__(self) -> None:
        self.transformer, self.called = toy(1), {}

    def __call__(self, prompt: str, **call: Any) -> None:
        self.called = call
        self.transformer(**toy_inputs(LONGER))


def test_a_pipeline_is_called_as_in_calibration(tmp_path: Path, monkeypatch) -> None:
    call = {
        "guidance_scale": 3.5,
        "height": 64,
        "negative_prompt": "dull",
        "latents": torch.ones(2),
    }
    plan, pipe = toy_plan(), Pipe()
    record = replace(plan.calibration, call=call_record(call))
    replace(plan, calibration=record).save(tmp_path / "old.json")
    monkeypatch.setattr(target, "load_pipeline", lambda _: pipe)
    given = (tmp_path / "old.json", "--model", "some/pipe", "--out", tmp_path / "new.json")
    result = retarget(*given, "--height", 32)
    assert result.exit_code == 0, result.output
    assert "called with guidance_scale 3.5, height 64, negative_prompt 'dull'" in result.stdout
    told = (pipe.called[name] for name in ("guidance_scale", "height", "negative_prompt"))
    assert tuple(told) == (3.5, 32, "dull")
    assert retarget(*given, "--guidance", 1).exit_code == 0
    assert pipe.called["guidance_scale"] == 1.0


def test_a_plan_is_verified_at_its_own_grid() -> None:
    model, call = longer_toy()
    with pytest.raises(PlanMismatchError, match="retarget the plan"):
        verify_plan(model, [call], Config(), toy_plan())


def test_a_plan_for_other_weights_is_not_judged_on_these() -> None:
    record = FinetuneRecord(
        steps=4, full_steps=20, time_shift=1.0, lora_rank=0, lora_modules=(), weights_sha256="0"
    )
    with pytest.raises(PlanMismatchError, match="fine-tuned pipeline"):
        verify_plan(Pipe(), ["a cat"], Config(), replace(toy_plan(), finetune=record))


@pytest.mark.parametrize(
    "arguments",
    [[], ["--grid", 1, 2, 3, "--model", TOY], ["--grid", 1, 2, 3, "--frames", 9]],
    ids=["neither", "both", "frames of no model"],
)
def test_wrong_usage_is_exit_code_2(tmp_path: Path, arguments: list[object]) -> None:
    PLAN.save(tmp_path / "old.json")
    result = retarget(tmp_path / "old.json", "--out", tmp_path / "new.json", *arguments)
    assert result.exit_code == 2
    assert not (tmp_path / "new.json").exists()


def test_another_model_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "old.json")
    result = retarget(tmp_path / "old.json", "--model", TOY, "--out", tmp_path / "new.json")
    assert result.exit_code == 1
    assert result.stderr.startswith("PlanMismatchError: ")
    assert not (tmp_path / "new.json").exists()
