"""TinyWan's plan, whole: a clip whose every step runs in onnxruntime, two guidance branches."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import evdit_opt
from evdit_opt.demo.tinywan import TINYWAN_CALL, load_tinywan
from evdit_opt.export.command import export_named

pytest.importorskip("onnx", reason="needs the extra export")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra export")

PLAN = Path(__file__).parents[2] / "docs/demo/plan.evdit.json"
PROMPT = "a red circle moves right"
CLOSE = 1e-4
"""Relative error of the latents of a clip. What is found is 6e-7."""


def by_files(table: Path) -> Callable[..., tuple[Tensor]]:
    """A forward that runs the files, with residuals per branch, known by its text."""
    steps = json.loads(table.read_text())["steps"]
    sessions = {
        step["file"]: onnxruntime.InferenceSession(str(table.with_name(step["file"])))
        for step in steps
    }
    branches: dict[int, tuple[int, dict[str, Any], dict[str, Any]]] = {}

    def forward(
        hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **_other: Any
    ) -> tuple[Tensor]:
        branch = encoder_hidden_states.data_ptr()
        number, now, before = branches.get(branch, (0, {}, {}))
        step = steps[number]
        assert timestep.tolist() == [pytest.approx(step["level"])]
        feeds = {
            "hidden_states": hidden_states.numpy(),
            "timestep": timestep.numpy(),
            "encoder_hidden_states": encoder_hidden_states.numpy(),
        }
        if step["mode"] == "reuse":
            for name, own in now.items():
                feeds[name] = own + step["ahead"] * (own - before.get(name, own))
        session = sessions[step["file"]]
        names = [entry.name for entry in session.get_outputs()]
        output, *residuals = session.run(None, feeds)
        if residuals:
            now, before = dict(zip(names[1:], residuals, strict=True)), now
        branches[branch] = (number + 1, now, before)
        return (torch.from_numpy(output),)

    return forward


@pytest.mark.nightly
def test_a_clip_of_tinywan_is_that_of_the_optimized_pipeline(tmp_path: Path) -> None:
    written = export_named("tinywan", PLAN, tmp_path / "tinywan.onnx")
    pipe, plan = load_tinywan(), evdit_opt.Plan.load(PLAN)
    assert plan.reuse is not None
    assert plan.reuse.trend

    def clip() -> Tensor:
        generator = torch.Generator().manual_seed(10_000_000)
        steps = len(plan.reuse.levels)
        call = {**TINYWAN_CALL, "num_inference_steps": steps, "generator": generator}
        return torch.as_tensor(pipe(PROMPT, output_type="latent", **call).frames).double()

    def far(a: Tensor, b: Tensor) -> float:
        return ((a - b).norm() / b.norm()).item()

    with mock.patch.object(pipe.transformer, "forward", by_files(written.files[0])):
        exported = clip()
    dense = clip()
    evdit_opt.apply_plan(pipe, plan, inner="eager")
    expected = clip()
    assert far(exported, expected) < CLOSE
    assert far(dense, expected) > 100 * CLOSE, "the bound proves little"
