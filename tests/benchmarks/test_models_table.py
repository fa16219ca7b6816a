"""docs/models.md says what was measured, of every model in the tests, and holds no surprises."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from tests.models.case import Case
from tests.models.detection import SHAPES
from tests.models.small_models import BY_NAME, CASES

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "benchmarks" / "models" / "table.py"))
CONTENT = json.loads(SCRIPT["RESULTS"].read_text(encoding="utf-8"))


def test_the_page_holds_the_record() -> None:
    page = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    assert SCRIPT["BLOCK"].search(page) is not None
    assert SCRIPT["written"](page, CONTENT) == page


def test_every_model_is_on_record() -> None:
    assert set(CONTENT["rows"]) == set(BY_NAME)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_the_record_is_of_this_case_and_complete(case: Case) -> None:
    row = CONTENT["rows"][case.name]
    assert row["class"] == case.kind
    assert list(row["detection"]) == list(SHAPES)
    for name, shape in SHAPES.items():
        found, expected = row["detection"][name], case.layouts(shape)
        assert (found["expected"], found["found"]) == (len(expected), len(expected))
        assert found["false"] == 0
        assert ("error" in found) == bool(case.refused)
        if not case.refused:
            layouts = {(x.prefix, x.grid.tokens, x.suffix) for x in expected.values()}
            assert {tuple(layout) for layout in found["layouts"]} == layouts
            assert found["fullgraph"] == case.fullgraph
    if not case.refused:
        assert row["forward"]["rewritten"] == len(case.layouts())
        assert SCRIPT["equal"](row, "forward") == "equal"
        assert SCRIPT["equal"](row, "export").startswith(("equal", "refused: expected a"))
        assert SCRIPT["equal"](row, "export_aten").startswith(("equal", "refused: expected a"))


def record(**parts: Any) -> dict[str, Any]:
    usual = {
        "expected": 2, "found": 2, "false": 0, "layouts": [[7, 72, 0]], "evidence": ["probe"],
        "grid": "patch", "fullgraph": True, "scoped": 0,
        "refused": {"causal": 1, "folded (6 instead of 1)": 1, "folded (4 instead of 1)": 1},
    }  # fmt: skip
    same = {"error": 1e-9, "bound": 1e-8, "gap": 1e-2, "graphs": 1, "rewritten": 2}
    return {"class": "A", "tokens": "", "detection": {"usual": usual}, "forward": same, **parts}


def page(row: dict[str, Any]) -> str:
    facts = {"torch": "t", "diffusers": "d", "date": "2000-01-01"}
    return SCRIPT["table"]({"environment": facts, "rows": {"model": row}})


def cells(row: dict[str, Any]) -> list[str]:
    (line,) = (line for line in page(row).splitlines() if line.startswith("| model |"))
    return line.strip("| ").split(" | ")


def test_a_row() -> None:
    assert cells(record()) == [
        "model", "A", "2 / 2", "7 + 72 + 0", "full", "equal", "", "", "", "1 (a), 2 (b)",
    ]  # fmt: skip


def test_nothing_is_called_equal_that_is_not() -> None:
    off = {"error": 2e-8, "bound": 1e-8, "gap": 1e-2}
    assert cells(record(backward=off))[6] == "off by 2.0e-08"
    assert cells(record(backward={**off, "error": 0.0, "gap": 2e-8}))[6].startswith("proves")


def test_what_is_refused_has_a_letter_like_what_is_left_alone() -> None:
    untraced = (
        "expected a ToyDiT that torch.export can trace as a whole, it cannot: Could not guard on "
        "data-dependent expression Eq(u0, 1) (unhinted: Eq(u0, 1)). Use evdit_opt.apply_plan"
    )
    row = record(backward={"refused": "causal"}, export={"refused": untraced})
    assert cells(row)[6:] == ["refused (a)", "refused (c)", "", "1 (a), 2 (b)"]
    reason = "torch.export: Could not guard on data-dependent expression"
    assert f"- (c) {reason}" in page(row)


def test_a_refused_model_says_why() -> None:
    error = (
        "expected 3D self-attention over video in A, found a.b: in the batch (6 instead of 1); "
        "a.c: causal; nothing can be made sparse here"
    )
    usual = {"expected": 0, "found": 0, "false": 0, "error": error}
    row = {"class": "A", "tokens": "", "detection": {"usual": usual}}
    assert SCRIPT["reasons"](row) == {"in the batch": 1, "causal": 1}
