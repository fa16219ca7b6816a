"""Settings of a fine-tuning, and the YAML they come from."""

from pathlib import Path

import pytest

from evdit_opt.distill import loop
from evdit_opt.distill.config import FinetuneConfig, read_config
from evdit_opt.distill.encode import VideoData
from evdit_opt.distill.knowledge import KnowledgeWeights
from evdit_opt.distill.loop import TrainingConfig
from evdit_opt.distill.samples import SampleConfig
from evdit_opt.errors import DistillationError

YAML = """
pipeline: tinywan
prompts: prompts.txt
steps: 6
call: {num_frames: 17}
search: {density: 0.4}
finetune:
  folder: run
  guidance: 2.0
  lora_rank: 8
  lora_modules: [to_q, to_k]
  weights: {attention: 0.5}
  consistency: {steps: 700, batch: 8, betas: [0.9, 0.95]}
"""


def test_yaml_says_everything(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(YAML)
    (tmp_path / "prompts.txt").write_text("# two\na red circle\n\na blue square\n")
    job = read_config(tmp_path / "job.yaml")
    assert job.prompts == ("a red circle", "a blue square")
    assert (job.pipeline, job.steps, job.call) == ("tinywan", 6, {"num_frames": 17})
    assert job.finetune == FinetuneConfig(
        folder=tmp_path / "run",
        guidance=2.0,
        lora_rank=8,
        lora_modules=("to_q", "to_k"),
        weights=KnowledgeWeights(attention=0.5),
        consistency=TrainingConfig(steps=700, batch=8, betas=(0.9, 0.95)),
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps: 6", "steps: 0", "steps above 0"),
        ("guidance: 2.0", "gidance: 2.0", "gidance"),
        ("batch: 8", "batch: 0", "batch to be an integer above 0"),
        ("{steps: 700, ", "{", "complete"),
        ("prompts: prompts.txt", "prompts: 7", "prompts to be a list"),
        ("lora_rank: 8", "lora_rank: 0", "lora_rank to be an integer above 0"),
        ("lora_rank: 8", "lora_rank: some", "lora_rank to be an integer above 0, 'auto' or none"),
        ("batch: 8", "learning_rate: 1e-4", r"1\.0e-4 is a number"),
        ("guidance: 2.0", "seed: -1", "seed to be an integer of at least 0"),
        ("pipeline: tinywan", "pipeline: [", "a YAML file"),
        ("folder: run", "stages: [search]", "complete"),
        ("guidance: 2.0", "stages: [knowledge, search]", "search before knowledge"),
        ("guidance: 2.0", "stages: [search, search]", "each once"),
        ("lora_modules: [to_q, to_k]", "lora_modules: to_q", "lora_modules to be a tuple of names"),
        ("guidance: 2.0", "samples: {every: 9, prompts: a b}", "samples to be a list of texts"),
        ("guidance: 2.0", "data: {folder: clips}", "finetune.data to hold rate, videos"),
        ("guidance: 2.0", "data: {rate: 16}", "data to be complete"),
        ("guidance: 2.0", "data: {videos: clips, rate: 0}", "rate above 0"),
        ("guidance: 2.0", "latents: a\n  data: {videos: clips}", "latents or data, got both"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in YAML
    (tmp_path / "job.yaml").write_text(YAML.replace(old, new))
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    with pytest.raises(DistillationError, match=message):
        read_config(tmp_path / "job.yaml")


def test_videos_lie_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    videos = "data: {videos: clips, rate: 16}"
    (tmp_path / "job.yaml").write_text(YAML.replace("guidance: 2.0", videos))
    data = read_config(tmp_path / "job.yaml").finetune.data
    assert data == VideoData(videos=tmp_path / "clips", rate=16)


def test_samples_and_tensorboard_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    text = YAML.replace("guidance: 2.0", "samples: {every: 50, prompts: [a, b], kind: gif}")
    (tmp_path / "job.yaml").write_text(text)
    found = read_config(tmp_path / "job.yaml").finetune.samples
    assert found == SampleConfig(every=50, prompts=("a", "b"), kind="gif")
    (tmp_path / "job.yaml").write_text(YAML.replace("batch: 8", "tensorboard: true"))
    monkeypatch.setattr(loop, "find_spec", lambda name: None)
    with pytest.raises(DistillationError, match="pip install tensorboard"):
        read_config(tmp_path / "job.yaml")


def test_no_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(DistillationError, match=r"job\.yaml"):
        read_config(tmp_path / "job.yaml")


@pytest.mark.parametrize(
    ("kind", "given", "name"),
    [(FinetuneConfig, {"folder": "run"}, "folder"),
     (FinetuneConfig, {"folder": Path("run"), "latents": "run"}, "latents"),
     (VideoData, {"videos": "clips"}, "videos")],
    ids=["folder", "latents", "videos"],
)  # fmt: skip
def test_folders_are_paths(kind: type, given: dict, name: str) -> None:
    with pytest.raises(DistillationError, match=f"{name} to be a pathlib.Path, got '"):
        kind(**given)
