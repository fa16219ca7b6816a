"""evdit export onnx: from a name and a plan to a file, or one line that says what is wrong."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from evdit_opt.cli import app
from evdit_opt.export.command import call_of
from evdit_opt.models import Denoiser
from tests.export.generation import reusing
from tests.export.planned import planned_toy

TOY = "tests.export.test_command:toy_and_call"


def toy_and_call() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    given = planned_toy()
    return given.model, given.call


def evdit_export(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["export", "onnx", *map(str, arguments)])


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    planned_toy().plan.save(tmp_path / "toy.evdit.json")
    return tmp_path / "toy.evdit.json"


def test_a_denoiser_is_written_and_described(plan: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="needs the extra export")
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra export")
    result = evdit_export(TOY, "--plan", plan, "--out", tmp_path / "toy.onnx")
    assert result.exit_code == 0, result.output
    assert "ToyDiT, 2 of 2 sites sparse" in " ".join(result.stdout.split())
    given = planned_toy()
    session = onnxruntime.InferenceSession(str(tmp_path / "toy.onnx"))
    (out,) = session.run(None, {name: value.numpy() for name, value in given.call.items()})
    torch.testing.assert_close(torch.from_numpy(out), given.optimized(), rtol=1e-4, atol=1e-5)


def reusing_toy_and_call() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    given = reusing("toy")
    return given.model, given.call


def test_a_plan_with_residual_reuse_becomes_a_file_per_mode(tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="needs the extra export")
    reusing("toy").plan.save(tmp_path / "toy.json")
    name, out = "tests.export.test_command:reusing_toy_and_call", tmp_path / "toy.onnx"
    result = evdit_export(name, "--plan", tmp_path / "toy.json", "--out", out, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    names = ("steps.json", "dense.onnx", "refresh.onnx", "reuse.onnx")
    assert told["files"] == [str(tmp_path / f"toy.{name}") for name in names]
    assert told["bytes"] == sum(Path(file).stat().st_size for file in told["files"])
    assert told["out"] == told["files"][0]
    assert not out.exists()


def refused(result: Result) -> str:
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    return " ".join(result.stderr.split())


def test_a_plan_without_rules_is_refused(tmp_path: Path) -> None:
    given = planned_toy().plan
    sites = tuple(replace(site, rule=None, density=1.0) for site in given.sites)
    replace(given, sites=sites).save(tmp_path / "dense.json")
    result = evdit_export(TOY, "--plan", tmp_path / "dense.json", "--out", tmp_path / "toy.onnx")
    assert "PlanMismatchError: expected a plan with a rule" in refused(result)
    assert not (tmp_path / "toy.onnx").exists()


def test_no_plan_file_is_refused(tmp_path: Path) -> None:
    result = evdit_export(TOY, "--plan", tmp_path / "no.json", "--out", tmp_path / "toy.onnx")
    assert "PlanNotFoundError" in refused(result)


def test_nowhere_to_write_is_said_before_anything_is_loaded(plan: Path, tmp_path: Path) -> None:
    result = evdit_export("no such", "--plan", plan, "--out", tmp_path / "missing" / "toy.onnx")
    assert "expected a file to write in a folder there is" in refused(result)


def test_a_folder_without_weights_is_refused(plan: Path, tmp_path: Path) -> None:
    folder = tmp_path / "transformer"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    result = evdit_export(folder, "--plan", plan, "--out", tmp_path / "toy.onnx")
    assert "expected weights beside" in refused(result)


def test_positional_arguments_of_a_pipeline_s_call_get_their_names() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor, time: float, flag: bool = False) -> torch.Tensor:
            return x * time if flag else x

    model, x = Model(), torch.ones(2)
    denoiser = Denoiser(model, ("a prompt",), lambda *_: model(x, 0.5, flag=True), makes_video=True)
    assert call_of(denoiser) == {"x": x, "time": 0.5, "flag": True}
