"""kill -9 at random moments, while encoding, training and writing: nothing is lost or changed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
@pytest.mark.parametrize("kills", [5, pytest.param(20, marks=pytest.mark.nightly)])
def test_a_killed_run_ends_as_the_uninterrupted_one(tmp_path: Path, kills: int) -> None:
    """At the clock's whim and, in turn, with half a checkpoint or log line written, and so on."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.distill.killed", str(tmp_path), str(kills), "0"],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    told = json.loads(done.stdout)
    assert set(told["exits"]) <= {0, -signal.SIGKILL}, done.stderr
    assert len(told["hit"]) == kills == told["exits"].count(-signal.SIGKILL)
    assert told["same"] == [True] * len(told["same"])
    assert told["same"]
    assert told["left"] == []  # what a kill left half written is overwritten in time
