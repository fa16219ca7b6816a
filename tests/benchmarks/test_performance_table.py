"""docs/performance.md says what the recorded results say, and nothing about GPUs without any."""

import json
import runpy
from pathlib import Path

from benchmarks import gpu_suite

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "benchmarks" / "performance_table.py"))


def test_the_page_holds_the_recorded_numbers() -> None:
    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    assert SCRIPT["BLOCK"].search(page) is not None
    assert SCRIPT["written"](page) == page


def test_without_a_gpu_s_numbers_the_page_says_so(tmp_path: Path) -> None:
    assert "Not yet measured on a GPU" in SCRIPT["numbers"](tmp_path)
    measured = list((ROOT / "benchmarks" / "results").glob("*/gpu_suite.json"))
    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    assert ("Not yet measured on a GPU" in page) == (not measured)


def test_what_the_suite_writes_becomes_tables(tmp_path: Path) -> None:
    output = tmp_path / "some-gpu" / "gpu_suite.json"
    parts = [argument for part in ("forward", "backward", "step") for argument in ("--part", part)]
    rows = gpu_suite.main(["--device", "cpu", "--tiny", "--rounds", "1", *parts,
                           "--output", str(output)])  # fmt: skip
    rows.add("memory/tiny", {"rule": "1:4", "bytes": {"dense forward": 3 * 2**30}})
    text = SCRIPT["numbers"](tmp_path)
    assert "Not yet measured" not in text
    row = json.loads(output.read_text())["rows"]["forward/tiny/1:4"]
    own = row["results"]["decomposed"]
    cells = ["1:4", f"{row['density']:.3f}", f"{row['ideal']:.2f}", "decomposed",
             f"{own['ms']:.2f}", f"{own['tflops_kept']:.0f}", f"{own['speedup']:.2f}",
             f"{own['of_ideal']:.2f}", "", f"{row['errors']['decomposed']['out']:.1e}"]  # fmt: skip
    assert "| " + " | ".join(cells) + " |" in text
    assert text.count("#### tiny without text") == 2  # forward, and with backward
    assert "**A stack of 2 blocks**" in text
    assert "| tiny | 1:4 | 3.00 |" in text
