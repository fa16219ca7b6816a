"""The training loop: resumed bit for bit, never a damaged checkpoint, one clear error for NaN."""

import json
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from evdit_opt.distill import checkpoint, loop
from evdit_opt.distill.checkpoint import load_state, save_atomically
from evdit_opt.distill.loop import Numbers, TrainingConfig, train
from evdit_opt.errors import DistillationError

CONFIG = TrainingConfig(
    steps=7, batch=3, accumulate=2, learning_rate=0.05, warmup=2, decay_from=3, average=0.9,
    save_every=2,
)  # fmt: skip


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 4))


def losses(model: nn.Module, numbers: Numbers) -> dict[str, torch.Tensor]:
    rows = [
        torch.randn(2, 4, generator=torch.Generator().manual_seed(number))
        for number in numbers.samples
    ]
    given, wanted = torch.stack(rows).unbind(1)
    error = (model(given) - wanted).square().mean()
    return {"loss": error, "size": given.abs().mean()}


def adam_rounding(steps: int) -> float:
    """How far ``steps`` updates of size 0.01 may differ when gradients differ by roundings.

    Adam moves by the gradient over its size, so a gradient's relative rounding is the step's. Sums
    over some 64 products of size 1 can leave a gradient a hundredth of that.
    """
    return steps * 0.01 * 64 * 100 * torch.finfo(torch.float32).eps


def curve(folder: Path) -> list[dict]:
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


@pytest.mark.parametrize("killed_after", [1, 2, 3, 6])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, killed_after: int) -> None:
    straight, resumed = network(), network()
    list(train(straight, losses, CONFIG, tmp_path / "straight"))
    for record in train(network(), losses, CONFIG, tmp_path / "killed"):
        if record["step"] == killed_after:
            break  # what is not on disk by now is lost
    list(train(resumed, losses, CONFIG, tmp_path / "killed"))
    for one, other in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    assert curve(tmp_path / "killed") == curve(tmp_path / "straight")
    ends = [load_state(tmp_path / name) for name in ("straight", "killed")]
    for name, value in ends[0]["average"].items():
        assert torch.equal(value, ends[1]["average"][name])


def test_the_average_takes_the_place_of_the_weights_at_the_end(tmp_path: Path) -> None:
    model, again = network(), network()
    weights = []
    for _ in train(model, losses, CONFIG, tmp_path):
        weights.append([value.detach().clone() for value in model.parameters()])
    right = [value.detach().clone() for value in network().parameters()]
    for step, now in enumerate(weights, 1):
        decay = min(0.9, (1 + step) / (10 + step))
        right = [decay * mean + (1 - decay) * new for mean, new in zip(right, now, strict=True)]
    # lerp rounds in another way, seven times
    for value, wanted, last in zip(model.parameters(), right, weights[-1], strict=True):
        assert torch.allclose(value, wanted, rtol=0, atol=8 * 2**-23 * float(wanted.abs().max()))
        assert not torch.equal(value, last)
    list(train(again, losses, CONFIG, tmp_path))  # all done, read from the checkpoint
    for value, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(value, other)


def test_a_line_cut_off_by_a_kill_is_dropped(tmp_path: Path) -> None:
    for record in train(network(), losses, CONFIG, tmp_path):
        if record["step"] == 5:
            break
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    list(train(network(), losses, CONFIG, tmp_path))
    assert [record["step"] for record in curve(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]


def test_a_disk_that_is_full_when_a_run_goes_on(tmp_path: Path, full_disk) -> None:
    for record in train(network(), losses, CONFIG, tmp_path):
        if record["step"] == 5:
            break
    full_disk(16)
    with pytest.raises(DistillationError, match=r"log\.jsonl: .*too large.*step 4 is kept"):
        list(train(network(), losses, CONFIG, tmp_path))
    full_disk(2**40)
    assert [record["step"] for record in curve(tmp_path)] == [1, 2, 3, 4, 5]


def test_accumulated_batches_are_one_large_one(tmp_path: Path) -> None:
    """The same six samples a step; sums of float32 in another order, over seven steps."""
    whole, parts = network(), network()
    for name, model, (batch, accumulate) in (
        ("whole", whole, (6, 1)),
        ("parts", parts, (3, 2)),
    ):
        config = TrainingConfig(steps=7, batch=batch, accumulate=accumulate, learning_rate=0.01)
        list(train(model, losses, config, tmp_path / name))
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=adam_rounding(7))


