"""Progress bars with time remaining, on stderr, silent when not wanted."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["track"]

T = TypeVar("T")


def track(items: Sequence[T], what: str, shown: bool = True) -> Iterable[T]:
    """Yield ``items`` while a bar shows ``what``, how many are done, and the time remaining."""
    columns = (
        TextColumn("{task.description:>24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as progress:
        yield from progress.track(items, description=what)
