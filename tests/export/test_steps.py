"""Plans with residual reuse as ONNX: a file per mode, a table of steps, and the documented loop."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from evdit_opt.errors import PlanError, PlanMismatchError
from evdit_opt.export import export_onnx_steps
from evdit_opt.export.steps import Step, steps_of
from evdit_opt.plan import ReuseRecord, TrendPoint
from tests.export.generation import (
    LEVELS,
    MODES,
    STEP,
    Planned,
    apart,
    in_this_package,
    reusing,
)
from tests.export.planned import planned_toy

onnx = pytest.importorskip("onnx", reason="needs the extra export")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra export")

CLOSE = 1e-4
"""Largest relative error of a step, in the norm of what the model says. What is found is 1e-6."""
PAGE = Path(__file__).parents[2] / "docs/export.md"
RECORD = ReuseRecord(
    sites=("a",),
    timestep="timestep",
    refresh_at=(900.0, 600.0),
    trend=(TrendPoint(level=800.0, damping=0.5),),
)


def documented_loop() -> dict[str, Any]:
    """What the page's code for onnxruntime defines, run in the current folder."""
    (code,) = re.findall(r"```python\n(import json\n.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    return names


def by_the_docs(given: Planned, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The predictions of a generation by the files in a folder."""
    monkeypatch.chdir(folder)
    feeds = {name: x.numpy() for name, x in given.call.items() if isinstance(x, Tensor)}
    latents, like = feeds.pop("hidden_states"), feeds.pop("timestep")
    predictions: list[Tensor] = []

    def update(latents: np.ndarray, prediction: np.ndarray, level: float) -> np.ndarray:
        assert level == LEVELS[len(predictions)]
        predictions.append(torch.from_numpy(prediction))
        return latents - np.float32(STEP) * prediction.reshape(latents.shape)

    generate: Callable[..., np.ndarray] = documented_loop()["generate"]
    generate(latents, feeds, lambda level: np.full_like(like, level), update)
    return predictions


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["wan", "cogvideox"])
def test_the_documented_loop_computes_the_same(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, plain = reusing(kind), reusing(kind, trend=False)
    table, *files = export_onnx_steps(
        given.model, given.call, tmp_path / "denoiser.onnx", given.plan
    )
    expected, unmoved = in_this_package(given), in_this_package(plain)
    assert apart(by_the_docs(given, tmp_path, monkeypatch), expected) < CLOSE
    assert apart(unmoved, expected) > 10 * CLOSE, "the trend makes no difference"

    content = json.loads(table.read_text())
    assert plain.plan.reuse is not None
    for step, other in zip(content["steps"], steps_of(plain.plan.reuse, LEVELS), strict=True):
        step.update(asdict(other))  # all that a trend changes
    table.write_text(json.dumps(content))
    assert apart(by_the_docs(plain, tmp_path, monkeypatch), unmoved) < CLOSE
    for file in files:
        onnx.checker.check_model(onnx.load(file))


@pytest.mark.nightly
def test_the_files_and_their_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = reusing("toy")
    table, *files = export_onnx_steps(
        given.model, given.call, tmp_path / "denoiser.onnx", given.plan
    )
    assert sorted(file.name for file in files) == [
        f"denoiser.{mode}.onnx" for mode in ("dense", "refresh", "reuse")
    ]
    assert sorted(tmp_path.iterdir()) == sorted([table, *files])
    content = json.loads(table.read_text())
    assert content["timestep"] == "timestep"
    assert content["precision"] == "model"
    told = [(step["level"], step["mode"], step["file"]) for step in content["steps"]]
    assert told == [
        (level, mode, f"denoiser.{mode}.onnx") for level, mode in zip(LEVELS, MODES, strict=True)
    ]
    assert apart(by_the_docs(given, tmp_path, monkeypatch), in_this_package(given)) < CLOSE

    residuals = {"residual.blocks.0.attn1", "residual.blocks.1.attn1"}
    inputs = {"hidden_states", "text", "timestep"}
    for file in files:
        session = onnxruntime.InferenceSession(str(file))
        found = {entry.name: entry.shape for entry in session.get_inputs()}
        outputs = {entry.name for entry in session.get_outputs()[1:]}
        assert found.keys() == inputs | (residuals if "reuse" in file.name else set())
        assert outputs == (residuals if "refresh" in file.name else set())
    weights = {w.name for w in onnx.load(tmp_path / "denoiser.reuse.onnx").graph.initializer}
    assert "blocks.0.attn1.q.bias" in weights
    assert "blocks.1.attn1.q.bias" not in weights, "what only returns its last output has no use"


def test_wrong_residuals_are_named(tmp_path: Path) -> None:
    given = reusing("toy")
    export_onnx_steps(
        given.model, given.call, tmp_path / "x.onnx", given.plan, levels=(900.0, 800.0)
    )
    assert not (tmp_path / "x.dense.onnx").exists()
    session = onnxruntime.InferenceSession(str(tmp_path / "x.reuse.onnx"))
    feeds = {name: x.numpy() for name, x in given.call.items()}
    shapes = {entry.name: entry.shape for entry in session.get_inputs()}
    right = {
        name: np.zeros(shape, np.float32) for name, shape in shapes.items() if name not in feeds
    }
    name = "residual.blocks.0.attn1"
    with pytest.raises(ValueError, match=r"residual\.blocks\.0\.attn1.*missing"):
        session.run(None, {**feeds, **{key: x for key, x in right.items() if key != name}})
    invalid = onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument
    with pytest.raises(invalid, match=r"residual\.blocks\.7\.attn1"):
        session.run(None, {**feeds, **right, "residual.blocks.7.attn1": right[name]})
    with pytest.raises(invalid, match=r"residual\.blocks\.0\.attn1"):
        session.run(None, {**feeds, **right, name: right[name][:, :, :5]})


def test_which_step_does_what() -> None:
    steps = steps_of(RECORD, (1000.0, 880.0, 700.0, 600.0, 400.0))
    assert steps == (
        Step(level=1000.0, mode="dense", ahead=0.0),
        Step(level=880.0, mode="refresh", ahead=0.0),
        Step(level=700.0, mode="reuse", ahead=0.0),  # one refresh has no direction yet
        Step(level=600.0, mode="refresh", ahead=0.0),
        Step(level=400.0, mode="reuse", ahead=pytest.approx(0.5 * 200 / 280)),
    )
    assert {step.ahead for step in steps_of(replace(RECORD, trend=()), LEVELS)} == {0.0}


@pytest.mark.parametrize("levels", [(), (500.0, 900.0), (900.0, 900.0)], ids=str)
def test_levels_of_no_run_are_refused(levels: tuple[float, ...]) -> None:
    with pytest.raises(PlanError, match="noise levels of a run, in descending order"):
        steps_of(RECORD, levels)


def test_plans_that_make_no_table_are_refused(tmp_path: Path) -> None:
    given = reusing("toy")
    assert given.plan.reuse is not None
    unknown = replace(given.plan, reuse=replace(given.plan.reuse, levels=()))
    with pytest.raises(PlanMismatchError, match="pass levels to"):
        export_onnx_steps(given.model, given.call, tmp_path / "x.onnx", unknown)
    static = planned_toy()
    with pytest.raises(PlanMismatchError, match="use export_onnx"):
        export_onnx_steps(static.model, static.call, tmp_path / "x.onnx", static.plan)
    assert not list(tmp_path.iterdir())
