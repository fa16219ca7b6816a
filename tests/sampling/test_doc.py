"""The numbers in docs/few_steps.md are those of the committed result, or there are none."""

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_table_is_what_the_benchmark_measured():
    spec = importlib.util.spec_from_file_location("few_steps", ROOT / "benchmarks/few_steps.py")
    assert spec is not None
    assert spec.loader is not None
    few_steps = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(few_steps)
    page = (ROOT / few_steps.PAGE).read_text()
    block = few_steps.BLOCK.search(page)
    assert block is not None
    if not (ROOT / few_steps.OUTPUT).exists():
        assert block[0].count("\n") == 2
        assert "Not measured yet." in block[0]
        return
    assert few_steps.quote(page, json.loads((ROOT / few_steps.OUTPUT).read_text())) == page
