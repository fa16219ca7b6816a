"""What the subcommands share: where they print, how they fail, how a model is named."""

import contextlib
import enum
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from evdit_opt.errors import (
    CalibrationError,
    EvditError,
    QualityFloorError,
    UnsupportedInputError,
)

__all__ = [
    "MODEL_HELP",
    "AsJson",
    "Precision",
    "console",
    "given",
    "only_result_on_stdout",
    "or_exit",
    "require_known",
    "require_prompts_used",
    "require_writable",
    "tell_error",
    "write_json",
    "writing",
]

MODEL_HELP = (
    "'tinywan', a pipeline's folder or Hugging Face id, a transformer's folder, or "
    "module:factory (returns a pipeline, or a module and the kwargs of a call)."
)
AsJson = Annotated[
    bool, typer.Option("--json", help="One JSON object on stdout, and nothing else.")
]
BELOW_FLOOR, INTERRUPTED = 3, 130
console = Console()


class Precision(enum.Enum):
    """What a model may be run in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def or_exit(action: Callable[[], object], code: int = 1) -> None:
    """Run; one of our errors becomes one line on stderr and an exit code.

    Args:
        action: what to run.
        code: for all errors but a missed quality floor, which is 3. An interruption is 130, as
            shells have it; wrong usage is 2, by typer.
    """
    try:
        action()
    except QualityFloorError as error:
        tell_error(error)
        raise typer.Exit(BELOW_FLOOR) from error
    except EvditError as error:
        tell_error(error)
        raise typer.Exit(code) from error
    except KeyboardInterrupt as error:
        Console(stderr=True).print("interrupted")
        raise typer.Exit(INTERRUPTED) from error


def tell_error(error: EvditError) -> None:
    """One line on stderr."""
    errors = Console(stderr=True, soft_wrap=True)
    errors.print(f"[bold red]{type(error).__name__}[/]: ", end="")
    errors.print(str(error), markup=False, highlight=False)


@contextlib.contextmanager
def only_result_on_stdout() -> Iterator[None]:
    """Whatever libraries and factories print must not get between the lines of the result."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def given(**options: Any) -> dict[str, Any]:
    """The options that were given: those that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def require_writable(out: Path) -> None:
    """Say before hours of work that the result will have nowhere to go.

    Raises:
        UnsupportedInputError: if the folder of ``out`` is missing, or ``out`` is a folder.
    """
    if not out.parent.is_dir() or out.is_dir():
        raise UnsupportedInputError(f"expected a file to write in a folder there is, got {out}")
    if not os.access(out.parent, os.W_OK):
        raise UnsupportedInputError(f"expected a folder that may be written to, got {out.parent}")


def require_known(unfinished: Path, resume: bool) -> None:
    """Refuse to go on with, or to lose, what a killed command has finished, without being told.

    Raises:
        CalibrationError: if it is there, and nobody asked for it.
    """
    if unfinished.exists() and not resume:
        raise CalibrationError(
            f"expected nothing unfinished, found {unfinished}; go on with it by --resume, or "
            "remove it"
        )


@contextlib.contextmanager
def writing(out: Path) -> Iterator[None]:
    """The block writes ``out``.

    Raises:
        UnsupportedInputError: if the disk does not take it.
    """
    try:
        yield
    except OSError as error:
        raise UnsupportedInputError(f"expected to write {out}: {error}") from error


def require_prompts_used(name: str, items: Sequence[Any]) -> None:
    """Refuse prompts for a model that comes with calls: nothing would look at them.

    Raises:
        UnsupportedInputError: if ``items``, what ``name`` is run on, are no prompts.
    """
    if items and not isinstance(items[0], str):
        raise UnsupportedInputError(f"expected no prompts: {name} comes with calls of its own")


def write_json(value: dict[str, Any]) -> None:
    """One object on stdout, keys sorted."""
    sys.stdout.write(json.dumps(value, indent=2, sort_keys=True) + "\n")
