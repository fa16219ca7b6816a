"""evdit plan: shown, compared, checked; for people and for programs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from evdit_opt.cli import app
from evdit_opt.plan import Plan
from tests.plans import PLAN


def plan_command(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    PLAN.save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    (tmp_path / "damaged.json").write_text("{")
    return tmp_path / "damaged.json"


def test_show_prints_the_plan(saved: Path) -> None:
    result = plan_command("show", saved)
    assert result.exit_code == 0
    for line in PLAN.describe().splitlines():
        assert line in result.stdout


def test_show_as_json_holds_the_plan_itself(saved: Path) -> None:
    result = plan_command("show", saved, "--json")
    told = json.loads(result.stdout)
    assert Plan.from_json(json.dumps(told["plan"])) == PLAN
    assert told["fingerprint"] == PLAN.fingerprint()
    assert told["density"] == PLAN.density


@pytest.mark.parametrize("command", [["show"], ["show", "--json"], ["validate"]], ids=" ".join)
def test_a_bad_plan_is_one_line_and_exit_code_1(damaged: Path, command: list[str]) -> None:
    result = plan_command(*command, damaged)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("PlanError: ")
    assert len(result.stderr.splitlines()) == 1


def test_validate(saved: Path, damaged: Path, tmp_path: Path) -> None:
    result = plan_command("validate", saved)
    assert result.exit_code == 0
    assert "1 of 2 sites sparse" in result.stdout
    result = plan_command("validate", saved, "--json")
    assert (result.exit_code, json.loads(result.stdout)["valid"]) == (0, True)
    result = plan_command("validate", damaged, "--json")
    assert (result.exit_code, json.loads(result.stdout)["valid"]) == (1, False)
    result = plan_command("validate", tmp_path / "absent.json", "--json")
    assert json.loads(result.stdout)["error"] == "PlanNotFoundError"


def test_diff_of_equal_plans_says_nothing(saved: Path, tmp_path: Path) -> None:
    replace(PLAN, quality=None, versions=()).save(tmp_path / "same.json")  # evidence only
    result = plan_command("diff", saved, tmp_path / "same.json")
    assert (result.exit_code, result.stdout) == (0, "")
    result = plan_command("diff", saved, tmp_path / "same.json", "--json")
    assert json.loads(result.stdout) == {"equal": True, "differences": []}


def test_diff_names_what_differs(saved: Path, tmp_path: Path) -> None:
    replace(PLAN, reuse=None).save(tmp_path / "other.json")
    result = plan_command("diff", saved, tmp_path / "other.json")
    assert result.exit_code == 1
    assert "blocks.0.attn1: reuse: yes -> no" in result.stdout.splitlines()
    result = plan_command("diff", saved, tmp_path / "other.json", "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)["differences"]
    assert {"where": "blocks.0.attn1", "what": "reuse", "old": "yes", "new": "no"} in found


def test_trouble_is_not_mistaken_for_a_difference(saved: Path, damaged: Path) -> None:
    result = plan_command("diff", saved, damaged)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "PlanError" in result.stderr
