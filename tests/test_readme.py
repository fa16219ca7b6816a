"""The numbers in README and docs are those of the committed reports."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"benchmarks/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "page", "report"),
    [
        ("quote_demo", "README.md", "docs/demo/report.json"),
        (
            "quote_reuse",
            "docs/residual_reuse.md",
            "benchmarks/results/cpu/residual_reuse_20_steps.json",
        ),
        (
            "quote_tiles",
            "docs/attention_tiles.md",
            "benchmarks/results/cpu/tinywan_tiles.json",
        ),
        ("quote_retarget", "docs/retarget.md", "benchmarks/results/cpu/retarget.json"),
    ],
    ids=["demo", "residual reuse", "tiles", "retarget"],
)
def test_the_block_is_what_the_report_says(name: str, page: str, report: str) -> None:
    quoting = script(name)
    text = (ROOT / page).read_text(encoding="utf-8")
    assert quoting.BLOCK.search(text) is not None
    assert quoting.quote(text, json.loads((ROOT / report).read_text(encoding="utf-8"))) == text


def test_the_damage_model_is_quoted_as_measured() -> None:
    pages = script("quote_damage").quoted()
    for path, text in pages.items():
        assert path.read_text(encoding="utf-8") == text, path
        assert " plans of density " in text
