"""A student spread over two processes learns what two whole ones learn, and goes on."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from evdit_opt.distill.checkpoint import load_state
from evdit_opt.distill.config import FinetuneConfig
from evdit_opt.distill.loop import TrainingConfig, train
from evdit_opt.distill.samples import SampleConfig
from evdit_opt.errors import DistillationError

SCRIPT = Path(__file__).with_name("sharded_run.py")


def run(folder: Path, processes: int, batch: int, shard: int, last: int = 6) -> list[dict]:
    """What each process tells."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    arguments = [str(folder), str(batch), str(shard), str(last)]
    done = subprocess.run(
        [sys.executable, *launch, str(SCRIPT), *arguments], capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return [json.loads((folder / f"told-{n}.json").read_text()) for n in range(processes)]


def curve(folder: Path) -> list[dict]:
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def furthest(one: Path, other: Path) -> float:
    states = [load_state(folder) for folder in (one, other)]
    return max(
        float((value - states[1][group][name]).abs().max())
        for group in ("weights", "average")
        for name, value in states[0][group].items()
    )


@pytest.mark.nightly
def test_two_processes_with_half_of_it_each(tmp_path: Path) -> None:
    """Consistency and knowledge steps, a checkpoint, a kill after it, and on.

    As in test_loop: Adam moves by at most the rate of 0.01, by a gradient whose roundings (sums of
    64 products in another order) may be a hundredth of it.
    """
    allowed = 6 * 0.01 * 64 * 100 * torch.finfo(torch.float32).eps
    run(tmp_path / "one", 2, 2, 0)  # two whole models: a site's relative error is a batch's
    told = run(tmp_path / "two", 2, 2, 1)
    for process in told:
        assert process["held"] == 0.5  # of the weights, and so of gradients and optimizer
        assert process["model"]  # the model handed in is whole again, in every process
        assert process["plain"]
    assert furthest(tmp_path / "one", tmp_path / "two") < allowed
    assert [r["samples"] for r in curve(tmp_path / "two")] == [8 * n for n in range(1, 7)]

    run(tmp_path / "again", 2, 2, 1, last=4)  # the checkpoint is of step 4
    assert load_state(tmp_path / "again")["step"] == 4
    shutil.copytree(tmp_path / "again", tmp_path / "other")
    run(tmp_path / "again", 2, 2, 1)
    assert curve(tmp_path / "again") == curve(tmp_path / "two")
    assert furthest(tmp_path / "again", tmp_path / "two") == 0.0
    run(tmp_path / "other", 2, 2, 0)  # and the same checkpoint goes on with two whole models
    assert furthest(tmp_path / "other", tmp_path / "two") < allowed


def test_shards_need_processes_and_a_model_without_a_plan(tmp_path: Path) -> None:
    shard = TrainingConfig(steps=1, shard=True)
    with pytest.raises(DistillationError, match="torchrun --nproc_per_node N"):
        list(train(nn.Linear(2, 2), lambda *_: {}, shard, tmp_path))
    samples = SampleConfig(every=1, prompts=("a",))
    for wrong in (
        {"knowledge": shard},
        {"consistency": shard, "samples": samples},
        {"consistency": shard, "stages": ("search", "consistency")},
    ):
        with pytest.raises(DistillationError, match="shard in the consistency stage only"):
            FinetuneConfig(folder=tmp_path, **wrong)
    FinetuneConfig(folder=tmp_path, consistency=shard)
