"""``evdit plan retarget``: a plan for clips of another size, and what of it is extrapolated."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evdit_opt.commands.calibrate import read_prompts
from evdit_opt.commands.common import (
    MODEL_HELP,
    AsJson,
    Precision,
    console,
    given,
    only_result_on_stdout,
    or_exit,
    require_known,
    require_prompts_used,
    require_writable,
    write_json,
    writing,
)
from evdit_opt.commands.summary import summary

if TYPE_CHECKING:
    from evdit_opt.retarget import Retargeted

__all__ = ["retarget"]


def retarget(
    plan: Annotated[Path, typer.Argument(help="A plan file, *.evdit.json.")],
    out: Annotated[Path, typer.Option(help="The plan file to write.")],
    grid: Annotated[
        tuple[int, int, int] | None,
        typer.Option(min=1, help="Latent frames, rows and columns, in tokens."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help=f"Instead: ask this model for the grid, and verify. {MODEL_HELP}"),
    ] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of the model's video.")] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale of the runs.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="To verify on; a text file, a prompt a line.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be repeated.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the first run's noise.")] = None,
    device: Annotated[str | None, typer.Option(help="Where to run, such as cuda.")] = None,
    dtype: Annotated[
        Precision | None, typer.Option(help="What to run in; as loaded if left out.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with runs that were interrupted.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make a plan for another frame count or size, and say what is then extrapolated.

    With --model and prompts it is run against dense clips of that size, and carries its quality.
    What is not given of size, guidance and the like is as it was in calibration. Finished runs are
    kept in OUT.unverified until the plan is written: the same command with --resume goes on.
    """
    if (grid is None) == (model is None):
        raise typer.BadParameter("give --grid or --model")
    call = given(num_frames=frames, height=height, width=width, guidance_scale=guidance)
    if model is None and (call or prompts or prompt or device or dtype):
        raise typer.BadParameter("what says how to call a model, and with what, needs --model")

    def run() -> None:
        from evdit_opt.calibrate.kept import remove_kept
        from evdit_opt.grid import VideoGrid
        from evdit_opt.plan import Plan
        from evdit_opt.retarget import retarget

        require_writable(out)
        unfinished = out.with_name(f"{out.name}.unverified")  # no calibration is removed
        require_known(unfinished, resume)
        loaded = Plan.load(plan)
        if grid is not None:
            found = retarget(loaded, VideoGrid(*grid))
        else:
            texts = [*read_prompts(prompts), *(prompt or ())]
            with only_result_on_stdout():
                found = _with_model(
                    str(model), loaded, texts, call, seed, device, dtype, unfinished
                )
        with writing(out):
            found.plan.save(out)
        remove_kept(unfinished)
        if as_json:
            told = {
                "out": str(out), **summary(found.plan), "grid": vars_of(found.plan.grid),
                "calibrated_at": vars_of(found.plan.calibrated_at or found.plan.grid),
                "extrapolated": list(found.extrapolated),
            }  # fmt: skip
            write_json(told)
            return
        for line in (found.plan.describe(), *(f"assumed: {one}" for one in found.extrapolated)):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        console.print(f"written to {out}", markup=False, highlight=False, soft_wrap=True)

    or_exit(run)


def vars_of(grid: Any) -> dict[str, int]:
    """A grid for programs."""
    return {"frames": grid.frames, "height": grid.height, "width": grid.width}


def _with_model(
    name: str,
    loaded: Any,
    texts: list[str],
    call: dict[str, Any],
    seed: int | None,
    device: str | None,
    dtype: Precision | None,
    unfinished: Path,
) -> "Retargeted":
    """For the grid of a model's first call; verified where there is something real to run."""
    import torch

    from evdit_opt.calibrate.verify import called_grid, verify_plan
    from evdit_opt.config import Config
    from evdit_opt.inspection.target import PROMPT, find_target
    from evdit_opt.retarget import retarget

    precision = None if dtype is None else getattr(torch, dtype.value)
    found = find_target(name, texts or [PROMPT], call, device, precision)
    if texts:
        require_prompts_used(name, found.items)
    # What a built-in model is usually called with does not overrule what it was called with.
    pipe_kwargs = {**found.pipe_kwargs, **loaded.calibration.arguments, **call}
    steps = loaded.calibration.steps
    config = Config(**given(seed=seed), calib_steps=steps, pipe_kwargs=pipe_kwargs)
    moved = retarget(loaded, called_grid(found.target, found.items, config, loaded))
    is_pipeline = found.items and isinstance(found.items[0], str)
    if found.made_up or (is_pipeline and not texts):
        return moved
    verified = verify_plan(found.target, found.items, config, moved.plan, keep_in=unfinished)
    return replace(moved, plan=verified)
