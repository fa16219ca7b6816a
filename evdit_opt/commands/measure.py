"""``evdit measure``: where a model's attention goes, as a table, as JSON and as a picture."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    writing,
)
from evdit_opt.errors import UnsupportedInputError
from evdit_opt.whole_file import whole_file

if TYPE_CHECKING:
    from rich.table import Table

    from evdit_opt.calibrate.figures import Overlap
    from evdit_opt.calibrate.measure import Measurement

__all__ = ["measure", "repeats", "table"]

SHOWN_DISTANCES = (1, 4, 16)  # more do not fit 80 columns; JSON has all


def measure(
    pipeline: Annotated[str, typer.Argument(help=MODEL_HELP)],
    prompts: Annotated[
        Path | None, typer.Option(help="A text file, a prompt a line; lines with # are comments.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be repeated.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps of a run.")] = None,
    frames: Annotated[
        int | None, typer.Option(min=1, help="Frames of the video; of the latents for a folder.")
    ] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels; latent rows.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels; latent columns.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale of the runs.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the first run's noise.")] = None,
    device: Annotated[str | None, typer.Option(help="Where to run, such as cuda.")] = None,
    dtype: Annotated[
        Precision | None, typer.Option(help="What to run in; as loaded if left out.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="A folder for measure.json and a picture; made if missing.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a measurement that was interrupted.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure where each layer's attention goes, and how far that repeats.

    Own frame, other frames by distance, text; how alike tiles are; whether the keys that matter are
    those of other prompts, steps and guidance branches. With --out the sums over the prompts that
    are done are kept in OUT/unfinished until the end: the same command with --resume goes on.
    """
    if resume and out is None:
        raise typer.BadParameter("--resume needs the --out of what was interrupted")
    import torch

    from evdit_opt.calibrate.kept import remove_kept
    from evdit_opt.calibrate.measure import measure_attention
    from evdit_opt.config import Config
    from evdit_opt.inspection.target import PROMPT, find_target

    call = given(num_frames=frames, height=height, width=width, guidance_scale=guidance)

    def run() -> None:
        texts = [*read_prompts(prompts), *(prompt or ())] or [PROMPT]
        unfinished = None if out is None else _place(out, resume)
        with only_result_on_stdout():
            precision = None if dtype is None else getattr(torch, dtype.value)
            config = Config(**given(calib_steps=steps, seed=seed))
            found = find_target(pipeline, texts, call, device, precision)
            if prompts or prompt:
                require_prompts_used(pipeline, found.items)
            config = replace(config, pipe_kwargs=found.pipe_kwargs)
            measured = measure_attention(found.target, found.items, config, keep_in=unfinished)
            if unfinished is not None:
                _write(measured, unfinished.parent)
                remove_kept(unfinished)
        if as_json:
            sys.stdout.write(measured.to_json())
        else:
            console.print(table(measured))
            console.print(repeats(measured))
            if found.made_up:
                console.print("The inputs were random: only a pipeline's say where it looks.")

    or_exit(run)


def table(measured: "Measurement") -> "Table":
    """A row per layer, to print."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    grid = measured.grid
    found = Table(
        title=f"{measured.model}: share of attention, {grid.frames} latent frames x {grid.height} "
        f"x {grid.width} tokens",
        caption=f"{measured.prompts} prompts, {measured.steps} steps; mean over heads, queries and "
        "calls. own: on the own frame; heads: of the lowest to the highest head; even: were every "
        "token alike; +-n: on frames n away",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    distances = [distance for distance in SHOWN_DISTANCES if distance < grid.frames]
    found.add_column("layer", overflow="fold")
    for column in ("own", "heads", "even", *(f"+-{n}" for n in distances), "text"):
        found.add_column(column, justify="right", no_wrap=True)
    for site in measured.sites:
        heads = [head.in_frame for head in site.heads]
        found.add_row(
            escape(site.name),
            f"{site.in_frame:.3f}",
            f"{min(heads):.2f}-{max(heads):.2f}",
            f"{site.even:.3f}",
            *(f"{site.by_distance[distance]:.3f}" for distance in distances),
            f"{site.text:.3f}",
        )
    return found


def repeats(measured: "Measurement") -> "Table":
    """How far the attention of every layer repeats, to print."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    found = Table(
        title="how far it repeats",
        caption="alike: cosine between off-diagonal tiles; keys: how many of all hold 90% of a "
        "query's attention; prompts, steps, guidance: how much of it the 90% keys of another one "
        "catch, and their intersection over union; breaks: what is far from the other layers",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    found.add_column("layer", overflow="fold")
    for column in ("alike", "keys", "prompts", "steps", "guidance"):
        found.add_column(column, justify="right", no_wrap=True)
    found.add_column("breaks", no_wrap=True)
    for site in measured.sites:
        held = site.sets[0]
        found.add_row(
            escape(site.name),
            "-" if site.similarity is None else f"{site.similarity:.3f}",
            f"{held.keys:.3f}",
            *map(_overlap, (held.prompts, held.timesteps, held.branches)),
            ", ".join(site.breaks),
        )
    return found


def _overlap(found: "Overlap | None") -> str:
    return "-" if found is None else f"{found.caught:.2f} {found.iou:.2f}"


def _place(out: Path, resume: bool) -> Path:
    """Make sure of the folder before hours of work; where in it to keep what is finished."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UnsupportedInputError(f"expected a folder to write to, got {out}: {error}") from error
    require_writable(out / "measure.json")
    if importlib.util.find_spec("matplotlib") is None:
        raise UnsupportedInputError(
            "expected the package matplotlib, which draws the picture in --out: "
            'pip install "evdit-opt[diffusers]"; or --json without --out'
        )
    unfinished = out / "unfinished"
    require_known(unfinished, resume)
    return unfinished


def _write(measured: "Measurement", out: Path) -> None:
    from evdit_opt.calibrate.mass_picture import draw_mass

    with writing(out), whole_file(out / "measure.json") as partial:
        partial.write_text(measured.to_json(), encoding="utf-8")
    with writing(out), whole_file(out / "measure.png") as partial:
        draw_mass(partial, measured)
