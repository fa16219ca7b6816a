"""Where attention goes: against a dense softmax, and a layer out of line is noticed."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from evdit_opt import apply_plan, make_plan, restore
from evdit_opt.calibrate.figures import SiteFigures, site_figures
from evdit_opt.calibrate.measure import POSITIONS, measure_attention
from evdit_opt.calibrate.pattern import Pattern, PatternRecord
from evdit_opt.calibrate.site_record import SiteRecord
from evdit_opt.cli import app
from evdit_opt.commands.measure import repeats, table
from evdit_opt.config import Config
from evdit_opt.errors import AlreadyOptimizedError, CalibrationError
from evdit_opt.grid import TokenLayout, VideoGrid
from evdit_opt.models import config_hash
from tests.calibrate.killed import PROMPTS, Pipe
from tests.models import toy_dit
from tests.models.toy_dit import toy, toy_inputs, toy_rules

TOY = "tests.inspection.toys:good"


def measured(q: torch.Tensor, k: torch.Tensor, layout: TokenLayout) -> SiteFigures:
    """What a recording of one call says; frames are small enough for every query to be sampled."""
    record = SiteRecord(layout, (), positions=POSITIONS)
    record.add(q, k, torch.randn_like(k))
    pattern = PatternRecord(layout)
    pattern.add(q, k)
    return site_figures({"site": record.mass()}, {"site": pattern.pattern()}, {"site": layout})[0]


@st.composite
def calls(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, TokenLayout]:
    grid = VideoGrid(draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    layout = TokenLayout(grid, draw(st.sampled_from([0, 3])), draw(st.sampled_from([0, 2])))
    torch.manual_seed(draw(st.integers(0, 99)))
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 3)), layout.seq_len, 8)
    return *(draw(st.sampled_from([0.3, 3.0])) * torch.randn(2, *shape)).unbind(), layout


@given(calls())
@settings(max_examples=60, deadline=None)
def test_figures_are_those_of_a_dense_softmax(case: Any) -> None:
    q, k, layout = case
    frames, found = layout.grid.frames, measured(*case)
    weights = (q.double() @ k.double().transpose(2, 3) * 8**-0.5).softmax(-1)
    frame_of = torch.full((layout.seq_len,), -1)
    for frame in range(frames):
        frame_of[layout.frame_slice(frame)] = frame
    video = frame_of >= 0
    for head, own in enumerate(found.heads):
        rows = weights[:, head][:, video]
        away = (frame_of[video][:, None] - frame_of[None, :]).abs()
        for distance, share in enumerate(own.by_distance):
            near = (away == distance) & video[None, :]
            right = float((rows * near).sum(-1).mean())
            assert share == pytest.approx(right, rel=1e-4, abs=1e-6)  # sums in float32
        assert own.text == pytest.approx(float(rows[..., ~video].sum(-1).mean()), abs=1e-6)
        assert own.in_frame == own.by_distance[0]
    for figures in (found, *found.heads):
        assert sum(figures.by_distance) + figures.text == pytest.approx(1.0, abs=1e-5)
    for i, row in enumerate(found.tiles):
        tile = weights[:, :, layout.frame_slice(i)]
        for j, share in enumerate(row):
            right = float(tile[..., layout.frame_slice(j)].sum(-1).mean())
            assert share == pytest.approx(right, rel=1e-4, abs=1e-6)


def test_indifferent_queries_are_even() -> None:
    layout = TokenLayout(VideoGrid(4, 2, 3), suffix=5)
    shape = (1, 2, layout.seq_len, 8)
    found = measured(torch.zeros(shape), torch.randn(shape), layout)
    assert found.even == 6 / 29
    assert found.in_frame == pytest.approx(found.even, rel=1e-5)
    assert found.text == pytest.approx(5 / 29, rel=1e-5)


def with_own_frame(share: float, frames: int = 5) -> torch.Tensor:
    """Mass ``[2, frames, frames]`` with a share on the diagonal."""
    rest = (1 - share) / (frames - 1)
    return (torch.full((frames, frames), rest) + torch.eye(frames) * (share - rest)).expand(2, 5, 5)


@pytest.mark.parametrize(
    ("shares", "breaking"),
    [
        ([0.7, 0.72, 0.69, 0.71, 0.2, 0.7], [4]),
        ([0.7, 0.72, 0.69, 0.71, 0.66, 0.7], []),
        ([0.5, 0.5, 0.5, 0.51], []),
        ([0.1, 0.3, 0.5, 0.7, 0.9], []),
        ([0.9, 0.3, 0.3, 0.31, 0.1], [0, 4]),
        ([0.4], []),
    ],
    ids=["one low", "all near", "nearly equal", "all over", "both sides", "alone"],
)
def test_a_layer_out_of_line_is_noticed(shares: list[float], breaking: list[int]) -> None:
    layout = TokenLayout(VideoGrid(5, 1, 1))
    mass = {str(n): with_own_frame(share) for n, share in enumerate(shares)}
    found = site_figures(mass, dict.fromkeys(mass, repeating()), dict.fromkeys(mass, layout))
    assert [n for n, site in enumerate(found) if site.breaks == ("own frame",)] == breaking
    assert sum(len(site.breaks) for site in found) == len(breaking)


def repeating(similarity: float = 0.9, caught: float | None = None) -> Pattern:
    """What two heads found; ``caught`` by the 90% set of another prompt."""
    sets = {} if caught is None else {"prompts": torch.full((2, 3), caught)}
    return Pattern(torch.full((2,), similarity), torch.full((2, 3), 0.1), sets, sets)


def test_a_layer_that_repeats_less_than_others_is_noticed() -> None:
    layout = TokenLayout(VideoGrid(5, 1, 1))
    patterns = {"0": repeating(0.9, 0.8), "1": repeating(0.2, 0.81), "2": repeating(0.91, 0.3)}
    patterns |= {"3": repeating(0.9, 0.8), "4": repeating(0.9, 0.8)}
    mass = dict.fromkeys(patterns, with_own_frame(0.5))
    found = site_figures(mass, patterns, dict.fromkeys(patterns, layout))
    assert [site.breaks for site in found] == [(), ("similarity",), ("prompts",), (), ()]


def test_a_model_with_a_plan_is_refused() -> None:
    model: Any = toy()
    plan = replace(toy_dit.make_plan(model, toy_rules()), model_config_hash=config_hash(model))
    apply_plan(model, plan, inner="eager")
    with pytest.raises(AlreadyOptimizedError, match="has a plan applied"):
        measure_attention(model, [toy_inputs()])
    restore(model)


def other_inputs() -> dict[str, Any]:
    return {name: -value for name, value in toy_inputs().items()}


def test_a_whole_model_and_its_tables() -> None:
    found = measure_attention(toy(2), [toy_inputs(), other_inputs()], Config(progress=False))
    torch._dynamo.reset()
    assert [site.name for site in found.sites] == ["blocks.0.attn1", "blocks.1.attn1"]
    assert (found.prompts, found.steps) == (2, 1)
    first = found.sites[0]
    shown = table(found)
    assert [c.header for c in shown.columns] == ["layer", "own", "heads", "even", "+-1", "text"]
    held = first.sets[0]
    assert held.prompts is not None
    assert (held.timesteps, held.branches) == (None, None)
    console = Console(width=80)
    with console.capture() as printed:
        console.print(shown)
        console.print(repeats(found))
    assert f"blocks.0.attn1   {first.in_frame:.3f}" in printed.get()  # fits
    row = f"{first.similarity:.3f}   {held.keys:.3f}   {held.prompts.caught:.2f}"
    assert row in printed.get()


def test_the_same_call_twice_repeats_itself() -> None:
    found = measure_attention(toy(1), [toy_inputs(), toy_inputs()], Config(progress=False))
    torch._dynamo.reset()
    for held in found.sites[0].sets:
        assert held.prompts is not None
        assert held.prompts.iou == 1.0
        assert held.share - 1e-6 <= held.prompts.caught <= 1.0 + 1e-6


def test_the_command_writes_a_table_json_and_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra diffusers")
    result = CliRunner().invoke(app, ["measure", TOY, "--out", str(tmp_path / "new"), "--json"])
    torch._dynamo.reset()
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told == json.loads((tmp_path / "new/measure.json").read_text())
    assert told["sites"][0]["name"] == "blocks.0.attn1"
    assert (tmp_path / "new/measure.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "new").iterdir())) == 2


def test_an_interrupted_measurement_goes_on(tmp_path: Path, monkeypatch) -> None:
    config = Config(calib_steps=2, progress=False)
    straight = measure_attention(Pipe(tmp_path / "straight"), PROMPTS[:3], config)
    pipe, end_run, runs = Pipe(tmp_path / "runs"), PatternRecord.end_run, itertools.count()

    def interrupted(record: PatternRecord) -> None:
        if next(runs) == 1:
            raise KeyboardInterrupt
        end_run(record)

    monkeypatch.setattr(PatternRecord, "end_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure_attention(pipe, PROMPTS[:3], config, keep_in=tmp_path / "kept")
    monkeypatch.undo()
    assert measure_attention(pipe, PROMPTS[:3], config, keep_in=tmp_path / "kept") == straight
    assert (tmp_path / "runs").read_text().count("run") == 4  # the interrupted one was lost
    with pytest.raises(CalibrationError, match="differs in: recording"):
        make_plan(pipe, PROMPTS[:3], config, keep_in=tmp_path / "kept")


def test_what_is_unfinished_is_not_lost_by_forgetting_resume(tmp_path: Path) -> None:
    (tmp_path / "unfinished").mkdir()
    result = CliRunner().invoke(app, ["measure", TOY, "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "go on with it by --resume" in result.stderr
    assert CliRunner().invoke(app, ["measure", TOY, "--resume"]).exit_code == 2


def test_prompts_that_nothing_would_look_at_are_refused() -> None:
    result = CliRunner().invoke(app, ["measure", TOY, "--prompt", "a cat"])
    assert result.exit_code == 1
    assert "comes with calls of its own" in result.stderr


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(app, ["measure", TOY, "--out", str(tmp_path / "file")])
    assert result.exit_code == 1
    assert "expected a folder to write to" in result.stderr
