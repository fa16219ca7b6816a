"""The rate of knowledge distillation follows from how far a plan is off, and is decided once."""

import json
from pathlib import Path

import pytest

from evdit_opt.distill.loop import TrainingConfig
from evdit_opt.distill.rate import FAR_OFF, knowledge_rate
from evdit_opt.errors import DistillationError
from evdit_opt.masks import Rule
from evdit_opt.reuse import with_reuse
from tests.distill.test_reusing_student import LEVELS, models, numbers, stage
from tests.models.toy_dit import make_plan, toy_rules

CONFIG = TrainingConfig(steps=8, batch=1)


@pytest.mark.parametrize("far", [True, False], ids=["own frame alone", "own frame and residual"])
def test_what_is_nearly_right_is_taught_gently(tmp_path: Path, far: bool) -> None:
    teacher, student = models()
    plan = make_plan(student, dict.fromkeys(toy_rules(), Rule(0)))
    losses = stage(teacher, student, plan if far else with_reuse(plan, LEVELS[::2]))
    errors = [float(losses(student, numbers(step))["relative"]) for step in range(4)]
    assert (sum(errors) / 4 > FAR_OFF) is far
    assert knowledge_rate(student, losses, CONFIG, 4, tmp_path) == (3e-4 if far else 3e-5)
    decided = json.loads((tmp_path / "rate.json").read_text())
    assert decided["relative_error"] == pytest.approx(sum(errors) / 4)
    student.requires_grad_(False).text.weight.add_(1.0)  # as a run that goes on finds it
    assert knowledge_rate(student, losses, CONFIG, 4, tmp_path) == decided["rate"]
    (tmp_path / "rate.json").write_text("{")
    with pytest.raises(DistillationError, match=r"rate\.json, cannot read it"):
        knowledge_rate(student, losses, CONFIG, 4, tmp_path)
