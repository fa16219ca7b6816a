"""The ``evdit`` command."""

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
console = Console()


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
        str, typer.Argument(help="'tinywan', a pipeline folder, or a Hugging Face model id.")
    ],
    frames: Annotated[
        int | None, typer.Option(help="Video frames to generate, in pixels' time.")
    ] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Any prompt; only the first denoiser call runs.")
    ] = None,
) -> None:
    """List every attention of a model: which can be sparse, in what token layout, or why not."""
    from evdit_opt.inspection import inspect_pipeline

    sizes = {"num_frames": frames, "height": height, "width": width}
    kwargs = {name: value for name, value in sizes.items() if value is not None}
    _or_exit(lambda: console.print(inspect_pipeline(model, prompt, kwargs)))


@app.command()
def show(plan: Annotated[Path, typer.Argument(help="A plan file, *.evdit.json.")]) -> None:
    """Print what a plan does to each layer, and the evidence it carries."""
    from evdit_opt.plan import Plan

    _or_exit(lambda: console.print(Plan.load(plan).describe(), markup=False, highlight=False))


def _or_exit(action: object) -> None:
    try:
        action()  # type: ignore[operator]
    except EvditError as error:
        Console(stderr=True).print(f"[bold red]{type(error).__name__}[/]: ", end="")
        Console(stderr=True).print(str(error), markup=False)
        raise typer.Exit(1) from error
