"""Differences of plans: none exactly where two plans compute the same, and each by its name."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings

from evdit_opt.grid import VideoGrid
from evdit_opt.masks import Rule
from evdit_opt.plan import Plan, SiteLayout
from evdit_opt.plan_diff import Difference, plan_differences
from evdit_opt.plan_records import FinetuneRecord
from tests.plans import PLAN, plans

FIRST, SECOND = PLAN.sites
TUNED = FinetuneRecord(
    steps=6, full_steps=50, time_shift=1.0, lora_rank=0, lora_modules=(), weights_sha256="00"
)


@given(plans, plans)
@settings(max_examples=100)
def test_plans_that_compute_something_else_differ(one: Plan, other: Plan) -> None:
    assert plan_differences(one, one) == ()
    if one.fingerprint() != other.fingerprint():
        assert plan_differences(one, other)


@given(plans, plans)
@settings(max_examples=50)
def test_the_other_way_round_is_the_same_backwards(one: Plan, other: Plan) -> None:
    def found(old: Plan, new: Plan) -> set[tuple[str | None, str, str, str]]:
        return {(d.where, d.what, d.old, d.new) for d in plan_differences(old, new)}

    assert found(one, other) == {(w, x, old, new) for w, x, new, old in found(other, one)}


@pytest.mark.parametrize(
    ("change", "where", "what"),
    [
        ({"sites": (replace(FIRST, rule=Rule(3, weighting="balanced")), SECOND)}, 0, "rule"),
        ({"sites": (replace(FIRST, rule=Rule(2, weighting="fitted")), SECOND)}, 0, "rule"),
        ({"sites": (replace(FIRST, density=0.5), SECOND)}, 0, "density"),
        ({"sites": (replace(FIRST, layout=SiteLayout(prefix=1)), SECOND)}, 0, "text tokens"),
        ({"sites": (replace(FIRST, way="scope"), SECOND)}, 0, "way"),
        ({"sites": (FIRST,)}, 1, "site"),
        ({"reuse": None}, 0, "reuse"),
        ({"min_tokens": 65}, None, "min_tokens"),
        ({"finetune": TUNED}, None, "fine-tuning"),
        ({"grid": VideoGrid(8, 4, 6)}, None, "grid"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_property_is_named(change: dict[str, Any], where: int | None, what: str) -> None:
    found = plan_differences(PLAN, replace(PLAN, **change))
    assert (None if where is None else PLAN.sites[where].name, what) in [
        (one.where, one.what) for one in found
    ]


def test_words() -> None:
    found = Difference("blocks.0.attn1", "reuse", "yes", "no")
    assert found.describe() == "blocks.0.attn1: reuse: yes -> no"
    assert Difference(None, "grid", "1", "2").describe() == "plan: grid: 1 -> 2"
