"""Interleaved timing: what is compared runs in turn, so a busy machine slows all of it alike."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch

__all__ = ["interleaved_ms"]

Name = TypeVar("Name", bound=Hashable)


def interleaved_ms(
    actions: Mapping[Name, Callable[[], object]], rounds: int = 41, warmup: int = 3
) -> dict[Name, float]:
    """Median milliseconds of every action, run in turn ``rounds`` times after ``warmup`` rounds.

    On CUDA each action is followed by a synchronisation.
    """
    times: dict[Name, list[float]] = {name: [] for name in actions}
    for round_ in range(warmup + rounds):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_ >= warmup:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}
