"""``evdit calibrate``: from prompts to a plan file."""

import enum
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
from evdit_opt.errors import CalibrationError, QualityFloorError

if TYPE_CHECKING:
    from evdit_opt.plan import Plan

__all__ = ["calibrate", "read_prompts"]


class Goal(enum.Enum):
    """Names of ``evdit_opt.config.QUALITIES``, without importing it for ``--help``."""

    high = "high"
    balanced = "balanced"
    fast = "fast"


MAX_PROMPT_BYTES = 16 * 2**20


def calibrate(
    pipeline: Annotated[str, typer.Argument(help=MODEL_HELP)],
    out: Annotated[Path, typer.Option(help="The plan file to write, such as wan.evdit.json.")],
    prompts: Annotated[
        Path | None, typer.Option(help="A text file, a prompt a line; lines with # are comments.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be repeated.")] = None,
    density: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of attention to keep, 0 to 1.")
    ] = None,
    speedup: Annotated[
        float | None,
        typer.Option(min=1, help="Instead: how much faster a step is to be, measured here."),
    ] = None,
    quality: Annotated[
        Goal | None, typer.Option(help="Instead: the sparsest plan that looks as good as this.")
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(min=0, help="Instead: largest relative error of a layer's attention."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Denoising steps of a run, best those you use.")
    ] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of the video.")] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale of the runs.")] = None,
    reuse: Annotated[
        bool, typer.Option(help="Let sites carry what their mask drops from step to step.")
    ] = True,
    reuse_memory: Annotated[
        float | None, typer.Option(min=0, help="GiB that this may take; a quarter of the device's.")
    ] = None,
    held_out: Annotated[
        int | None,
        typer.Option(min=0, help="How many prompts, the last ones, only measure quality."),
    ] = None,
    min_psnr: Annotated[
        float | None, typer.Option(min=0, help="Quality floor in dB to the dense clips.")
    ] = None,
    min_ssim: Annotated[float | None, typer.Option(min=-1, max=1, help="Quality floor.")] = None,
    max_flicker: Annotated[
        float | None, typer.Option(min=0, help="Quality bound: flicker over that of dense clips.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the first run's noise.")] = None,
    min_tokens: Annotated[
        int | None, typer.Option(min=0, help="Sequences shorter than this stay dense.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Where to run, such as cuda.")] = None,
    dtype: Annotated[
        Precision | None, typer.Option(help="What to run in; as loaded if left out.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a calibration that was interrupted.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Find out on a few prompts where attention can be sparse, and write it down as a plan.

    The file is written at the end, whole or not at all: what was there before survives an
    interruption. Every finished run is kept beside it, in OUT.unfinished, until then: the same
    command with --resume goes on, and repeats one run at most. Leave out the options to get the
    defaults of evdit_opt.Config. Exit code 3: no plan within the quality floor.
    """
    if sum(value is not None for value in (density, speedup, threshold)) > 1:
        raise typer.BadParameter("give one of --density, --speedup and --threshold")
    floors = (quality, min_psnr, min_ssim, max_flicker)
    if threshold is not None and any(value is not None for value in floors):
        raise typer.BadParameter(
            "--threshold goes by the layers, --quality, --min-psnr, --min-ssim and --max-flicker "
            "by the clips: give one or the other"
        )
    settings = given(
        density=density,
        speedup=speedup,
        quality=None if quality is None else quality.value,
        threshold=threshold,
        calib_steps=steps,
        reuse=reuse,
        reuse_memory=reuse_memory,
        verify_prompts=held_out,
        min_psnr=min_psnr,
        min_ssim=min_ssim,
        max_flicker_ratio=max_flicker,
        seed=seed,
        min_tokens=min_tokens,
    )
    call = given(num_frames=frames, height=height, width=width, guidance_scale=guidance)

    def run() -> None:
        from evdit_opt.calibrate.kept import remove_kept

        require_writable(out)
        unfinished = out.with_name(f"{out.name}.unfinished")
        require_known(unfinished, resume)
        texts = [*read_prompts(prompts), *(prompt or ())]
        with only_result_on_stdout():
            plan = _make(pipeline, texts, settings, call, device, dtype, out, unfinished)
            with writing(out):
                plan.save(out)
            remove_kept(unfinished)
        if as_json:
            told = {"out": str(out), **summary(plan)}
            write_json(told)
        else:
            console.print(plan.describe(), markup=False, highlight=False, soft_wrap=True)
            console.print(f"written to {out}", markup=False, highlight=False, soft_wrap=True)

    or_exit(run)


def read_prompts(path: Path | None) -> list[str]:
    """The lines of a file without blank ones and comments; none without a file.

    Raises:
        CalibrationError: if it cannot be read, or is no list of prompts.
    """
    if path is None:
        return []
    try:
        if path.stat().st_size > MAX_PROMPT_BYTES:
            raise CalibrationError(f"expected {path} to be a list of prompts, it is too large")
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(
            f"expected {path} to be a text file in UTF-8, a prompt a line: {error}"
        ) from error
    found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not found:
        raise CalibrationError(f"expected prompts in {path}, a line each, it holds none")
    return found


def _make(
    pipeline: str,
    texts: list[str],
    settings: dict[str, Any],
    call: dict[str, Any],
    device: str | None,
    dtype: Precision | None,
    out: Path,
    unfinished: Path,
) -> "Plan":
    import torch

    from evdit_opt.calibrate.make import make_plan
    from evdit_opt.config import Config
    from evdit_opt.inspection.target import find_target

    config = Config(**settings)
    precision = None if dtype is None else getattr(torch, dtype.value)
    found = find_target(pipeline, texts, call, device, precision)
    if found.made_up:
        raise CalibrationError(
            f"expected what a model really gets, {pipeline} is a transformer that only random "
            "inputs can be made for; give its pipeline, or module:factory with calls"
        )
    if texts:
        require_prompts_used(pipeline, found.items)
    config = replace(config, pipe_kwargs=found.pipe_kwargs)
    try:
        return make_plan(found.target, found.items, config, keep_in=unfinished)
    except QualityFloorError as error:
        raise _kept(error, out) from error


def _kept(error: QualityFloorError, out: Path) -> QualityFloorError:
    """Hours of calibration must not be lost with the error: the best plan goes beside ``out``."""
    rejected = out.with_name(f"rejected-{out.name}")
    plan: Any = error.plan
    with writing(rejected):
        plan.save(rejected)
    return QualityFloorError(
        f"{error}; the best plan is kept as {rejected}, and so are all runs: --resume with another "
        "floor repeats none",
        plan,
    )
