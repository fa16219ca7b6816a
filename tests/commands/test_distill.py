"""``evdit distill``: from a YAML file to a dry run, or one clear line."""

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from evdit_opt.cli import app
from evdit_opt.plan import Plan
from tests.plans import PLAN

distill_command = importlib.import_module("evdit_opt.commands.distill")

YAML = """
pipeline: tinywan
prompts: [a red circle moving left]
steps: 2
call: {num_frames: 9, height: 48, width: 48}
search: {density: 0.5, min_tokens: 0}
finetune:
  folder: run
  full_steps: 6
  consistency: {steps: 4, batch: 1}
"""


def test_a_dry_run_tells_cost_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(YAML)
    done = CliRunner().invoke(app, ["distill", str(tmp_path / "job.yaml"), "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "consistency: trains" in done.output
    assert "on 4 samples" in done.output
    assert "knowledge: not tried" in done.output
    assert "the teacher makes 64 latents: 384 steps" in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["job.yaml"]


def test_json_is_one_object_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(YAML)
    done = CliRunner().invoke(app, ["distill", str(tmp_path / "job.yaml"), "--dry-run", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (told["prompts"], told["steps"]) == (1, 2)
    assert told["not_tried"] == ["search", "knowledge"]
    (stage,) = told["stages"]
    assert (stage["stage"], stage["samples"]) == ("consistency", 4)
    assert stage["peak_gib"] is None
    assert stage["seconds"] > 0


def test_a_finished_run_is_told_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Trained:
        steps, config = 6, SimpleNamespace(stages=("plan",), folder=tmp_path)

        def stage(self, index: int) -> None:
            print("noise of a library", index)

        def finish(self) -> Plan:
            return PLAN

    monkeypatch.setattr(distill_command, "_load", lambda _path: Trained())
    done = CliRunner().invoke(app, ["distill", "job.yaml", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["out"] == str(tmp_path / "result")
    assert told["plan"]["fingerprint"] == PLAN.fingerprint()
    assert told["steps"] == 6


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(YAML.replace("density: 0.5", "sparsity: 0.5"))
    done = CliRunner().invoke(app, ["distill", str(tmp_path / "job.yaml")])
    assert done.exit_code == 1
    assert "sparsity" in done.output
    assert "Traceback" not in done.output
