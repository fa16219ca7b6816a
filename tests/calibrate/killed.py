"""Calibrations of a toy pipeline that are killed and taken up again; run by test_kept.py.

    python -m tests.calibrate.killed FOLDER

prints a JSON object: plans and runs of the model, uninterrupted and killed time and again.
"""

import itertools
import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from evdit_opt.calibrate.kept import remove_kept
from evdit_opt.calibrate.make import make_plan
from evdit_opt.config import Config
from tests.models.timed_toy import LEVELS, timed_toy

CONFIG = Config(
    density=0.6, calib_steps=6, references=(1, 2), windows=(0,), trial_prompts=2, verify_prompts=1,
    min_tokens=0, progress=False,
)  # fmt: skip
PROMPTS = ("a cat", "a dog", "a bird", "a fish")


class Pipe:
    """A sampler with the pixels of its latents; tells a file of every run that is finished."""

    def __init__(self, told: Path) -> None:
        self.transformer, self.told = timed_toy(1), told

    @torch.no_grad()
    def __call__(
        self, prompt: str, num_inference_steps: int, generator: Any, output_type: str
    ) -> Any:
        latents = torch.randn(1, 4, 4, 4, 6, generator=generator)
        text = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(len(prompt)))
        for level, after in itertools.pairwise((*LEVELS[:num_inference_steps], 0.0)):
            flow = self.transformer(latents, text=text, timestep=torch.tensor([level]))
            moved = nn.functional.fold(
                flow[..., :16].transpose(1, 2).reshape(4, 16, 6), (4, 6), 2, stride=2
            )
            latents = latents + (after - level) / 1000 * moved.reshape(1, 4, 4, 4, 6)
        with self.told.open("a") as file:
            file.write("run\n")
        video = latents[0, :3].sigmoid().movedim(0, -1)  # [frames, height, width, 3]
        video = video.repeat_interleave(4, 1).repeat_interleave(4, 2)
        return SimpleNamespace(frames=video[None].numpy())


def calibrate(folder: Path, moment: tuple[str, int] | None) -> None:
    """In this process, which is killed at the n-th of ``moment``, if one is given."""
    if moment is not None:
        name, left = moment
        real, count = getattr(os, name), 0

        def kill(*arguments: Any) -> Any:
            nonlocal count
            count += 1
            if count == left:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)

        setattr(os, name, kill)
    pipe = Pipe(folder / "runs")
    plan = make_plan(pipe, PROMPTS, CONFIG, keep_in=folder / "plan.unfinished")
    plan.save(folder / "plan.json")
    remove_kept(folder / "plan.unfinished")


def in_a_process(folder: Path, moment: tuple[str, int] | None) -> int:
    """What :func:`calibrate` exits with; -9 if it was killed."""
    child = os.fork()  # all is imported, nothing has run: quick, and no thread is lost
    if child == 0:
        try:
            calibrate(folder, moment)
        except BaseException as error:
            sys.stderr.write(f"{error!r}\n")
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# A file is written (fsync) and then put in place (replace). Counted anew in every process.
MOMENTS: list[tuple[str, int] | None] = [
    ("fsync", 1),  # the first run is finished, nothing is kept yet
    ("replace", 3),  # its clip is kept, its sums are not: after what the folder is for
    ("fsync", 4),  # while the sums of the second are written, after those of the first
    ("replace", 5),  # while plans are tried: the third has sums only
    ("fsync", 5),  # while the plan is verified
    ("replace", 2),  # while the plan itself is put in place
    None,
]


def tell(folder: Path, moments: list[tuple[str, int] | None]) -> dict[str, Any]:
    """What is left of a calibration that was killed at every moment, one after the other."""
    folder.mkdir()
    exits = [in_a_process(folder, moment) for moment in moments]
    return {
        "exits": exits,
        "plan": (folder / "plan.json").read_text() if (folder / "plan.json").exists() else None,
        "runs": (folder / "runs").read_text().count("run"),
        "left": sorted(path.name for path in folder.iterdir()),
    }


def main() -> None:
    base = Path(sys.argv[1])
    told = {"straight": tell(base / "straight", [None]), "killed": tell(base / "killed", MOMENTS)}
    sys.stdout.write(json.dumps(told))


if __name__ == "__main__":
    main()
