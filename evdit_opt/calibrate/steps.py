"""Which denoising run, step and guidance branch a call of the model belongs to, while recording."""

import inspect
import logging
from collections.abc import Mapping
from typing import Any

from evdit_opt.errors import UnsupportedInputError
from evdit_opt.generations import Generation, Generations
from evdit_opt.models import Denoiser

__all__ = ["TIMESTEP", "Steps"]

logger = logging.getLogger(__name__)

TIMESTEP = "timestep"
"""The parameter of a denoiser's forward that holds the noise level, in all of diffusers."""


class Steps:
    """Listens to the calls of a model.

    Args:
        denoiser: the model and how to run it.
        video: the parameter of its forward that holds the video.
        needed: whether a call without one noise level is an error. If not, steps are not told apart
            from then on.

    Attributes:
        timed: whether the model is called once a step, with a noise level.
        now: the run and branch of the running call; None unless timed.
        levels: noise level by step, as first seen.
    """

    def __init__(self, denoiser: Denoiser, video: str, needed: bool = False) -> None:
        self._needed = needed
        parameters = inspect.signature(denoiser.model.forward).parameters
        self.timed = denoiser.makes_video and TIMESTEP in parameters
        self._generations = Generations(video, TIMESTEP) if self.timed else None
        self.now: Generation | None = None
        self.levels: dict[int, float] = {}
        self._seen: list[Generation] = []

    def listen(self, arguments: Mapping[str, Any]) -> None:
        """A call begins; ``arguments`` by name."""
        if self._generations is None:
            return
        try:
            self.now = self._generations.begin(arguments)
        except UnsupportedInputError as error:
            if self._needed:
                raise
            logger.warning("steps and guidance branches are not told apart: %s", error)
            self.timed, self._generations, self.now = False, None, None
            return
        self.levels.setdefault(self.now.step, self.now.level)
        if not any(self.now is one for one in self._seen):
            self._seen.append(self.now)

    @property
    def step(self) -> int:
        """Number of the running step, from 0."""
        return 0 if self.now is None else self.now.step

    @property
    def branch(self) -> int:
        """Number of the running guidance branch, in the order of this run."""
        return next((n for n, one in enumerate(self._seen) if one is self.now), 0)

    @property
    def branches(self) -> int:
        """Guidance branches that this run has called one by one."""
        return max(1, len(self._seen))

    def end_run(self) -> None:
        """A run is over."""
        self._seen = []
