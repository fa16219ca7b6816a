"""The ``evdit`` command."""

import contextlib
import enum
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from evdit_opt.errors import EvditError

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
console = Console()


class Precision(enum.Enum):
    """What a model may be run in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Where videos, pictures and numbers go.")] = Path(
        "evdit-demo"
    ),
    clips: Annotated[int, typer.Option(min=1, help="Held-out clips to generate per variant.")] = 12,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps of a clip.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed of the first clip; the next ones follow.")] = 1000,
) -> None:
    """Calibrate, optimize and run TinyWan (built in, no download, CPU is enough), and report."""
    from evdit_opt.demo.run import run_demo

    _or_exit(lambda: run_demo(folder, clips=clips, steps=steps, seed=seed, console=console))


@app.command()
def inspect(
    model: Annotated[
        str,
        typer.Argument(
            help="'tinywan', a pipeline's folder or Hugging Face id, a transformer's folder, or "
            "module:factory (returns a pipeline, or a module and the kwargs of a call)."
        ),
    ],
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
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on stdout, and nothing else.")
    ] = False,
) -> None:
    """List every attention of a model: which can be sparse or why not, and what that could win."""
    import torch

    from evdit_opt.grid import VideoGrid
    from evdit_opt.inspection import examine, load_target
    from evdit_opt.inspection import show as describe

    sizes = {"num_frames": frames, "height": height, "width": width}
    given = {name: value for name, value in sizes.items() if value is not None}

    def run() -> None:
        # Whatever libraries and factories print must not get between the lines of the result.
        with contextlib.redirect_stdout(sys.stderr):
            precision = None if dtype is None else getattr(torch, dtype.value)
            denoiser = load_target(model, prompt, given, device, precision)
            found = examine(model, denoiser, VideoGrid(*grid) if grid else None, timing)
        if as_json:
            sys.stdout.write(found.to_json())
        else:
            console.print(describe(found))

    _or_exit(run)


@app.command()
def show(plan: Annotated[Path, typer.Argument(help="A plan file, *.evdit.json.")]) -> None:
    """Print what a plan does to each layer, and the evidence it carries."""
    from evdit_opt.plan import Plan

    _or_exit(lambda: console.print(Plan.load(plan).describe(), markup=False, highlight=False))


@exports.command()
def onnx(
    pipeline: Annotated[
        str,
        typer.Argument(
            help="'tinywan', a pipeline's folder or Hugging Face id, a transformer's folder, or "
            "module:factory."
        ),
    ],
    plan: Annotated[Path, typer.Option(help="Its plan, *.evdit.json.")],
    out: Annotated[Path, typer.Option(help="The file to write; large weights go beside it.")],
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
) -> None:
    """Write the denoiser with its sparse attention in ONNX's standard operators, at one size."""
    import torch

    from evdit_opt.export.command import export_named

    sizes = {"num_frames": frames, "height": height, "width": width}
    given = {name: value for name, value in sizes.items() if value is not None}

    def run() -> None:
        precision = None if dtype is None else getattr(torch, dtype.value)
        with contextlib.redirect_stdout(sys.stderr):
            written = export_named(
                pipeline, plan, out, prompt=prompt, sizes=given, dtype=precision, opset=opset
            )
        console.print(written, markup=False, highlight=False)

    _or_exit(run)


def _or_exit(action: object) -> None:
    try:
        action()  # type: ignore[operator]
    except EvditError as error:
        Console(stderr=True).print(f"[bold red]{type(error).__name__}[/]: ", end="")
        Console(stderr=True).print(str(error), markup=False)
        raise typer.Exit(1) from error
