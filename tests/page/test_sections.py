"""The page's sections of evidence: tried plans, the bound, tiles; and the files they come from."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from evdit_opt.cli import app
from evdit_opt.errors import UnsupportedInputError
from evdit_opt.grid import VideoGrid
from evdit_opt.inspection.attention_share import AttentionShare
from evdit_opt.page import load_measurement, load_share, plan_page
from evdit_opt.page.bound import upper_bound
from evdit_opt.page.frontier import frontier
from evdit_opt.page.html import join
from evdit_opt.page.tiles import tile_statistics
from evdit_opt.plan import Plan, SpeedRecord, TrialRecord
from evdit_opt.strict_json import dump
from tests.page.test_page import Page
from tests.plans import PLAN, trials

ROOT = Path(__file__).parents[2]
DEMO = Plan.load(ROOT / "docs/demo/plan.evdit.json")
TILES = ROOT / "benchmarks/results/cpu/tinywan_tiles.json"
SHARE = AttentionShare(
    dense_ms=10.0, without_ms=4.0, share=0.6, max_speedup=2.5, rounds=9, device="a device",
    dtype="float32", threads=2,
)  # fmt: skip
BETTER = TrialRecord(name="reuse", density=0.2, output=0.1, temporal=0.2, psnr=33.0)
WORSE = TrialRecord(name="searched", density=0.3, output=0.2, temporal=0.3, psnr=27.0)


def with_trials(*tried: TrialRecord, explored: tuple[TrialRecord, ...] = ()) -> Plan:
    found = replace(PLAN.calibration, trials=tried, explored=explored)
    return replace(PLAN, calibration=found)


def centres(page: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', page)]


def test_the_frontier_draws_what_was_tried_and_marks_the_chosen() -> None:
    page = join(*frontier(with_trials(BETTER, explored=(WORSE,))))
    chosen, other = centres(page)
    assert chosen[0] < other[0]  # computes less
    assert chosen[1] < other[1]  # and is better: higher up
    assert page.count("dot-chosen") == 1
    for text in ("<strong>reuse</strong>", "33.0 dB", "searched", "27.0 dB", "PSNR in dB"):
        assert text in page
    assert join(*frontier(with_trials())) == ""


def test_without_psnr_the_frontier_goes_by_the_error() -> None:
    plain = [replace(one, psnr=None) for one in (BETTER, WORSE)]
    page = join(*frontier(with_trials(*plain)))
    assert centres(page)[0][1] < centres(page)[1][1]  # the smaller error is higher up
    assert "error, logarithmic" in page
    page = join(*frontier(with_trials(explored=(WORSE,))))
    assert "dot-chosen" not in page
    assert "was run on held-out clips only" in page
    plan = with_trials(explored=(WORSE,))
    dense = tuple(replace(site, rule=None, density=1.0) for site in plan.sites)
    page = join(*frontier(replace(plan, sites=dense, reuse=None)))
    assert "None was chosen: all layers stay dense" in page


@given(st.lists(trials, min_size=1, max_size=4))
def test_any_trials_can_be_drawn(tried: list[TrialRecord]) -> None:
    page = join(*frontier(with_trials(*tried)))
    Page(page)
    assert all(0 <= x <= 320 and 0 <= y <= 160 for x, y in centres(page))
    assert "nan" not in page


def test_the_bound_is_amdahl_s() -> None:
    sparse = replace(PLAN.sites[0], density=0.25)
    speed = SpeedRecord(dense_ms=9.0, optimized_ms=6.0, device="a chip")
    plan = replace(PLAN, sites=(sparse,), reuse=None, speed=None, predicted=speed)
    page = join(*upper_bound(plan, SHARE))
    for text in ("2.50x", f"{1 / (0.4 + 0.6 * 0.25):.2f}x", "1.50x", "a chip", "60.0%"):
        assert text in page
    assert join(*upper_bound(plan, None)) == ""


def test_tiles_show_every_layer() -> None:
    measured = load_measurement(TILES, DEMO)
    page = join(*tile_statistics(measured))
    Page(page)
    for site in measured.sites:
        assert f"<strong>{site.name}</strong>" in page
        assert f"{site.in_frame:.1%}" in page
    assert page.count("<svg") == len(measured.sites)
    diagonal = replace(measured.sites[0], tiles=((1.0, 0.0), (0.0, 1.0)))
    page = join(*tile_statistics(replace(measured, sites=(diagonal,))))
    assert page.count("M0 0h1v1h-1zM1 1h1v1h-1z") == 1
    assert 'fill-opacity="1.00"' in page


@settings(max_examples=30)
@given(st.lists(st.lists(st.floats(allow_nan=False), max_size=4), max_size=4))
def test_any_tiles_can_be_drawn(rows: list[list[float]]) -> None:
    measured = load_measurement(TILES, DEMO)
    odd = replace(measured.sites[0], tiles=tuple(map(tuple, rows)), sets=(), similarity=None)
    Page(join(*tile_statistics(replace(measured, sites=(odd,)))))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"{", "to be a JSON file"),
        (b"\xff", "to be a JSON file"),
        (b"[]", "figures of WanTransformer3DModel, got a list"),
        (b'{"model": "Other"}', "figures of WanTransformer3DModel, got 'Other'"),
        (b'{"model": "WanTransformer3DModel"}', "prints"),
        (b'{"model": "WanTransformer3DModel", "attention": null}', "prints"),
    ],
    ids=["no JSON", "no text", "a list", "of another model", "without figures", "not timed"],
)
def test_what_is_no_evidence_is_refused(tmp_path: Path, content: bytes, match: str) -> None:
    (tmp_path / "x.json").write_bytes(content)
    for load in (load_measurement, load_share):
        with pytest.raises(UnsupportedInputError, match=match):
            load(tmp_path / "x.json", DEMO)


def test_the_command_takes_both(tmp_path: Path) -> None:
    inspection = f'{{"model": "{DEMO.model_class}", "attention": {dump(SHARE)}}}'
    (tmp_path / "inspect.json").write_text(inspection)
    arguments = ["report", str(ROOT / "docs/demo/plan.evdit.json"), "--tiles", str(TILES)]
    arguments += ["--inspection", str(tmp_path / "inspect.json"), "--out", str(tmp_path / "p.html")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    page = (tmp_path / "p.html").read_text()
    for heading in ("Plans that were tried", "Upper bound", "Where attention goes", "Environment"):
        assert f"<h2>{heading}</h2>" in page
    assert load_share(tmp_path / "inspect.json", DEMO) == SHARE


def test_an_extrapolated_plan_says_so() -> None:
    page = plan_page(replace(PLAN, calibrated_at=VideoGrid(5, 4, 5)))
    assert "extrapolated to, not calibrated at 8 latent frames" in page
    assert "of another grid than 5 x 4 x 5 tokens" in page
