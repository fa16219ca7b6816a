"""An unfinished calibration: killed at any moment it goes on, and only where it is the same one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from evdit_opt.calibrate.kept import PURPOSE, SEARCHED, Kept, purpose, remove_kept
from evdit_opt.calibrate.site_record import SiteRecord
from evdit_opt.config import Config
from evdit_opt.errors import CalibrationError
from evdit_opt.grid import TokenLayout, VideoGrid
from evdit_opt.masks import CACHED, Rule
from evdit_opt.models import as_denoiser
from tests.models.toy_dit import toy, toy_inputs

MADE_FOR = {"model": "a"}


def never() -> torch.Tensor:
    raise AssertionError("was run again")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_killed_at_any_moment_it_goes_on_to_the_same_plan(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.calibrate.killed", str(tmp_path)],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    told = json.loads(done.stdout)
    straight, killed = told["straight"], told["killed"]
    assert straight["exits"] == [0]
    assert straight["left"] == ["plan.json", "runs"]
    kills = len(killed["exits"]) - 1
    assert kills == 6
    assert killed["exits"] == [-9] * kills + [0], done.stderr
    assert killed["plan"] == straight["plan"]
    assert straight["runs"] <= killed["runs"] <= straight["runs"] + kills
    junk = [name for name in killed["left"] if name not in ("plan.json", "runs")]
    assert all(name.startswith(".plan.json.") for name in junk)  # of the save that was killed


def test_what_is_kept_is_not_run_again(tmp_path: Path) -> None:
    video = torch.rand(2, 3)
    for kept in (Kept(tmp_path / "new", MADE_FOR), Kept(tmp_path / "new", MADE_FOR)):
        assert torch.equal(kept.run("first", lambda: video), video)
    assert torch.equal(Kept(tmp_path / "new", MADE_FOR).run("first", never), video)
    with pytest.raises(AssertionError, match="run again"):
        Kept(tmp_path / "new", MADE_FOR).run("second", never)
    with pytest.raises(AssertionError, match="run again"):
        Kept().run("first", never)
    remove_kept(tmp_path / "new")
    remove_kept(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Kept(tmp_path / "new", MADE_FOR)
    kept.run("first", lambda: torch.ones(2))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CalibrationError, match="No space left on device; what is there already"):
        kept.run("second", lambda: torch.ones(2))
    monkeypatch.undo()
    assert torch.equal(Kept(tmp_path / "new", MADE_FOR).run("first", never), torch.ones(2))


def test_nothing_is_made_before_a_run_is_finished(tmp_path: Path) -> None:
    assert Kept(tmp_path / "new", MADE_FOR).load("first") is None
    assert list(tmp_path.iterdir()) == []


def test_another_calibration_is_not_taken_up(tmp_path: Path) -> None:
    Kept(tmp_path / "new", MADE_FOR).save("first", {})
    with pytest.raises(CalibrationError, match="differs in: model, prompts"):
        Kept(tmp_path / "new", {"model": "b", "prompts": "c"})
    (tmp_path / "new" / PURPOSE).unlink()
    with pytest.raises(CalibrationError, match="found something else"):
        Kept(tmp_path / "new", MADE_FOR)
    (tmp_path / "new" / PURPOSE).write_text("{")
    with pytest.raises(CalibrationError, match="found something else"):
        Kept(tmp_path / "new", MADE_FOR)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff" * 64], ids=["empty", "short", "noise"])
def test_a_damaged_file_is_said(tmp_path: Path, content: bytes) -> None:
    kept = Kept(tmp_path / "new", MADE_FOR)
    kept.save("first", {"result": torch.ones(2)})
    (tmp_path / "new/first.safetensors").write_bytes(content)
    with pytest.raises(CalibrationError, match="cannot be read"):
        kept.run("first", never)


def test_a_purpose_is_model_prompts_and_what_runs_depend_on() -> None:
    model: Any = toy(1)

    def of(config: Config | None = None, model: nn.Module = model, calls: int = 1) -> Any:
        items = [toy_inputs() for _ in range(calls)]
        return purpose(model, as_denoiser(model, items), config or Config())

    def differing(other: dict[str, str]) -> list[str]:
        return [name for name, value in of().items() if other[name] != value]

    assert differing(of()) == []
    assert differing(of(Config(density=0.3, min_psnr=20.0, progress=False))) == []
    assert differing(of(Config(seed=1))) == ["settings"]
    assert differing(of(Config(pipe_kwargs={"embeds": torch.ones(2)}))) == ["settings"]
    pictures = [of(Config(pipe_kwargs={"image": Image.new("RGB", (2, 2), n)})) for n in (0, 0, 9)]
    assert pictures[0] == pictures[1]  # not by where in memory it is
    assert pictures[1] != pictures[2]
    assert differing(of(calls=2)) == ["prompts"]
    assert "model configuration" in differing(of(model=toy(2)))
    trained = toy(1)
    with torch.no_grad():
        trained.blocks[0].attn1.q.weight.add_(1e-3)
    assert differing(of(model=trained)) == ["weights"]
    assert differing(of(model=toy(1).bfloat16())) == ["weights"]


def test_only_settings_are_left_out_of_it() -> None:
    assert set(Config.__dataclass_fields__) > SEARCHED


def test_a_record_goes_on_bit_for_bit() -> None:
    layout = TokenLayout(VideoGrid(5, 4, 6), suffix=3)

    def new() -> SiteRecord:
        rules = (Rule(1), Rule(2), Rule(2, weighting="fitted", strength=0.5))
        return SiteRecord(layout, rules, (CACHED, Rule(0)), seed=3, for_heads=(Rule(0),))

    def play(record: SiteRecord, prompt: int) -> None:
        torch.manual_seed(prompt)
        for step in range(3):
            record.add(*torch.randn(3, 1, 2, layout.seq_len, 8), generation=0, step=step)
        record.end_run()

    straight, resumed = new(), new()
    for prompt in range(3):
        play(straight, prompt)
    for prompt in range(3):
        state = {name: value.clone() for name, value in resumed.state().items()}
        resumed = new()
        resumed.load_state(state)
        play(resumed, prompt)
    assert resumed.errors() == straight.errors()
    assert torch.equal(resumed.mass(), straight.mass())
    heads = [record.head_errors() for record in (resumed, straight)]
    assert torch.equal(heads[0].squares, heads[1].squares)
    pairs = list(zip(resumed.reuse_errors(), straight.reuse_errors(), strict=True))
    assert len(pairs) == 2
    for a, b in pairs:
        assert (a.rule, a.density) == (b.rule, b.density)
        assert torch.equal(a.output, b.output)
        assert torch.equal(a.temporal, b.temporal)
        assert torch.equal(a.scales, b.scales)
