"""Copies and saved checkpoints of an optimized model."""

import copy
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel

from evdit_opt.apply import apply_plan, is_optimized, restore
from evdit_opt.errors import PlanMismatchError
from tests.models.case import Shape
from tests.runtime.pair import Pair


def test_a_copy_is_refused_until_it_gets_the_plan_itself() -> None:
    pair = Pair(Shape(layers=1))
    plan = pair.plan
    pair.apply()
    right = pair.check()
    model, pair.fast = pair.fast, copy.deepcopy(pair.fast)
    with pytest.raises(PlanMismatchError, match="a copy of an optimized model, restore it"):
        pair.check()
    apply_plan(restore(pair.fast), plan, inner="eager")
    assert torch.equal(pair.check(), right)
    pair.fast = model
    assert torch.equal(pair.check(), right)


def test_a_saved_model_is_the_dense_one(tmp_path: Path) -> None:
    pair = Pair(Shape(layers=1))
    pair.apply()
    pair.check()
    pair.fast.save_pretrained(tmp_path)
    loaded = WanTransformer3DModel.from_pretrained(tmp_path).eval()
    assert not is_optimized(loaded)
    saved = loaded.state_dict()
    assert set(saved) == set(pair.plain.state_dict())
    assert all(torch.equal(saved[name], x) for name, x in pair.plain.state_dict().items())
    pair.fast = loaded
    pair.apply()
    pair.check()
