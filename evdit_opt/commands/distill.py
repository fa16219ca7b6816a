"""``evdit distill``: fine-tune for few steps and sparse attention, from a YAML file."""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evdit_opt.commands.common import (
    AsJson,
    console,
    only_result_on_stdout,
    or_exit,
    write_json,
)
from evdit_opt.commands.summary import summary

if TYPE_CHECKING:
    from evdit_opt.distill.pipeline import Finetuning

__all__ = ["distill"]


def distill(
    config: Annotated[Path, typer.Argument(help="A YAML file; see docs/distillation.md.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Try shapes, estimate memory and time, train nothing.")
    ] = False,
    as_json: AsJson = False,
    verbose: Annotated[bool, typer.Option(help="Show every training step.")] = False,
) -> None:
    """Teach a pipeline to need few steps and little attention; started again, it goes on."""
    if verbose:
        logging.getLogger("evdit_opt.distill").setLevel(logging.INFO)
        logging.basicConfig()

    def run() -> None:
        with only_result_on_stdout():
            told, facts = _rehearse(config) if dry_run else _train(config)
        if as_json:
            write_json(facts)
        else:
            console.print(told, markup=False, highlight=False, soft_wrap=True)

    or_exit(run)


def _load(path: Path) -> "Finetuning":
    import torch

    from evdit_opt.config import Config
    from evdit_opt.distill.config import read_config
    from evdit_opt.distill.pipeline import Finetuning
    from evdit_opt.distill.processes import processes
    from evdit_opt.errors import DistillationError
    from evdit_opt.inspection.target import find_target

    job = read_config(path)
    if job.dtype not in (None, "float32", "bfloat16"):
        raise DistillationError(f"expected dtype float32 or bfloat16, got {job.dtype!r}")
    processes()  # joined before a model is loaded: "cuda" then means this process's own
    dtype = None if job.dtype is None else getattr(torch, job.dtype)
    found = find_target(job.pipeline, job.prompts, job.call, job.device, dtype)
    try:
        lists = {name: tuple(v) for name, v in job.search.items() if isinstance(v, list)}
        # TinyWan's own guidance is not a word of the person's.
        drop = {"guidance_scale"} - job.call.keys()
        call = {name: value for name, value in found.pipe_kwargs.items() if name not in drop}
        search = Config(**{**job.search, **lists}, pipe_kwargs=call)
    except TypeError as error:
        raise DistillationError(
            f"expected search in {path} to hold settings of evdit_opt.Config: {error}"
        ) from error
    return Finetuning(found.target, job.prompts, job.finetune, job.steps, search)


def _train(path: Path) -> tuple[str, dict[str, Any]]:
    """Train; what was made, for people and for programs."""
    run = _load(path)
    for index in range(len(run.config.stages)):
        run.stage(index)
    plan = run.finish()
    told = [] if plan is None else [plan.describe()]
    result = run.config.folder / "result"
    learned = "consistency" in run.config.stages
    told.append(f"written to {result}" + "; call it with guidance_scale=1" * learned)
    facts = {"out": str(result), "steps": run.steps, "plan": plan and summary(plan)}
    return "\n".join(told), facts


def _rehearse(path: Path) -> tuple[str, dict[str, Any]]:
    """Try; what it would take, for people and for programs."""
    from evdit_opt.distill.encode import check_videos
    from evdit_opt.distill.rehearsal import rehearse

    run = _load(path)
    told = [f"{len(run.prompts)} prompts, {run.steps} steps; nothing was trained or written"]
    videos, learns = None, "consistency" in run.config.stages
    if learns and run.config.data is not None:
        videos = check_videos(run.pipe, run.config.data, run.search.pipe_kwargs)
        peak = "" if videos.peak_gib is None else f", {videos.peak_gib:.2f} GiB at the peak"
        told.append(
            f"{videos.usable} videos to encode: {videos.disk_gib:.3f} GiB on disk{peak}; about "
            f"{videos.seconds / 60:.1f} minutes; {len(videos.skipped)} left out"
        )
        told += [f"left out: {reason}" for reason in videos.skipped]
    done = {item.stage: item for item in rehearse(run)}
    for name in run.config.stages:
        if name not in done:
            told.append(f"{name}: not tried before the stages ahead of it are done")
            continue
        item = done[name]
        peak = "" if item.peak_gib is None else f", {item.peak_gib:.2f} GiB at the peak"
        told.append(
            f"{name}: trains {item.trained} numbers on {item.samples} samples; "
            f"{item.weights_gib:.2f} GiB of weights, {item.training_gib:.2f} GiB of gradients and "
            f"averages{peak}; about {item.seconds / 60:.1f} minutes"
        )
    if learns and run.config.latents is None and run.config.data is None:
        calls = run.config.clips * run.config.full_steps
        told.append(f"before that the teacher makes {run.config.clips} latents: {calls} steps")
    facts = {
        "prompts": len(run.prompts),
        "steps": run.steps,
        "videos": None if videos is None else asdict(videos),
        "stages": [asdict(item) for item in done.values()],
        "not_tried": [name for name in run.config.stages if name not in done],
    }
    return "\n".join(told), facts
