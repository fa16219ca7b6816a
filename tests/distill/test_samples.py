"""Clips made while training: the same at every step but for the weights, and unseen by training."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from evdit_opt import Config
from evdit_opt.demo.tinywan import load_tinywan
from evdit_opt.distill.config import FinetuneConfig
from evdit_opt.distill.loop import TrainingConfig
from evdit_opt.distill.pipeline import finetune
from evdit_opt.distill.samples import SampleConfig, undisturbed, write_samples
from evdit_opt.distill.videos import read_clip
from evdit_opt.errors import DistillationError

CALL = {"num_frames": 9, "height": 32, "width": 32, "max_sequence_length": 16}
PROMPTS = ("a red circle moving left", "a blue square moving up")
SEARCH = Config(
    density=0.5, references=(1,), windows=(0,), weightings=("none",), spacings=("paper",),
    min_tokens=0, verify_prompts=0, trial_prompts=1, reuse=False, inner="eager", progress=False,
    pipe_kwargs=CALL,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in the same order, whoever else uses the machine
    yield
    torch.set_num_threads(threads)


def curve(log: Path) -> list[dict]:
    records = [json.loads(line) for line in log.read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


@pytest.mark.parametrize(
    "stages",
    [("consistency",), pytest.param(("search", "knowledge"), marks=pytest.mark.nightly)],
    ids=["consistency", "knowledge"],
)
def test_the_loss_curve_is_the_same_bit_for_bit(tmp_path: Path, stages: tuple[str, ...]) -> None:
    short = TrainingConfig(steps=5, batch=2, learning_rate=1e-3, warmup=1)
    usual = FinetuneConfig(
        folder=tmp_path / "without", stages=stages, consistency=short, knowledge=short,
        guidance=2.0, full_steps=6, clips=2,
    )  # fmt: skip
    samples = SampleConfig(every=2, prompts=PROMPTS, kind="gif")
    weights = []
    for config in (usual, replace(usual, folder=tmp_path / "with", samples=samples)):
        pipe = load_tinywan()
        finetune(pipe, PROMPTS, config, steps=2, search=SEARCH)
        weights.append(pipe.transformer.state_dict())
    last = f"{len(stages)}-{stages[-1]}"
    assert curve(tmp_path / "with" / last / "log.jsonl") == curve(
        tmp_path / "without" / last / "log.jsonl"
    )
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert not (tmp_path / "without" / last / "samples").exists()
    made = sorted((tmp_path / "with" / last / "samples").iterdir())
    assert [path.name for path in made] == [
        f"step-00000{step}-{prompt}.gif" for step in (2, 4) for prompt in (0, 1)
    ]
    # Two prompts, and the same prompt after two more steps: three clips that all differ.
    clips = [read_clip(path, 9, 32, 32).tobytes() for path in made]
    assert len(set(clips)) == 4


@pytest.mark.parametrize("kind", ["mp4", "gif"])
def test_a_clip_is_what_the_pipeline_makes_of_the_seed(tmp_path: Path, kind: str) -> None:
    pipe = load_tinywan()
    config = SampleConfig(every=1, prompts=PROMPTS, seed=7, kind=kind)
    call = {**CALL, "guidance_scale": 1.0, "num_inference_steps": 2}
    made = write_samples(pipe, config, call, tmp_path, 100)
    assert [path.name for path in made] == [f"step-000100-{n}.{kind}" for n in (0, 1)]
    for number in range(len(made)):
        generator = torch.Generator().manual_seed(7 + number)
        video = pipe(PROMPTS[number], generator=generator, output_type="np", **call).frames[0]
        # What a lossy format leaves of a clip is far closer to it than the other prompt's clip.
        error = [np.abs(read_clip(p, 9, 32, 32) / 255 - video).mean() for p in made]
        assert error[number] < 0.05
        assert error[number] < 0.5 * error[1 - number]


def test_random_numbers_drawn_for_samples_do_not_count() -> None:
    def draw() -> tuple[float, float, float]:
        return float(torch.rand(())), float(np.random.random()), random.random()

    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(0)
    first = draw()
    with undisturbed():
        inside = draw()
    second = draw()
    assert inside == second
    assert first != second


def test_a_clip_that_ends_early_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk: ffmpeg says nothing, the file is short."""
    import imageio.v3 as iio

    write = iio.imwrite

    def cut(path: Path, video: np.ndarray, **how: object) -> None:
        write(path, video[:4], **how)

    monkeypatch.setattr(iio, "imwrite", cut)
    call = {**CALL, "guidance_scale": 1.0, "num_inference_steps": 1}
    config = SampleConfig(every=1, prompts=PROMPTS)
    with pytest.raises(DistillationError, match=r"step-000001-0\.mp4.*it has 4.*make room"):
        write_samples(load_tinywan(), config, call, tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "wrong",
    [{"every": 0}, {"prompts": ()}, {"kind": "png"}, {"rate": 0.0}],
    ids=["every", "prompts", "kind", "rate"],
)
def test_settings_are_checked(wrong: dict) -> None:
    with pytest.raises(DistillationError, match=f"{next(iter(wrong))}"):
        SampleConfig(**{"every": 1, "prompts": ("a",), **wrong})
