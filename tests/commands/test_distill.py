"""``evdit distill``: from a YAML file to a dry run, or one clear line."""

from pathlib import Path

from typer.testing import CliRunner

from evdit_opt.cli import app

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


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(YAML.replace("density: 0.5", "sparsity: 0.5"))
    done = CliRunner().invoke(app, ["distill", str(tmp_path / "job.yaml")])
    assert done.exit_code == 1
    assert "sparsity" in done.output
    assert "Traceback" not in done.output