def test_no_number_is_used_twice(tmp_path: Path) -> None:
    seen: list[int] = []

    def noting(model: nn.Module, numbers: Numbers) -> dict[str, torch.Tensor]:
        seen.extend(numbers.samples)
        return losses(model, numbers)

    list(train(network(), noting, CONFIG, tmp_path))
    assert seen == list(range(7 * 6))
    assert curve(tmp_path)[-1]["samples"] == 42


def test_nan_stops_with_the_state_kept(tmp_path: Path) -> None:
    def breaking(model: nn.Module, numbers: Numbers) -> dict[str, torch.Tensor]:
        found = losses(model, numbers)
        return {"loss": found["loss"] * (float("nan") if numbers.step == 5 else 1.0)}

    with pytest.raises(DistillationError, match=r"nan .*at step 5; the checkpoint of step 4"):
        list(train(network(), breaking, CONFIG, tmp_path))
    state = load_state(tmp_path)
    assert state is not None
    assert state["step"] == 4
    assert all(bool(value.isfinite().all()) for value in state["weights"].values())


def test_a_full_disk_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_atomically(tmp_path / "state.pt", {"step": 3, "weights": {}})
    write = torch.save

    def full(value: object, file) -> None:
        write({"half": 1}, file)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(DistillationError, match=r"No space left.*step 3 is kept"):
        save_atomically(tmp_path / "state.pt", {"step": 9})
    monkeypatch.undo()
    assert load_state(tmp_path)["step"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


@pytest.mark.parametrize("file", ["state.pt", "log.jsonl"])
def test_a_disk_that_is_full_while_training(tmp_path: Path, full_disk, file: str) -> None:
    """One clear error; with room again the run goes on to the same end, bit for bit."""
    list(train(network(), losses, CONFIG, tmp_path / "straight"))
    folder = tmp_path / "full"

    def fill(step: int) -> bool:
        if step == 5:
            full_disk((folder / file).stat().st_size - 1)
        return False

    told = rf"{file}: .*too large.*step 4 is kept.*make room"
    with pytest.raises(DistillationError, match=told):
        list(train(network(), losses, CONFIG, folder, fill))
    full_disk(2**40)
    assert load_state(folder)["step"] == 4
    assert [path.suffix for path in folder.iterdir() if path.suffix == ".partial"] == []
    list(train(network(), losses, CONFIG, folder))
    assert curve(folder) == curve(tmp_path / "straight")
    ends = [load_state(tmp_path / name)["weights"] for name in ("straight", "full")]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


@pytest.mark.parametrize("content", [b"", b"nonsense" * 99, None], ids=["empty", "other", "cut"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, content: bytes | None) -> None:
    """And left where it is: it may be all that somebody has."""
    list(train(network(), losses, TrainingConfig(steps=2), tmp_path))
    path = tmp_path / "state.pt"
    damaged = path.read_bytes()[:999] if content is None else content
    path.write_bytes(damaged)
    with pytest.raises(DistillationError, match=r"checkpoint in .*state\.pt, cannot read it"):
        list(train(network(), losses, TrainingConfig(steps=2), tmp_path))
    assert path.read_bytes() == damaged


def test_other_settings_do_not_continue_a_run(tmp_path: Path) -> None:
    list(train(network(), losses, TrainingConfig(steps=2), tmp_path))
    with pytest.raises(DistillationError, match="choose another folder"):
        list(train(network(), losses, TrainingConfig(steps=3), tmp_path))
    with pytest.raises(DistillationError, match="of the 2 tensors"):
        list(train(nn.Linear(4, 4), losses, TrainingConfig(steps=2), tmp_path))


def test_another_number_of_processes_does_not_continue_a_run(tmp_path: Path) -> None:
    """Their samples have other numbers: some would be seen twice, some never."""
    config = TrainingConfig(steps=2, batch=3, accumulate=2)
    list(train(network(), losses, config, tmp_path))
    state = load_state(tmp_path)
    assert state["samples"] == 6
    save_atomically(tmp_path / "state.pt", {**state, "samples": 12})
    with pytest.raises(DistillationError, match=r"12 samples a step.*got 6; launch as many"):
        list(train(network(), losses, config, tmp_path))


def test_only_what_requires_gradients_is_trained(tmp_path: Path) -> None:
    model = network()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    list(train(model, losses, TrainingConfig(steps=2, learning_rate=0.1), tmp_path))
    assert torch.equal(model[0].weight, before)
    assert set(load_state(tmp_path)["weights"]) == {"2.weight", "2.bias"}
    with pytest.raises(DistillationError, match="require gradients"):
        list(train(network().requires_grad_(False), losses, CONFIG, tmp_path / "none"))


def test_the_rate_warms_up_and_falls() -> None:
    config = TrainingConfig(steps=10, learning_rate=1.0, warmup=4, decay_from=5)
    rates = [config.rate(step) for step in range(10)]
    assert rates[:6] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert rates[9] == pytest.approx(0.02 + 0.98 / 5)


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"steps": 1, "batch": 1.5}, {"steps": 1, "learning_rate": 0.0},
     {"steps": 1, "average": 1.0}, {"steps": 1, "betas": (0.9, 1.5)},
     {"steps": 1, "weight_decay": -1.0}, {"steps": 1, "warmup": -1},
     {"steps": 9, "decay_from": 10}, {"steps": 1, "bf16": True, "fp16": True},
     {"steps": 1, "shard": True, "fp16": True}],
    ids=str,
)  # fmt: skip
def test_settings_are_checked(wrong: dict) -> None:
    with pytest.raises(DistillationError, match="expected"):
        TrainingConfig(**wrong)


