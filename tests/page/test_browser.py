"""A plan's page in headless Chromium: clips play as one, nothing is complained about."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from evdit_opt.page import load_clips, load_measurement, plan_page
from evdit_opt.plan import Plan
from tests.page.test_sections import SHARE, TILES

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DEMO = Path(__file__).parents[2] / "docs/demo/plan.evdit.json"
APART = 0.08
"""Seconds that clips may be apart before the page's script puts them together."""

PROBE = """<script>addEventListener("load", async () => {
  const later = (ms) => new Promise((done) => setTimeout(done, ms));
  const times = () => clips.map((clip) => clip.currentTime);
  button.click(); await later(900);
  const playing = times(), label = button.textContent;
  place.value = "0.5"; place.dispatchEvent(new Event("input")); await later(300);
  button.click(); await later(100);
  const seen = (selector) => [...document.querySelectorAll(selector)].filter(
    (one) => one.getBoundingClientRect().height > 0).length;
  const shown = {
    figures: seen(".figures div"), masks: seen("svg.mask"), steps: seen("svg.steps rect"),
    dots: seen("svg.chart circle"),
    headings: [...document.querySelectorAll("h2")].map((h) => h.textContent),
  };
  const wide = document.documentElement.scrollWidth - innerWidth;
  document.body.textContent = "PROBE " + JSON.stringify(
    {playing, label, after: button.textContent, paused: clips.every((clip) => clip.paused), wide,
     shown});
});</script></body>"""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the path")


@pytest.fixture
def page(tmp_path: Path) -> str:
    iio = pytest.importorskip("imageio.v3", reason="needs the extra diffusers")
    video = np.zeros((24, 32, 32, 3), np.uint8)
    for variant in ("dense", "evdit"):
        (tmp_path / variant).mkdir()
        iio.imwrite(tmp_path / variant / "a cat.mp4", video, fps=12, codec="libx264")
    plan = Plan.load(DEMO)
    return plan_page(plan, load_clips(tmp_path), load_measurement(TILES, plan), SHARE)


def browse(page: str, folder: Path) -> tuple[str, list[str]]:
    """The document after five seconds of the page's own time, and what went to the console."""
    (folder / "page.html").write_text(page, encoding="utf-8")
    assert CHROMIUM is not None
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=500,900",
        "--autoplay-policy=no-user-gesture-required", "--enable-logging=stderr",
        f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=5000", "--dump-dom",
        (folder / "page.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_the_policy_lets_the_page_work(page: str, tmp_path: Path) -> None:
    document, console = browse(page, tmp_path)
    assert console == []
    assert document.count("<video") == 2


def test_a_script_that_is_not_the_page_s_own_is_not_run(page: str, tmp_path: Path) -> None:
    document, console = browse(page.replace("</body>", PROBE), tmp_path)
    assert "PROBE {" not in document
    assert any("Content Security Policy" in line for line in console)


def test_clips_play_together(page: str, tmp_path: Path) -> None:
    free = re.sub("<meta http-equiv[^>]*>", "", page).replace("</body>", PROBE)
    document, console = browse(free, tmp_path)
    assert console == []
    told = re.search(r"PROBE (\{.*\})", document)
    assert told is not None
    found = json.loads(told[1])
    assert found["label"] == "Pause"
    assert found["after"] == "Play"
    assert found["paused"]
    assert min(found["playing"]) > 0.5
    assert max(found["playing"]) - min(found["playing"]) <= APART
    assert found["wide"] <= 0, "the page is wider than its window"
    plan, shown = Plan.load(DEMO), found["shown"]
    assert shown["masks"] == 2 * len(plan.sites)  # of the plan, and of where attention goes
    assert shown["dots"] == len(plan.calibration.trials) > 0
    assert plan.reuse is not None
    assert shown["steps"] == len(plan.reuse.levels)
    assert shown["figures"] >= 6
    assert shown["headings"] == [
        "Clips", "Steps", "Layers", "Plans that were tried", "Upper bound", "Where attention goes",
        "Where it comes from", "Environment",
    ]  # fmt: skip
