"""The evdit command: help a newcomer understands, errors in one line."""

import json

import pytest
import torch
from typer.testing import CliRunner

from evdit_opt.cli import app
from evdit_opt.export.command import Written


@pytest.fixture
def evdit() -> CliRunner:
    return CliRunner()


def test_help_names_every_command_and_where_to_start(evdit):
    result = evdit.invoke(app, ["--help"])
    assert result.exit_code == 0
    for word in ("demo", "inspect", "calibrate", "plan", "export", "Start with"):
        assert word in result.output


def test_no_command_is_help(evdit):
    assert "Usage" in evdit.invoke(app, []).output


def test_inspecting_what_is_no_pipeline_says_so(evdit, tmp_path):
    result = evdit.invoke(app, ["inspect", str(tmp_path)])
    assert result.exit_code == 1
    assert "UnsupportedInputError" in result.stderr


@pytest.mark.nightly
def test_inspect_prints_sites_breaks_and_the_bound(evdit):
    result = evdit.invoke(app, ["inspect", "tests.inspection.toys:good"])
    torch._dynamo.reset()
    assert result.exit_code == 0, result.stderr
    for words in ("blocks.0.attn1", "cross-attention", "one graph", "x faster"):
        assert words in result.stdout
    assert "loading a toy" not in result.stdout


def test_inspect_json_is_all_there_is_on_stdout(evdit):
    result = evdit.invoke(app, ["inspect", "tests.inspection.toys:good", "--json", "--no-timing"])
    torch._dynamo.reset()
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["target"] == "tests.inspection.toys:good"
    assert told["attention"] is None


def test_json_of_the_commands_that_write(evdit, tmp_path, monkeypatch):
    def demo(folder, **options):
        options["console"].print("a story")
        return {"clips": options["clips"]}

    def export(_name, _plan, out, **_):
        out.write_bytes(b"12345")
        return Written((out,), "written")

    monkeypatch.setattr("evdit_opt.demo.run.run_demo", demo)
    monkeypatch.setattr("evdit_opt.export.command.export_named", export)
    result = evdit.invoke(app, ["demo", "--clips", "3", "--json"])
    assert json.loads(result.stdout) == {"clips": 3}
    assert "a story" in result.stderr
    out = str(tmp_path / "x.onnx")
    result = evdit.invoke(app, ["export", "onnx", "m", "--plan", "p", "--out", out, "--json"])
    told = {"out": out, "files": [out], "bytes": 5, "written": "written"}
    assert json.loads(result.stdout) == told


def test_an_interruption_is_exit_code_130(evdit, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("evdit_opt.demo.run.run_demo", interrupted)
    assert evdit.invoke(app, ["demo"]).exit_code == 130


@pytest.mark.parametrize(
    "arguments",
    [["inspect"], ["inspect", "tinywan", "--frames", "0"], ["inspect", "tinywan", "--dtype", "x"]],
    ids=["nothing to inspect", "no frames", "no such precision"],
)
def test_wrong_usage_is_exit_code_2(evdit, arguments):
    assert evdit.invoke(app, arguments).exit_code == 2
