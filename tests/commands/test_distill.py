"""``evdit distill``: from a YAML file to a dry run, or one clear line."""

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
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
search: {density: 0.5, min_tokens: 0, references: [1, 2]}
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


def test_a_dry_run_looks_at_the_videos(tmp_path: Path) -> None:
    clips = tmp_path / "clips"
    clips.mkdir()
    for name in ("one", "two", "untold"):
        pictures = np.random.default_rng(0).integers(0, 256, (12, 60, 50, 3), dtype=np.uint8)
        iio.imwrite(clips / f"{name}.mp4", pictures, fps=12, macro_block_size=2)
    for name in ("one", "two"):
        (clips / f"{name}.txt").write_text("a red circle moving left")
    (tmp_path / "job.yaml").write_text(YAML + "  data: {videos: clips}\n")
    done = CliRunner().invoke(app, ["distill", str(tmp_path / "job.yaml"), "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "2 videos to encode: 0.000 GiB on disk" in done.output
    assert "1 left out\nleft out: untold.mp4: expected a caption" in done.output
    assert "the teacher makes" not in done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clips", "job.yaml"]
    for path in clips.glob("*.mp4"):
        path.write_bytes(b"")
    done = CliRunner().invoke(app, ["distill", str(tmp_path / "job.yaml"), "--dry-run"])
    assert done.exit_code == 1
    assert "left out all" in done.output


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
