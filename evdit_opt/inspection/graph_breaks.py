"""Where Dynamo breaks the graph of a model, in the words it uses itself."""

import linecache
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["GraphBreak", "recorded_breaks"]

# `torch._dynamo.explain` and `counters["graph_break"]` miss breaks that make Dynamo give up a whole
# function (one inside a loop over blocks, say); what these two loggers write misses none.
LOGGERS = ("torch._dynamo.symbolic_convert", "torch._dynamo.convert_frame")
PLACE = re.compile(r"Graph break[^\n]* in user code at (.+):(\d+)\nGraph Break Reason: (.*)", re.S)
SKIPPED = re.compile(r"will skip tracing the frame.*File \"(.+?)\", line (\d+)", re.S)
PREAMBLES = ("Encountered graph break when", "Failed to handle graph break")
GIVES_UP = "Failed to handle graph break gracefully. Skipping the function"


@dataclass(frozen=True)
class GraphBreak:
    """One line at which Dynamo's graph ends.

    Attributes:
        file: path of the source file.
        line: line number in it.
        code: that line.
        reason: what Dynamo cannot trace there.
        whole_function: True if it leaves the function around the line untraced altogether.
    """

    file: str
    line: int
    code: str
    reason: str
    whole_function: bool


@contextmanager
def recorded_breaks() -> Iterator[dict[tuple[str, int], GraphBreak]]:
    """While active, every break of a graph that Dynamo traces, once per line of source."""
    found: dict[tuple[str, int], GraphBreak] = {}
    handler = _Recorder(found)
    loggers = [logging.getLogger(f"{name}.__graph_breaks") for name in LOGGERS]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
        logger.propagate = False  # for our eyes only: nobody asked to see the log
    try:
        yield found
    finally:
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate


class _Recorder(logging.Handler):
    def __init__(self, found: dict[tuple[str, int], GraphBreak]) -> None:
        super().__init__()
        self.found = found

    def emit(self, record: logging.LogRecord) -> None:
        broken = read_break(record.getMessage())
        if broken is None:
            return
        place = (broken.file, broken.line)
        known = self.found.setdefault(place, broken)
        if broken.whole_function and not known.whole_function:
            self.found[place] = broken


def read_break(message: str) -> GraphBreak | None:
    """A break from one of Dynamo's log messages; None if the message is about something else."""
    placed = PLACE.search(message)
    if placed is None:
        skipped = SKIPPED.search(message)
        if skipped is None:
            return None
        reason = "the function cannot be resumed after a break"
        return _graph_break(skipped[1], int(skipped[2]), reason, True)
    lines = [line.strip() for line in placed[3].splitlines() if line.strip()]
    kind = next((line for line in lines if not line.startswith(PREAMBLES)), "unknown")
    explained = [line.removeprefix("Explanation: ") for line in lines if "Explanation: " in line]
    reason = f"{kind}: {explained[0]}" if explained else kind
    return _graph_break(placed[1], int(placed[2]), reason, lines[0].startswith(GIVES_UP))


def _graph_break(file: str, line: int, reason: str, whole_function: bool) -> GraphBreak:
    return GraphBreak(file, line, linecache.getline(file, line).strip(), reason, whole_function)
