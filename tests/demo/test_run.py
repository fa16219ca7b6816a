"""The demo's arithmetic and judgement, without its minutes of sampling."""

from dataclasses import replace

import numpy as np
import pytest

from evdit_opt.demo.clips import HELD_OUT, draw_clip, sample_clip
from evdit_opt.demo.run import make_report, paper_plan
from evdit_opt.grid import VideoGrid
from tests.plans import PLAN

DEMO_PLAN = replace(PLAN, grid=VideoGrid(17, 10, 10))
KEYS = (
    "density attention_share step_ms_dense step_ms_optimized step_speedup ideal_step_speedup "
    "psnr_db ssim flicker_ratio caption_accuracy_dense caption_accuracy_optimized clips versions"
).split()


@pytest.fixture(scope="module")
def videos() -> dict[str, list[np.ndarray]]:
    dense = [draw_clip(sample_clip(seed, label)) for seed, label in enumerate(HELD_OUT[:2])]
    noise = np.random.default_rng(0).normal(0, 0.01, dense[0].shape)
    return {
        "dense": dense,
        "optimized": [np.clip(clip + 0.1 * noise, 0, 1) for clip in dense],
        "uniform": [np.clip(clip + noise, 0, 1) for clip in dense],
    }


def report(videos: dict[str, list[np.ndarray]], dense_ms: float, optimized_ms: float) -> dict:
    prompts = [label.caption() for label in HELD_OUT[:2]]
    speed = {"dense": dense_ms, "optimized": optimized_ms, "attention": 0.6 * dense_ms}
    plan = DEMO_PLAN
    return make_report(plan, paper_plan(plan), speed, videos, prompts, steps=20, seed=0)


def test_the_report_has_its_keys_and_adds_up(videos):
    found = report(videos, 100.0, 70.0)
    assert [key for key in KEYS if key not in found] == []
    assert found["step_speedup"] == pytest.approx(100 / 70)
    kept = 0.6 * DEMO_PLAN.density + 0.4
    assert found["ideal_step_speedup"] == pytest.approx(1 / kept)
    assert found["caption_accuracy_dense"] == 1.0
    assert found["psnr_db"] > found["paper_uniform"]["psnr_db"]


def test_a_missed_bar_is_told(videos):
    missed = report(videos, 100.0, 90.0)["missed"]
    assert any("1.4x" in bar for bar in missed)
    swapped = {**videos, "optimized": videos["uniform"], "uniform": videos["optimized"]}
    assert any("PSNR" in bar for bar in report(swapped, 100.0, 50.0)["missed"])


def test_the_papers_mask_is_never_sparser_than_the_plan():
    paper = paper_plan(DEMO_PLAN)
    assert paper.density >= DEMO_PLAN.density
    rules = set(paper.rules.values())
    assert len(rules) == 1
    rule = rules.pop()
    assert (rule.window, rule.weighting, rule.spacing) == (0, "none", "paper")
    sparser = replace(rule, references=rule.references - 1).mask(17).density
    assert sparser < DEMO_PLAN.density
