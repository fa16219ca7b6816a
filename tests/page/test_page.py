"""A plan's page: all of the plan, well-formed, alone, and harmless whatever the plan says."""

import base64
import hashlib
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from evdit_opt.cli import app
from evdit_opt.errors import UnsupportedInputError
from evdit_opt.grid import VideoGrid
from evdit_opt.masks import CACHED, MAX_FRAMES, Rule
from evdit_opt.page import Clip, load_clips, plan_page
from evdit_opt.page.drawings import MAX_MASKS
from evdit_opt.page.html import VOID
from evdit_opt.plan import Plan, SiteLayout, SitePlan, TrialRecord
from tests.plans import PLAN, plans

DEMO = Path(__file__).parents[2] / "docs/demo/plan.evdit.json"
MP4 = b"\0\0\0\x18ftypmp42" + bytes(16)
CLIPS = (Clip("a cat", "dense", "data:video/mp4;base64,AA"), Clip("a cat", "evdit", "data:,"))
LOADING = {"src", "href", "srcset", "data", "action", "formaction", "poster", "background"}


class Page(HTMLParser):
    """Reads a page; every element must be closed, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], "left open"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def loads(self) -> list[str]:
        return [value or "" for name, value in self.attributes if name in LOADING]


def text_of(page: Page) -> str:
    return "\n".join(page.texts)


def test_everything_of_a_plan_is_there() -> None:
    plan = Plan.load(DEMO)
    page = Page(plan_page(plan))
    told = text_of(page)
    for site in plan.sites:
        assert page.texts.count(site.name) == 1
        assert site.reason in told
    for word in (plan.model_class, plan.fingerprint(), plan.calibration.prompts_hash):
        assert word in told
    for trial in plan.calibration.trials:
        assert trial.name in told
    for package, version in plan.versions:
        assert package in told
        assert version in told
    assert plan.quality is not None
    assert plan.speed is not None
    assert f"{plan.quality.psnr.mean:.1f} dB" in told
    assert f"{plan.speed.speedup:.2f}x" in told
    called = replace(plan.calibration, call=(("guidance_scale", "2.5"),))
    predicted = replace(plan.speed, optimized_ms=plan.speed.dense_ms / 7)
    newer = Page(plan_page(replace(plan, predicted=predicted, calibration=called)))
    assert {"predicted speed", "7.00x", "guidance_scale 2.5"} <= set(newer.texts)
    assert plan.reuse is not None
    assert page.tags.count("video") == 0
    assert page.tags.count("script") == 0


def test_a_box_for_every_step_says_its_mode() -> None:
    plan = Plan.load(DEMO)
    assert plan.reuse is not None
    told = plan_page(plan)
    for mode in ("dense", "refresh", "reuse"):
        wanted = plan.reuse.modes(plan.reuse.levels).count(mode)
        assert told.count(f'class="step-{mode}"') == wanted
    assert "renewed at noise levels 1000, 800.5, 20" in plan_page(PLAN)  # steps not known
    assert "<h2>Steps" not in plan_page(replace(PLAN, reuse=None))


def test_nothing_is_loaded_from_anywhere() -> None:
    text = plan_page(Plan.load(DEMO), CLIPS)
    page = Page(text)
    assert all(value.startswith(("#", "data:")) for value in page.loads)
    assert not re.search(r"https?:|url\(|@import|//\w+\.", text.replace("// ", ""))
    assert any((value or "").startswith("default-src 'none'") for _, value in page.attributes)


def test_the_policy_allows_this_style_and_this_script_only() -> None:
    text = plan_page(PLAN, CLIPS)
    for kind in ("style", "script"):
        [content] = re.findall(f"<{kind}>(.*?)</{kind}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind}-src &#x27;sha256-{digest}&#x27;" in text
    assert "style=" not in text  # the policy would ignore it


def drawn(rule: Rule | None, frames: int = 8) -> list[list[bool]]:
    """Which tiles a picture colours."""
    density = 1.0 if rule is None else 0.5
    site = SitePlan(
        name="a", rule=rule, reason="r", layout=SiteLayout(), density=density, errors=()
    )
    reuse = replace(PLAN.reuse, sites=("a",)) if rule == CACHED and PLAN.reuse else None
    plan = replace(PLAN, sites=(site,), reuse=reuse, grid=VideoGrid(frames, 2, 2))
    [symbol] = re.findall("<symbol.*?</symbol>", plan_page(plan))
    found = [[False] * frames for _ in range(frames)]
    for start, row, width in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\3z", symbol):
        for column in range(int(start), int(start) + int(width)):
            found[int(row)][column] = True
    return found


@pytest.mark.parametrize(
    "rule",
    [Rule(2), Rule(2, weighting="balanced"), Rule(0, 1), Rule(3, 2, spacing="centred")],
    ids=lambda rule: rule.describe(),
)
def test_pictures_are_the_masks(rule: Rule) -> None:
    assert drawn(rule) == (rule.mask(8).bias > float("-inf")).tolist()


def test_pictures_of_dense_and_cached_layers() -> None:
    assert all(map(all, drawn(None)))
    assert not any(map(any, drawn(CACHED)))


HOSTILE = ("<script>alert(1)</script>", "\"><img src=x onerror='alert(1)'>", "</td></table>&lt;")
hostile = st.sampled_from(HOSTILE) | st.text(
    st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=40
)


@given(plans, hostile, hostile)
@settings(max_examples=60, deadline=None)
def test_hostile_names_stay_text(plan: Plan, one: str, other: str) -> None:
    first = replace(plan.sites[0], name=one, reason=other)
    trials = (TrialRecord(name=other, density=0.5, output=0.1, temporal=0.1),)
    bad = replace(
        plan,
        model_class=one,
        sites=(first, *(site for site in plan.sites[1:] if site.name != one)),
        calibration=replace(plan.calibration, trials=trials, prompts_hash=other),
        versions=((one, other),),
        reuse=None,
    )
    tame = replace(
        bad,
        model_class="m",
        sites=(replace(first, name="m" * 200, reason="r"), *bad.sites[1:]),
        calibration=replace(bad.calibration, trials=(replace(trials[0], name="t"),)),
        versions=(("p", "v"),),
    )
    clips = [Clip(one, other, "data:video/mp4;base64,AA")]
    page, plain = Page(plan_page(bad, clips)), Page(plan_page(tame, [Clip("n", "v", "data:,")]))
    assert page.tags == plain.tags  # no name made an element
    assert [name for name, _ in page.attributes] == [name for name, _ in plain.attributes]
    assert one in page.texts
    assert other in page.texts


def test_the_largest_plan_of_a_stranger_is_drawn_within_bounds() -> None:
    rules = [Rule(n + 1, window=n, weighting="balanced") for n in range(2 * MAX_MASKS)]
    sites = tuple(replace(PLAN.sites[0], name=str(n), rule=rule) for n, rule in enumerate(rules))
    large = replace(PLAN, sites=sites, grid=VideoGrid(MAX_FRAMES, 1, 1), reuse=None)
    text = plan_page(large)
    assert text.count("<symbol") == MAX_MASKS
    assert "drawn at 128 of 4096" in text
    assert len(text) < 10 * 2**20
    assert text.count("too many to draw") == MAX_MASKS


def test_clips_of_one_name_stand_together(tmp_path: Path) -> None:
    for name in ("sparse/b.mp4", "dense/b.mp4", "alone.mp4", "sparse/a.mp4", "dense/a.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(MP4)
    clips = load_clips(tmp_path)
    assert [(clip.name, clip.variant) for clip in clips] == [
        ("a", "dense"), ("a", "sparse"), ("alone", ""), ("b", "dense"), ("b", "sparse"),
    ]  # fmt: skip
    page = Page(plan_page(PLAN, clips))
    assert page.tags.count("video") == 5
    assert page.loads.count("data:video/mp4;base64," + base64.b64encode(MP4).decode()) == 5


def test_what_is_no_clip_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedInputError, match="found none"):
        load_clips(tmp_path)
    (tmp_path / "a.mp4").write_text("not a video")
    with pytest.raises(UnsupportedInputError, match="to be an mp4 file"):
        load_clips(tmp_path)
    monkeypatch.setattr("evdit_opt.page.clips.MAX_BYTES", 4)
    with pytest.raises(UnsupportedInputError, match="give fewer or smaller"):
        load_clips(tmp_path)


def full_disk(_: int) -> None:
    raise OSError(28, "No space left on device")


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "plan.html"
    result = CliRunner().invoke(app, ["report", str(DEMO), "--out", str(out), "--json"])
    assert result.exit_code == 0, result.output
    assert f'"bytes": {out.stat().st_size}' in result.stdout
    assert out.read_text(encoding="utf-8") == plan_page(Plan.load(DEMO))
    before = out.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full_disk)
        result = CliRunner().invoke(app, ["report", str(DEMO), "--out", str(out)])
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr
    assert (out.read_bytes(), list(tmp_path.iterdir())) == (before, [out])
    result = CliRunner().invoke(app, ["report", str(tmp_path / "no.json"), "--out", str(out)])
    assert result.exit_code == 1
    assert "PlanNotFoundError" in result.stderr
