"""Launches: what is refused, and what several processes do together."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from evdit_opt.distill.checkpoint import load_state
from evdit_opt.distill.loop import TrainingConfig, train
from evdit_opt.errors import DistillationError


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ACCELERATE_USE_FSDP", "true", "without FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "without DEEPSPEED"),
        (
            "ACCELERATE_MIXED_PRECISION",
            "fp16",
            "with mixed_precision no, got fp16; set bf16: true, or fp16",
        ),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "with mixed_precision no, got bf16"),
    ],
)
def test_a_launch_that_is_not_supported_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    """Before anything is written, and so before anything is made."""
    monkeypatch.setenv(name, value)
    with pytest.raises(DistillationError, match=f"expected a launch {message}"):
        list(train(nn.Linear(2, 2), lambda *_: {}, TrainingConfig(steps=1), tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.nightly
@pytest.mark.slow
def test_a_model_under_a_plan_learns_in_two_processes(tmp_path: Path) -> None:
    """Compiled as in one process, where DistributedDataParallel would cut its sites in two.

    As in test_loop: Adam moves by at most the rate of 0.01, by a gradient whose roundings (sums of
    64 products in another order) may be a hundredth of it.
    """
    script = Path(__file__).with_name("planned_run.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    for processes, batch in (("1", "2"), ("2", "1")):
        done = subprocess.run(
            [*launch, processes, str(script), str(tmp_path / processes), batch],
            env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_state(tmp_path / name) for name in ("1", "2"))
    for name, value in one["weights"].items():
        other = two["weights"][name]
        assert torch.allclose(value, other, rtol=0, atol=2 * 0.01 * 64 * 100 * 2**-23), name
