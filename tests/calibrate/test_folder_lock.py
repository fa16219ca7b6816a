"""Two processes never write to one unfinished calibration."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from evdit_opt.calibrate.folder_lock import LOCK, lock_folder, unlock_folder
from evdit_opt.calibrate.kept import Kept, remove_kept
from evdit_opt.errors import CalibrationError

pytest.importorskip("fcntl")
FOR = {"model": "a"}
HOLD = """
import sys
from pathlib import Path
from evdit_opt.calibrate.kept import Kept
Kept(Path(sys.argv[1]), {"model": "a"}).save("first", {})
print("saved", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path: Path):
    """Another process that has kept a run."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "runs")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "saved\n"
    yield process
    process.kill()
    process.communicate()


def test_a_folder_in_use_is_refused_until_its_process_is_killed(tmp_path: Path, other) -> None:
    with pytest.raises(CalibrationError, match=f"process {other.pid} is at work there"):
        Kept(tmp_path / "runs", FOR)
    other.kill()
    other.wait()
    kept = Kept(tmp_path / "runs", FOR)
    assert kept.load("first") is not None
    kept.save("second", {})


def test_who_began_before_the_folder_was_there_is_refused_too(tmp_path: Path, request) -> None:
    early = Kept(tmp_path / "runs", FOR)
    request.getfixturevalue("other")
    with pytest.raises(CalibrationError, match="is at work there"):
        early.save("mine", {"result": torch.ones(1)})
    assert not (tmp_path / "runs/mine.safetensors").exists()


def test_a_process_does_not_lock_itself_out(tmp_path: Path) -> None:
    first = Kept(tmp_path / "runs", FOR)
    first.save("one", {})
    second = Kept(tmp_path / "runs", FOR)
    second.save("two", {})
    remove_kept(tmp_path / "runs")
    first.save("three", {})  # anew, and locked anew
    assert (tmp_path / "runs" / LOCK).read_text() == f"process {os.getpid()}"
    unlock_folder(tmp_path / "runs")
    unlock_folder(tmp_path / "runs")


def test_something_else_is_not_locked(tmp_path: Path) -> None:
    (tmp_path / "notes.safetensors").write_bytes(b"")
    with pytest.raises(CalibrationError, match="found something else"):
        Kept(tmp_path, FOR)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.safetensors"]
    lock_folder(tmp_path)
    unlock_folder(tmp_path)
