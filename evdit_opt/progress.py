"""Progress bars with time remaining, on stderr, silent when not wanted."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["counting", "track"]

T = TypeVar("T")


def track(items: Sequence[T], what: str, shown: bool = True) -> Iterable[T]:
    """Yield ``items`` while a bar shows ``what``, how many are done, and the time remaining."""
    with _bar("ETA", shown) as progress:
        yield from progress.track(items, description=what)


@contextmanager
def counting(what: str, at_most: int, shown: bool = True) -> Iterator[Callable[[], None]]:
    """A bar for work that may end early: it shows how much there is and takes at most.

    Args:
        what: is done.
        at_most: steps.
        shown: False: no bar.

    Yields:
        To be called after each step.
    """
    with _bar("at most", shown) as progress:
        task = progress.add_task(what, total=at_most)
        yield partial(progress.advance, task)
        progress.update(task, total=progress.tasks[task].completed)  # there is no more to do


def _bar(before_time: str, shown: bool) -> Progress:
    columns = (
        TextColumn("{task.description:>24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(before_time),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), disable=not shown)
