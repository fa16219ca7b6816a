"""The ``evdit`` command."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from evdit_opt.commands.calibrate import calibrate
from evdit_opt.commands.common import (
    MODEL_HELP,
    AsJson,
    Precision,
    console,
    given,
    only_result_on_stdout,
    or_exit,
    write_json,
)
from evdit_opt.commands.distill import distill
from evdit_opt.commands.measure import measure
from evdit_opt.commands.plan import plans
from evdit_opt.commands.report import report

__all__ = ["app"]

app = typer.Typer(
    name="evdit",
    help="Faster video diffusion transformers: sparse 3D attention, calibrated layer by layer.",
    epilog="Start with `evdit demo`: it runs the whole thing on a small model that is built in.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
exports = typer.Typer(help="Write an optimized denoiser for other programs.", no_args_is_help=True)
app.add_typer(exports, name="export")
app.add_typer(plans, name="plan")
app.command()(calibrate)
app.command()(distill)
app.command()(measure)
app.command()(report)


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Where videos, pictures and numbers go.")] = Path(
        "evdit-demo"
    ),
    clips: Annotated[int, typer.Option(min=1, help="Held-out clips to generate per variant.")] = 12,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps of a clip.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed of the first clip; the next ones follow.")] = 1000,
    as_json: AsJson = False,
) -> None:
    """Calibrate, optimize and run TinyWan (built in, no download, CPU is enough), and report."""
    from evdit_opt.demo.run import run_demo

    def run() -> None:
        if not as_json:
            run_demo(folder, clips=clips, steps=steps, seed=seed, console=console)
            return
        with only_result_on_stdout():
            report = run_demo(folder, clips=clips, steps=steps, seed=seed, console=console)
        write_json(report)

    or_exit(run)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    frames: Annotated[
        int | None, typer.Option(min=1, help="Frames of the video; of the latents for a folder.")
    ] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels; latent rows.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels; latent columns.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Any prompt; only the first denoiser call runs.")
    ] = None,
    grid: Annotated[
        tuple[int, int, int] | None,
        typer.Option(help="Latent frames, rows and columns in tokens, if the call does not tell."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="Where to run, such as cuda.")] = None,
    dtype: Annotated[
        Precision | None, typer.Option(help="What to run in; as loaded if left out.")
    ] = None,
    timing: Annotated[
        bool, typer.Option(help="Compile the call twice to time it with and without attention.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """List every attention of a model: which can be sparse or why not, and what that could win."""
    import torch

    from evdit_opt.grid import VideoGrid
    from evdit_opt.inspection import examine, load_target
    from evdit_opt.inspection import show as describe

    sizes = given(num_frames=frames, height=height, width=width)

    def run() -> None:
        with only_result_on_stdout():
            precision = None if dtype is None else getattr(torch, dtype.value)
            denoiser = load_target(model, prompt, sizes, device, precision)
            found = examine(model, denoiser, VideoGrid(*grid) if grid else None, timing)
        if as_json:
            sys.stdout.write(found.to_json())
        else:
            console.print(describe(found))

    or_exit(run)


@exports.command()
def onnx(
    pipeline: Annotated[str, typer.Argument(help=MODEL_HELP)],
    plan: Annotated[Path, typer.Option(help="Its plan, *.evdit.json.")],
    out: Annotated[
        Path,
        typer.Option(
            help="The file to write; large weights go beside it. With residual reuse, x.onnx names "
            "x.refresh.onnx, x.reuse.onnx and x.steps.json."
        ),
    ],
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of the video.")] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels; latent rows.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels; latent columns.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Any prompt; only its length in tokens can matter.")
    ] = None,
    dtype: Annotated[
        Precision | None, typer.Option(help="What it runs in; as loaded if left out.")
    ] = None,
    opset: Annotated[int, typer.Option(min=18, help="Version of ONNX's operator set.")] = 18,
    as_json: AsJson = False,
) -> None:
    """Write the denoiser with its sparse attention in ONNX's standard operators, at one size."""
    import torch

    from evdit_opt.export.command import export_named

    sizes = given(num_frames=frames, height=height, width=width)

    def run() -> None:
        precision = None if dtype is None else getattr(torch, dtype.value)
        with only_result_on_stdout():
            written = export_named(
                pipeline, plan, out, prompt=prompt, sizes=sizes, dtype=precision, opset=opset
            )
        if as_json:
            files = [str(file) for file in written.files]
            size = sum(file.stat().st_size for file in written.files)
            write_json({"out": files[0], "files": files, "bytes": size, "written": written.text})
        else:
            console.print(written.text, markup=False, highlight=False)

    or_exit(run)
