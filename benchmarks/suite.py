"""What the parts of a benchmark suite share: its rows, its time, and what failed."""

import gc
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.measure import Rows
from benchmarks.shapes import MODELS, TINY, Shape

__all__ = ["Suite"]


@dataclass(kw_only=True)
class Suite:
    """What all parts share.

    Attributes:
        device: "cuda", or "cpu" for a dry run.
        tiny: small shapes and few rounds.
        rows: what was measured.
        budget: seconds for the whole run.
        rounds: timed rounds.
        failed: what could not be measured.
    """

    device: str
    tiny: bool
    rows: Rows
    budget: float
    rounds: int
    begin: float = field(default_factory=time.monotonic)
    longest: float = 0.0
    compiled: dict[Any, Any] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    @property
    def shapes(self) -> tuple[Shape, ...]:
        return TINY if self.tiny else MODELS

    def due(self, names: list[str]) -> bool:
        """Whether some of these rows are missing, and there is time for what has taken longest."""
        left = self.budget - (time.monotonic() - self.begin)
        return any(name not in self.rows for name in names) and left > 1.2 * self.longest

    def take_time(self, name: str, work: Callable[[], None]) -> None:
        """Free what the last piece of work held, do one, and remember how long it took.

        Whatever is wrong with one piece must not cost the others: a GPU is lent for minutes.
        """
        start = time.monotonic()
        try:
            gc.collect()
            if self.device == "cuda":
                torch.cuda.empty_cache()
            work()
        except Exception:
            self.failed.append(name)
            print(f"{name} failed:\n{traceback.format_exc()}", flush=True)
        self.longest = max(self.longest, time.monotonic() - start)
