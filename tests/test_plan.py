import dataclasses
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from evdit_opt.errors import PlanError, PlanMismatchError
from evdit_opt.grid import VideoGrid
from evdit_opt.masks import Rule
from evdit_opt.plan import PLAN_FILE, FinetuneRecord, Plan, SiteLayout
from evdit_opt.strict_json import OPTIONAL
from tests.plans import EVIDENCE, PLAN, TEXT, plans


@given(plans)
def test_json_round_trip(plan: Plan) -> None:
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.fingerprint() == plan.fingerprint()
    assert again.to_json() == plan.to_json()
    assert all(site.name in plan.describe() for site in plan.sites)


def test_file_round_trip(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "a.json")
    assert Plan.load(tmp_path / "a.json") == PLAN
    assert PLAN.push(tmp_path) == tmp_path / PLAN_FILE
    assert Plan.pull(str(tmp_path)) == PLAN
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.json", PLAN_FILE]


def test_evidence_stands_on_one_line_each_and_keys_are_sorted() -> None:
    trials = len(PLAN.calibration.trials)
    assert sum('"output"' in line for line in TEXT.splitlines()) == len(EVIDENCE) + trials
    top = [line.split('"')[1] for line in TEXT.splitlines() if line.startswith('  "')]
    usual = {
        field.name
        for field in dataclasses.fields(Plan)
        if field.metadata.get(OPTIONAL) and getattr(PLAN, field.name) == field.default
    }
    assert top == sorted({field.name for field in dataclasses.fields(Plan)} - usual)


def test_fine_tuned_weights_are_recorded_and_checked() -> None:
    assert '"finetune"' not in TEXT  # as plans were before there was fine-tuning
    made = {"steps": 6, "full_steps": 50, "time_shift": 1.0, "lora_rank": 8}
    record = FinetuneRecord(**made, lora_modules=("to_q",), weights_sha256="0" * 64)
    plan = dataclasses.replace(PLAN, finetune=record)
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.fingerprint() == PLAN.fingerprint()  # of the sparsity; weights have their own hash
    assert "fine-tuned weights, 6 steps" in plan.describe()
    for wrong in ({"full_steps": 5}, {"lora_rank": 0}, {"time_shift": 0.0}):
        with pytest.raises(PlanError, match=next(iter(wrong))):
            dataclasses.replace(record, **wrong)


def test_how_a_site_is_reached_is_written_only_where_it_is_not_the_usual_way() -> None:
    assert '"way"' not in TEXT  # so that plans of earlier versions and new ones read alike
    first = dataclasses.replace(PLAN.sites[0], way="scope")
    plan = dataclasses.replace(PLAN, sites=(first, *PLAN.sites[1:]))
    assert plan.to_json().count('"way": "scope"') == 1
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.fingerprint() == PLAN.fingerprint()
    with pytest.raises(PlanError, match="expected way"):
        dataclasses.replace(PLAN.sites[0], way="patch")


def test_a_strength_is_written_only_where_it_is_fitted() -> None:
    assert '"strength"' not in TEXT  # so that plans of earlier versions and new ones read alike
    fitted = Rule(2, weighting="fitted", strength=0.5)
    plan = dataclasses.replace(
        PLAN, sites=(dataclasses.replace(PLAN.sites[0], rule=fitted), *PLAN.sites[1:])
    )
    assert plan.to_json().count('"strength": 0.5') == 1
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.fingerprint() != PLAN.fingerprint()
    assert "2:6 fitted 0.5" in plan.describe()


def test_a_failed_save_keeps_the_old_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    PLAN.save(tmp_path / "plan.json")

    def disk_full(_source: object, _target: object) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "replace", disk_full)
    with pytest.raises(OSError, match="no space left"):
        dataclasses.replace(PLAN, min_tokens=1).save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == PLAN
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


def test_density_counts_dense_sites_as_one() -> None:
    assert PLAN.density == pytest.approx((0.53125 + 1) / 2)
    assert PLAN.rules == {"blocks.0.attn1": Rule(2, weighting="balanced")}
    assert PLAN.speed is not None
    assert PLAN.speed.speedup == pytest.approx(2.4)


@pytest.mark.parametrize(
    ("change", "numerics"),
    [
        ({"model_class": "Other"}, True),
        ({"model_config_hash": "0"}, True),
        ({"min_tokens": 65}, True),
        ({"sites": PLAN.sites[:1]}, True),
        ({"sites": (dataclasses.replace(PLAN.sites[0], rule=Rule(2)), PLAN.sites[1])}, True),
        ({"sites": (dataclasses.replace(PLAN.sites[0], layout=SiteLayout(prefix=1)),)}, True),
        ({"grid_source": dataclasses.replace(PLAN.grid_source, patch=(1, 1, 1))}, True),
        ({"sites": (dataclasses.replace(PLAN.sites[0], errors=()), PLAN.sites[1])}, False),
        ({"quality": None, "speed": None, "versions": ()}, False),
        ({"grid": VideoGrid(3, 3, 3)}, False),
    ],
    ids=str,
)
def test_the_fingerprint_follows_the_numbers_only(change: dict[str, Any], numerics: bool) -> None:
    changed = dataclasses.replace(PLAN, **change)
    assert (changed.fingerprint() != PLAN.fingerprint()) == numerics


def test_a_plan_for_another_model_says_what_differs() -> None:
    names = [site.name for site in PLAN.sites]
    PLAN.require_match("WanTransformer3DModel", names)
    PLAN.require_match("WanTransformer3DModel", names, "6ac1")
    for arguments, match in [
        (("CogVideoXTransformer3DModel", names), "got a CogVideoXTransformer3DModel"),
        (("WanTransformer3DModel", names[:1]), r"lacks the planned sites blocks\.1\.attn1"),
        (("WanTransformer3DModel", [*names, "late"]), "plan lacks the model's sites late"),
        (("WanTransformer3DModel", names, "ffff"), "hashes to 6ac1, got ffff"),
    ]:
        with pytest.raises(PlanMismatchError, match=match):
            PLAN.require_match(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "build",
    [
        lambda: SiteLayout(prefix=-1),
        lambda: dataclasses.replace(PLAN, min_tokens=1.0),
        lambda: dataclasses.replace(PLAN, sites=()),
        lambda: dataclasses.replace(PLAN, schema_version=1),
        lambda: dataclasses.replace(PLAN, versions=(("torch", "2"), ("accelerate", "1"))),
        lambda: dataclasses.replace(PLAN.sites[0], reason=""),
        lambda: dataclasses.replace(EVIDENCE[0], output=float("nan")),
        lambda: dataclasses.replace(PLAN.calibration, seed=-1),
    ],
)
def test_a_plan_built_in_code_is_checked_too(build: Callable[[], object]) -> None:
    with pytest.raises(PlanError, match="expected"):
        build()
