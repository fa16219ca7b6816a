"""A toy training, its data encoded first, killed again and again; run by test_killed.py.

    python -m tests.distill.killed FOLDER KILLS SEED

prints a JSON object: what each kill hit, and whether the runs ended as the uninterrupted one.
"""

import io
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401  here, so that no kill is spent on an import
import torch
from torch import nn

from evdit_opt.distill import checkpoint, loop
from evdit_opt.distill.checkpoint import load_state
from evdit_opt.distill.data import LatentShards, write_shards
from evdit_opt.distill.loop import Numbers, TrainingConfig, train

CONFIG = TrainingConfig(
    steps=60, batch=2, accumulate=2, learning_rate=0.01, warmup=5, decay_from=30, average=0.9,
    save_every=2,
)  # fmt: skip
CLIPS, WIDTH = 24, 64

Moment = tuple[str, float]
KINDS = ("time", "half a checkpoint", "before a replace", "after a replace", "half a log line")


def make(number: int) -> tuple[torch.Tensor, str]:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(2, WIDTH, 1, 1, generator=generator), f"clip {number}"


def run(folder: Path) -> None:
    """Encode, then train on what is encoded; goes on with what is there."""
    write_shards(
        folder / "latents", CLIPS, make, per_shard=2, sources=[str(n) for n in range(CLIPS)]
    )
    latents = LatentShards(folder / "latents")

    def losses(model: nn.Module, numbers: Numbers) -> dict[str, torch.Tensor]:
        rows = [latents.shuffled(number, 0) for number in numbers.samples]
        given, wanted = latents.take(rows).flatten(2).unbind(1)
        return {"loss": (model(given) - wanted).square().mean()}

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 1024), nn.SiLU(), nn.Linear(1024, WIDTH))
    list(train(model, losses, CONFIG, folder))


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(moment: Moment) -> None:
    """Let this process be killed at a moment; ``time`` is the parent's business."""
    kind, share = moment
    left = 1 + int(share * 4)  # the first to fourth of its kind

    def due() -> bool:
        nonlocal left
        left -= 1
        return left == 0

    def wrap(owner: Any, name: str, before: Callable[..., None], after: Callable[[], None]) -> None:
        real = getattr(owner, name)

        def call(*given: Any, **named: Any) -> Any:
            now = due()
            if now:
                before(*given)
            result = real(*given, **named)
            if now:
                after()
            return result

        setattr(owner, name, call)

    def half_a_checkpoint(state: Any, file: Any) -> None:
        buffer = io.BytesIO()
        torch.serialization.save(state, buffer)
        file.write(buffer.getvalue()[: int(share * buffer.tell())])
        file.flush()
        kill_self()

    def half_a_line(log: Path, record: Any) -> None:
        with log.open("a") as file:
            line = json.dumps(record)
            file.write(line[: int(share * len(line))])
        kill_self()

    def nothing(*_given: Any) -> None:
        pass

    if kind == "half a checkpoint":
        wrap(checkpoint.torch, "save", half_a_checkpoint, nothing)
    elif kind == "before a replace":  # of a shard, a checkpoint or a log
        wrap(os, "replace", lambda *_: kill_self(), nothing)
    elif kind == "after a replace":
        wrap(os, "replace", nothing, kill_self)
    elif kind == "half a log line":
        wrap(loop, "append", half_a_line, nothing)


def in_a_process(folder: Path, moment: Moment | None) -> int:
    """What :func:`run` exits with; -9 if it was killed."""
    child = os.fork()  # all is imported, nothing has run: quick, and no thread is lost
    if child == 0:
        try:
            if moment is not None:
                arm(moment)
            run(folder)
        except BaseException as error:
            sys.stderr.write(f"{error!r}\n")
            os._exit(1)
        os._exit(0)
    if moment is not None and moment[0] == "time":
        time.sleep(moment[1])
        os.kill(child, signal.SIGKILL)  # nobody has waited for it: it is ours, dead or alive
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def curve(folder: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def same(one: Path, other: Path) -> bool:
    """Curves, weights, average and latents, bit for bit."""
    states = [load_state(folder) for folder in (one, other)]
    latents = [LatentShards(folder / "latents") for folder in (one, other)]
    return (
        curve(one) == curve(other)
        and all(
            torch.equal(value, states[1][group][name])
            for group in ("weights", "average")
            for name, value in states[0][group].items()
        )
        and torch.equal(*(shards.take(range(CLIPS)) for shards in latents))
    )


def main() -> None:
    base, kills, draw = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    began = time.monotonic()
    exits = [in_a_process(base / "straight", None)]
    whole = time.monotonic() - began
    hit: list[Moment] = []
    folders: list[Path] = []
    while len(hit) < kills:  # a run that ends before all kills are done is followed by another
        folders.append(base / f"killed {len(folders)}")
        while True:
            kind = KINDS[len(hit) % len(KINDS)] if len(hit) < kills else None
            share = draw.random()
            moment = kind and (kind, share * whole if kind == "time" else share)
            exits.append(in_a_process(folders[-1], moment))
            if exits[-1] != -signal.SIGKILL:
                break
            hit.append(moment)
    sys.stdout.write(
        json.dumps(
            {
                "exits": exits,
                "hit": hit,
                "same": [same(base / "straight", folder) for folder in folders],
                "left": sorted(
                    {path.name for folder in folders for path in folder.rglob("*.partial")}
                ),
            }
        )
    )


if __name__ == "__main__":
    main()
