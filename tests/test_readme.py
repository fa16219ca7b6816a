"""The README's numbers are those of the committed report."""

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_demo_block_is_what_the_report_says():
    spec = importlib.util.spec_from_file_location("quote_demo", ROOT / "benchmarks/quote_demo.py")
    assert spec is not None
    assert spec.loader is not None
    quote_demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(quote_demo)
    readme = (ROOT / "README.md").read_text()
    report = json.loads((ROOT / "docs/demo/report.json").read_text())
    assert quote_demo.BLOCK.search(readme) is not None
    assert quote_demo.quote(readme, report) == readme
