"""What a few-step schedule is made of, checked; also what its JSON configuration holds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from evdit_opt.errors import SchedulerError
from evdit_opt.sampling.levels import NoiseLevels
from evdit_opt.sampling.placement import even, log_snr, subdivide, to_indices

__all__ = ["FewStepSettings"]

PLACEMENTS = ("even", "log_snr")


@dataclass(frozen=True, kw_only=True, slots=True)
class FewStepSettings:
    """The arguments of `FewStepScheduler`, described there."""

    steps: int
    segments: int | None = None
    full_steps: int = 50
    placement: str | Sequence[float] = "even"
    time_shift: float = 1.0
    gamma: float = 0.0

    def __post_init__(self) -> None:
        counts = {"steps": self.steps, "full_steps": self.full_steps}
        if self.segments is not None:
            counts["segments"] = self.segments
        for name, value in counts.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise SchedulerError(
                    f"expected {name} to be an integer of at least 1, got {value!r}"
                )
        if self.segments is not None and self.segments > self.steps:
            raise SchedulerError(
                f"expected at most as many segments as steps ({self.steps}), got {self.segments}; "
                "every segment needs a call of the model"
            )
        if self.steps > self.full_steps:
            raise SchedulerError(
                f"expected full_steps of at least steps ({self.steps}), got {self.full_steps}; "
                "it is the length of the schedule that is shortened"
            )
        for name, number in (("time_shift", self.time_shift), ("gamma", self.gamma)):
            if not isinstance(number, (int, float)) or isinstance(number, bool):
                raise SchedulerError(f"expected {name} to be a number, got {number!r}")
        if not 0 <= self.gamma <= 1:
            raise SchedulerError(
                f"expected gamma in [0, 1], got {self.gamma}; 0 adds no noise, 1 renews all of it"
            )
        if self.gamma and self.segments is None:
            raise SchedulerError(
                f"expected gamma 0 without segments, got {self.gamma}; noise is added at the edges "
                "of segments, set segments"
            )
        if not 0 < self.time_shift < math.inf:
            raise SchedulerError(f"expected time_shift above 0, got {self.time_shift}")
        if self.time_shift != 1 and self.placement != "even":
            raise SchedulerError(
                f"expected time_shift 1 with placement {self.placement!r}, got {self.time_shift}; "
                "only 'even' has a time to shift"
            )
        self._check_placement()

    def indices(self, levels: NoiseLevels) -> tuple[list[int], frozenset[int]]:
        """Where the steps lie in a schedule, and which of them end a segment.

        Args:
            levels: of the schedule's n points and the terminal one.

        Returns:
            The index of each step's point; the numbers of the steps that land on a segment's edge.
        """
        n = len(levels.alpha) - 1
        count = self.segments or self.steps
        if self.placement == "even":
            positions = even(count, self.time_shift)
        elif isinstance(self.placement, str):
            positions = log_snr(levels, count)
        else:
            positions = list(self.placement)
        edges = to_indices(positions, n)
        indices = subdivide(edges, n, self.steps)
        landing = {index - 1 for index in map(indices.index, edges[1:])} | {self.steps - 1}
        return indices, frozenset(landing)

    def _check_placement(self) -> None:
        if isinstance(self.placement, str):
            if self.placement not in PLACEMENTS:
                raise SchedulerError(
                    f"expected placement 'even', 'log_snr' or a list of positions, got "
                    f"{self.placement!r}"
                )
            return
        count = self.segments or self.steps
        values = self.placement
        numbers = isinstance(values, Sequence) and all(isinstance(v, (int, float)) for v in values)
        if not numbers or len(values) != count or values[0] != 0 or not values[-1] < 1:
            raise SchedulerError(
                f"expected {count} positions from 0 to below 1, got {values!r}; one for the start "
                "of every segment, or of every step without segments"
            )
        if any(not low < high for low, high in pairwise(values)):
            raise SchedulerError(f"expected rising positions, got {values!r}")
