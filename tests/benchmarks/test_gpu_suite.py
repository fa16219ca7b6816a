"""The GPU suite runs, on a CPU and tiny shapes: it must not be broken when a GPU is at hand."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pytest
import torch

from benchmarks import contenders, gpu_suite
from benchmarks.sampled_error import sample_rows, sampled_errors
from benchmarks.shapes import MODELS, SMALL, TINY
from evdit_opt.kernels import tile_attention
from evdit_opt.masks import Rule
from tests.kernels.oracle import oracle

ROOT = Path(__file__).parents[2]
DRY = ["--device", "cpu", "--tiny", "--rounds", "1"]
PARTS = [part for part in gpu_suite.PARTS if part != "tests"]


def run(output: Path, *more: str, parts: Sequence[str] = PARTS) -> gpu_suite.Rows:
    chosen = [argument for part in parts for argument in ("--part", part)]
    return gpu_suite.main([*DRY, *chosen, "--output", str(output), *more])


def test_every_part_runs_and_finished_rows_are_kept(tmp_path: Path) -> None:
    output = tmp_path / "rows.json"
    rows = run(output)
    expected = [f"{kind}/{shape.name}/{name}" for kind in ("forward", "backward")
                for shape in TINY for name in shape.masks()]  # fmt: skip
    sweeps = [f"sweep/tiny/{kernel}" for kernel in ("forward", "grad_q", "grad_kv")]
    assert rows.names() == [*expected, "step", *sweeps]
    assert all(len(rows[name]["ms"]) == 2 and not rows[name]["cannot"] for name in sweeps)
    for name in expected:
        row = rows[name]
        assert row["fastest_dense"] == "dense"
        assert not row["cannot"]
        own, dense = row["results"]["decomposed"], row["results"]["dense"]
        assert own["of_ideal"] == pytest.approx(dense["ms"] / own["ms"] * row["density"])
        for errors in (row["errors"]["decomposed"], row["errors"]["triton"]):
            assert set(errors) == {"out"} | (
                {"grad_q", "grad_k", "grad_v"} if name.startswith("backward") else set()
            )
            assert max(errors.values()) < 1e-5  # float32
    assert rows["step"]["sites"] == 2
    written = output.read_text()
    with mock.patch.object(gpu_suite, "interleaved", side_effect=AssertionError("measured again")):
        again = run(output)
    assert again.names() == rows.names()
    assert output.read_text() == written


def test_without_time_nothing_is_begun(tmp_path: Path) -> None:
    assert run(tmp_path / "rows.json", "--budget-seconds", "0").names() == []


def test_an_interrupted_run_leaves_whole_rows(tmp_path: Path) -> None:
    output = tmp_path / "rows.json"
    calls = 0

    def stop(*arguments: object, **options: object) -> dict[str, list[float]]:
        nonlocal calls
        calls += 1
        if calls > 2:  # in the second shape
            raise KeyboardInterrupt
        return measure(*arguments, **options)  # type: ignore[arg-type]

    measure = gpu_suite.interleaved
    with mock.patch.object(gpu_suite, "interleaved", stop), pytest.raises(KeyboardInterrupt):
        run(output, parts=["forward"])
    first = list(json.loads(output.read_text())["rows"])
    assert first == [f"forward/tiny/{name}" for name in TINY[0].masks()]
    assert run(output, parts=["forward"]).names()[: len(first) + 1] == [
        *first, "forward/tiny without text/1:3",
    ]  # fmt: skip


def test_what_fails_costs_nothing_else(tmp_path: Path) -> None:
    from triton.errors import TritonError

    from evdit_opt.kernels import triton_forward

    output = tmp_path / "rows.json"
    broken = mock.patch.object(triton_forward, "forward", side_effect=TritonError("too large"))
    failed = r"sweep/tiny/forward.*forward/tiny/1:4 triton"
    with broken, pytest.raises(SystemExit, match=failed):
        run(output, parts=["sweep", "forward"])
    rows = json.loads(output.read_text())["rows"]
    assert list(rows) == [
        f"forward/{shape.name}/{name}" for shape in TINY for name in shape.masks()
    ]
    first = rows["forward/tiny/1:4"]
    assert set(first["results"]) == {"dense", "decomposed"}
    assert set(first["errors"]) == {"decomposed"}
    assert first["cannot"] == {"1:4 triton": "TritonError: too large"}


def test_tests_that_take_too_long_are_run_again(tmp_path: Path) -> None:
    late = subprocess.TimeoutExpired([], 1.0, output=b"....F")
    with mock.patch.object(subprocess, "run", side_effect=late), pytest.raises(SystemExit):
        gpu_suite.main([*DRY, "--part", "tests", "--commit", "abc", "--part", "memory",
                        "--output", str(tmp_path / "rows.json")])  # fmt: skip
    assert not (tmp_path / "rows.json").exists()


def test_the_part_that_runs_the_tests(tmp_path: Path) -> None:
    done = subprocess.CompletedProcess([], 1, stdout="1 failed", stderr="")
    with mock.patch.object(subprocess, "run", return_value=done) as call:
        rows = gpu_suite.main([*DRY, "--part", "tests", "--commit", "abc",
                               "--output", str(tmp_path / "rows.json")])  # fmt: skip
    assert call.call_args.args[0][:3] == [sys.executable, "-m", "pytest"]
    assert rows["tests"]["exit_code"] == 1
    assert rows["tests"]["commit"] == "abc"


def test_nothing_is_needed_that_the_package_does_not_need() -> None:
    code = "import sys; sys.modules['diffusers'] = None; import benchmarks.gpu_suite"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_nine_masks_of_the_paper_are_there() -> None:
    names = [name for shape in MODELS[:2] for name in shape.masks()]
    paper = {"4:4", "3:5", "2:6", "1:7", "12:12", "8:16", "6:18", "4:20", "3:21"}
    assert paper <= set(names)
    assert any("window" in name for name in names)
    assert any("balanced" in name for name in names)
    assert [shape.layout.seq_len for shape in MODELS] == [
        86_400, 28_800, 32_760, 119_056, 75_600, 17_776
    ]  # fmt: skip


def test_sampled_errors_are_errors_against_float64() -> None:
    shape = TINY[0]
    mask, layout = Rule(2, 1, "balanced").mask(shape.frames), shape.layout
    inputs = contenders.make_inputs(shape, torch.float64, "cpu")
    leaves = [x.requires_grad_() for x in inputs]
    out, lse = tile_attention(*leaves, mask, layout, return_lse=True)
    grad = torch.randn_like(out)
    grads = torch.autograd.grad(out, leaves, grad)
    arguments = [x.detach() for x in inputs]
    everything = layout.seq_len
    errors = sampled_errors(
        *arguments, mask, layout, out.detach(), grads, grad, lse, count=everything
    )
    assert set(errors) == {"out", "grad_q", "grad_k", "grad_v"}
    assert max(errors.values()) < 1e-12
    wrong = out.detach().clone()
    wrong[0, 1, 17, 3] += 0.5
    exact, _ = oracle(*arguments, mask, layout)
    found = sampled_errors(*arguments, mask, layout, wrong, count=everything)["out"]
    assert found == pytest.approx((wrong - exact).abs().max().item())
    bad = (grads[0], grads[1] + 1.0, grads[2])
    found = sampled_errors(*arguments, mask, layout, out.detach(), bad, grad, lse)["grad_k"]
    assert found == pytest.approx(1.0)


def test_sampled_rows_cover_the_ends() -> None:
    layout = MODELS[3].layout
    rows = sample_rows(layout, 32)
    assert len(rows) == 32
    assert {0, layout.seq_len - 1, layout.grid.tokens - 1, 3600} <= set(rows)


def test_small_shapes_are_small() -> None:
    assert max(shape.layout.seq_len for shape in SMALL) <= 1024
