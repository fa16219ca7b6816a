"""The arms of the ablations: each can be trained, and lands in a table of the page."""

import json
import re
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks import tinywan_ablations as ablations
from benchmarks.tinywan_ablations import ARMS, OUTPUT, PAGE, Arm

TABLES = [match[2] for match in ablations.BLOCK.finditer(PAGE.read_text())]


def test_every_arm_begins_with_one_that_comes_before_it() -> None:
    """So that arms in order train nothing twice, and none waits for itself."""
    seen: set[str] = set()
    for name, arm in ARMS.items():
        assert arm.table in TABLES
        assert not isinstance(arm.start, str) or arm.start in seen
        assert not isinstance(arm.start, Path) or arm.start.exists()
        assert not isinstance(arm.plan, Path) or arm.plan.exists()
        seen.add(name)


@pytest.mark.parametrize("name", [name for name, arm in ARMS.items() if arm.train])
def test_how_an_arm_is_trained(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command its script understands, after those of what it begins with; once."""
    ran: list[list[str]] = []
    monkeypatch.setattr(ablations.subprocess, "run", lambda command, check: ran.append(command))
    options = Namespace(folder=tmp_path, latents=Path("pool"))
    assert ablations.weights_of(name, options) == tmp_path / name / "student.safetensors"
    arm, command = ARMS[name], ran[-1]
    assert command[2] == f"benchmarks.tinywan_{arm.train[0]}"
    assert command[command.index("--segments") + 1] == str(arm.segments)
    flag = "--start" if arm.train[0] == "consistency" else "--teacher"
    assert (flag in command) is (arm.start is not None)
    if isinstance(arm.start, str):
        begin = tmp_path / arm.start / "student.safetensors"
        assert command[command.index(flag) + 1] == str(begin)
        assert str(begin.parent) in ran[-2]
    assert ("--rule" in command or "--plan" in command) is (arm.plan is not None)
    count = len(ran)
    ablations.weights_of(name, options)
    assert len(ran) == count


def test_reuse_is_a_refresh_every_second_step() -> None:
    plan = ablations.plan_of(Arm("", "", segments=8, plan="reuse"))
    assert plan.reuse is not None
    assert plan.reuse.modes(plan.reuse.levels) == ("refresh", "reuse") * 4
    own = 1 / plan.grid.frames
    assert plan.density == pytest.approx((1 + own + own) / 2)


def test_a_gain_is_paired() -> None:
    """Clips differ far more than arms do: 20 to 40 dB here, and a gain of 2 on each but one."""
    first = {"psnr_db_of_clips": [20.0, 30.0, 40.0, 25.0]}
    row = {"psnr_db_of_clips": [22.0, 32.0, 42.0, 31.0]}
    assert ablations.gain(row, first) == "+3.0 ± 1.0"


def test_the_page_quotes_the_results() -> None:
    """And every row that was measured is in it."""
    result = json.loads(OUTPUT.read_text())
    page = PAGE.read_text()
    assert ablations.quote(page, result) == page
    shown = re.findall(r"^\| (.+?) \|", page, re.MULTILINE)
    assert {row["name"] for row in result["rows"]} <= set(shown)
