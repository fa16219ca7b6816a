"""docs/performance.md says what the recorded results say, and nothing about GPUs without any."""

import json
import runpy
from pathlib import Path

import pytest

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


@pytest.mark.nightly
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


def test_the_recorded_cpu_run_is_as_fast_and_small_as_it_should_be() -> None:
    """Ratios to two digits, as the page prints them; of a recording, so nothing here is timed."""
    path = ROOT / "benchmarks/results/cpu/tile_attention.json"
    report = {name: part["rows"] for name, part in json.loads(path.read_text()).items()}
    for name, limit in (("main", 1.05), ("main, 2 threads", 1.15)):
        for row in report[name]:
            assert round(row["results"]["decomposed"]["of_ideal"], 2) <= limit, row["rule"]
    for row in report["main"]:
        own, flex = row["results"]["decomposed"], row["results"]["flex"]
        assert flex["min_ms"] >= 1.2 * own["min_ms"], row["rule"]
    assert all(row["exponent"] <= 1.1 for row in report["growth"])
    assert all(row["of_dense"] <= 1.3 for row in report["memory"])
    for row in report["small"]:
        times = row["min_ms"]
        assert row["auto_over_own"] <= 1.1, row  # between two short calls 10% is noise
        kind = " compiled" if "auto compiled" in times else ""
        assert times[f"auto{kind}"] <= 1.05 * times[f"masked SDPA{kind}"], row