def test_a_stage_that_recomputes_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    """The next stage may reuse residuals, which must not be written twice."""

    class Recomputing(nn.Sequential):
        is_gradient_checkpointing = False

        def enable_gradient_checkpointing(self) -> None:
            self.is_gradient_checkpointing = True

        def disable_gradient_checkpointing(self) -> None:
            self.is_gradient_checkpointing = False

    seen = []

    def noting(model: nn.Module, numbers: Numbers) -> dict[str, torch.Tensor]:
        seen.append(model.is_gradient_checkpointing)
        return losses(model, numbers)

    model, config = Recomputing(*network()), TrainingConfig(steps=2, checkpointing=True)
    list(train(model, noting, config, tmp_path / "whole"))
    assert seen == [True, True]
    assert not model.is_gradient_checkpointing
    next(train(model, noting, config, tmp_path / "broken off"))
    assert not model.is_gradient_checkpointing
    with pytest.raises(DistillationError, match="Sequential has none; set checkpointing=False"):
        list(train(network(), losses, config, tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_bfloat16_computes_and_float32_learns(tmp_path: Path) -> None:
    config = TrainingConfig(steps=3, learning_rate=0.01, bf16=True)
    dtypes = set()

    def noting(model: nn.Module, numbers: Numbers) -> dict[str, torch.Tensor]:
        dtypes.add(model[0](torch.zeros(1, 4)).dtype)
        return losses(model, numbers)

    model = network()
    list(train(model, noting, config, tmp_path))
    assert dtypes == {torch.bfloat16}
    assert {value.dtype for value in model.parameters()} == {torch.float32}


def test_float16_skips_what_overflows_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """A gradient of 3 or more overflows float16 at the first scale, 2**16; then it is halved."""
    config = replace(CONFIG, fp16=True, save_every=1, accumulate=1)

    def steep(model: nn.Module, numbers: Numbers) -> dict[str, torch.Tensor]:
        assert model[0](torch.zeros(1, 4)).dtype == torch.float16
        found = losses(model, numbers)
        return {"loss": found["loss"] * 100, "size": found["size"]}

    straight, resumed = network(), network()
    list(train(straight, steep, config, tmp_path / "straight"))
    found = curve(tmp_path / "straight")
    skipped = [record["step"] for record in found if record.get("skipped")]
    assert skipped == list(range(1, len(skipped) + 1))
    assert 0 < len(skipped) < 7
    assert [r["loss_scale"] for r in found] == [
        2.0 ** (16 - min(n, len(skipped))) for n in range(7)
    ]
    for record in train(network(), steep, config, tmp_path / "killed"):
        if record["step"] == len(skipped):
            break
    list(train(resumed, steep, config, tmp_path / "killed"))
    assert curve(tmp_path / "killed") == found
    for one, other in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)

    def endless(model: nn.Module, numbers: Numbers) -> dict[str, torch.Tensor]:
        return {"loss": losses(model, numbers)["loss"] * 1e37}

    with pytest.raises(DistillationError, match=r"at step 16; .*bf16 and fp16"):
        list(train(network(), endless, replace(config, steps=20), tmp_path / "endless"))


def scalars(folder: Path) -> list[tuple[str, int, float]]:
    """Tag, step and value of all scalars of TensorBoard's files, in the order they were written."""
    proto = import_module("tensorboard.compat.proto.event_pb2")
    found: list[tuple[str, int, float]] = []
    for path in sorted(folder.rglob("events.*"), key=lambda p: p.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:  # a record: length, its checksum, the event, its checksum
            length = int.from_bytes(data[:8], "little")
            event = proto.Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            found += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
            if event.session_log.status == proto.SessionLog.START:
                found = [one for one in found if one[1] < event.step]
    return found


@pytest.mark.skipif(not find_spec("tensorboard"), reason="needs the package tensorboard")
def test_tensorboard_shows_what_the_log_says(tmp_path: Path) -> None:
    """Also after a kill: what was done after the checkpoint is written again, and counts once."""
    config = replace(CONFIG, tensorboard=True)
    for record in train(network(), losses, config, tmp_path):
        if record["step"] == 5:
            break  # the checkpoint is of step 4
    list(train(network(), losses, config, tmp_path))
    found = scalars(tmp_path / "tensorboard")
    for name in ("loss", "size", "learning_rate", "gradient_norm"):
        wanted = [(name, r["step"], float(np.float32(r[name]))) for r in curve(tmp_path)]
        assert [one for one in found if one[0] == name] == wanted
    plain = tmp_path / "plain"
    list(train(network(), losses, CONFIG, plain))
    assert curve(plain) == curve(tmp_path)
    assert not (plain / "tensorboard").exists()


def test_tensorboard_that_is_not_there_is_said_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "find_spec", lambda name: None)
    with pytest.raises(DistillationError, match="pip install tensorboard"):
        TrainingConfig(steps=1, tensorboard=True)


@pytest.mark.slow
def test_two_processes_are_one_with_the_same_global_batch(tmp_path: Path) -> None:
    script = Path(__file__).with_name("one_run.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    for processes, batch in ((1, 4), (2, 2)):
        command = [*launch, str(processes), str(script), str(tmp_path / str(processes)), str(batch)]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
    one, two = (load_state(tmp_path / name) for name in ("1", "2"))
    assert [r["samples"] for r in curve(tmp_path / "2")] == [4 * n for n in range(1, 6)]
    for name, value in one["weights"].items():
        # means of two means: a few roundings, which Adam's first steps of size 0.01 scale
        assert torch.allclose(
            value, two["weights"][name], rtol=0, atol=5 * 0.01 * 64 * 2**-23 * 100
        )
