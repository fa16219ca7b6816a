"""A run goes on only with the settings that it was begun with."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from evdit_opt import Config
from evdit_opt.distill.begun import RUNNING, described, require_same, write_begun
from evdit_opt.distill.config import FinetuneConfig
from evdit_opt.distill.encode import VideoData
from evdit_opt.distill.knowledge import KnowledgeWeights
from evdit_opt.distill.loop import TrainingConfig
from evdit_opt.distill.samples import SampleConfig
from evdit_opt.errors import DistillationError

USUAL = FinetuneConfig(folder=Path("run"), lora_rank=None)
OTHER: dict[str, Any] = {
    "folder": Path("elsewhere"),
    "stages": ("search", "consistency", "knowledge"),
    "consistency": TrainingConfig(steps=9),
    "knowledge": TrainingConfig(steps=9),
    "guidance": 2.0,
    "negative_prompt": "bad",
    "full_steps": 40,
    "time_shift": 2.0,
    "first_teacher_steps": 1,
    "huber": 0.1,
    "weights": KnowledgeWeights(attention=1.0),
    "attention_only": True,
    "lora_rank": 4,
    "lora_modules": ("to_q",),
    "clips": 3,
    "latents": Path("latents"),
    "data": VideoData(videos=Path("videos")),
    "seed": 1,
    "samples": SampleConfig(every=1, prompts=("a",)),
}
WHEREVER = {"folder", "samples"}  # change nothing that is trained


def of(config: FinetuneConfig, index: int = 2, steps: int = 6, search: Config | None = None):
    return described(config, ("a", "b"), steps, search or Config(), index)


@pytest.mark.parametrize("name", [field.name for field in fields(FinetuneConfig)])
def test_every_setting_counts(name: str) -> None:
    changed = of(replace(USUAL, **{name: OTHER[name]}))
    assert (changed == of(USUAL)) is (name in WHEREVER)


def test_so_do_steps_prompts_and_search() -> None:
    assert of(USUAL, steps=4) != of(USUAL)
    assert described(USUAL, ("b", "a"), 6, Config(), 2) != of(USUAL)
    assert of(USUAL, search=Config(density=0.3)) != of(USUAL)
    assert of(USUAL, search=Config(pipe_kwargs={"num_frames": 5})) != of(USUAL)
    assert of(USUAL, search=Config(progress=False, inner="eager")) == of(USUAL)
    assert {"progress", "inner"} < set(RUNNING)


def test_a_stage_knows_nothing_of_those_after_it() -> None:
    later = replace(USUAL, knowledge=TrainingConfig(steps=9), attention_only=True)
    assert of(later, index=1) == of(USUAL, index=1) != of(USUAL, index=0)
    assert of(USUAL, index=0, search=Config(density=0.3)) == of(USUAL, index=0)


def test_what_changed_is_named(tmp_path: Path) -> None:
    require_same(tmp_path, of(USUAL))  # nothing was begun there
    write_begun(tmp_path, of(USUAL))
    require_same(tmp_path, of(USUAL))
    with pytest.raises(DistillationError, match=r"guidance 5\.0, now 2\.0\); go on with those"):
        require_same(tmp_path, of(replace(USUAL, guidance=2.0)))
    (tmp_path / "file").touch()
    with pytest.raises(DistillationError, match=r"expected to write .*file/begun\.json"):
        write_begun(tmp_path / "file", of(USUAL))
    (tmp_path / "begun.json").write_text("{")
    with pytest.raises(DistillationError, match="cannot read them"):
        require_same(tmp_path, of(USUAL))
