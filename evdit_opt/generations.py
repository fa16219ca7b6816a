"""Which denoising run a call of the model belongs to, and what the step asks of the sites.

State of one generation must never reach another. A call continues a generation if it comes from the
same thread, with the same conditioning (the very tensors, still alive: every argument but the video
and the timestep), at a lower noise level. Anything else starts anew: another prompt or guidance
branch, another batch, another pipeline sharing the model, the next video.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from evdit_opt.errors import UnsupportedInputError
from evdit_opt.kernels.residual import Residual
from evdit_opt.plan import ReuseRecord

__all__ = ["MAX_GENERATIONS", "STRANGERS", "Generation", "Generations", "noise_level"]

logger = logging.getLogger(__name__)

MAX_GENERATIONS = 4
"""Generations and guidance branches whose residuals are kept at a time; the oldest gives way."""

STRANGERS = 8
"""Calls in a row that continue no generation, after which it is worth telling the user."""


@dataclass
class Generation:
    """One generation in one guidance branch.

    Attributes:
        level: noise level of the latest step.
        storages: of the conditioning that tells the generation from others.
        shapes: shapes, dtypes and autocast of the call's tensors, on which those of the residuals
            depend.
        step: number of the latest step, from 0.
        due: how many refresh levels lie at or above the running step.
        refreshed: the same for the latest step that ran to its end; 0: not refreshed yet.
        residuals: by site, of what its mask drops.
        slopes: by site, the change of the residual from one refresh to the next; none before the
            second, or if nothing is carried on.
        ahead: how much of the slopes the residuals hold by now.
        refreshed_at: noise levels of the last two refreshes that ran to their end.
    """

    level: float
    storages: tuple[StorageWeakRef, ...]
    shapes: tuple[Any, ...]
    step: int = 0
    due: int = 0
    refreshed: int = 0
    residuals: dict[str, Residual] = field(default_factory=dict)
    slopes: dict[str, Tensor] = field(default_factory=dict)
    ahead: float = 0.0
    refreshed_at: tuple[float, ...] = ()

    @property
    def is_over(self) -> bool:
        """Whether its conditioning is gone, so that no call can continue it."""
        return any(storage.expired() for storage in self.storages)

    @property
    def mode(self) -> str:
        """What the running step asks of the sites that reuse: "dense", "refresh" or "reuse"."""
        if self.due == 0:
            return "dense"
        return "refresh" if self.due > self.refreshed else "reuse"

    @torch.no_grad()
    def begin_step(self, record: ReuseRecord) -> None:
        """Before the model runs: carry the residuals on, or take back what was added to them.

        That is a pass over memory beside the graph, which thus never sees but one residual.
        """
        if not record.trend or not self.refreshed_at:
            return
        if self.mode == "reuse" and self.slopes:
            ahead = record.ahead(self.level, self.refreshed_at)
            self._add_slopes(ahead - self.ahead)
            self.ahead = ahead
        elif self.mode == "refresh":
            self._add_slopes(-self.ahead)
            self.ahead = 0.0
            # What they were: end_step makes slopes of it.
            for name, own in self.residuals.items():
                if name in self.slopes:
                    self.slopes[name].copy_(own.value)
                else:
                    self.slopes[name] = own.value.clone()

    def _add_slopes(self, share: float) -> None:
        if self.slopes and share:
            kept = [self.residuals[name].value for name in self.slopes]
            torch._foreach_add_(kept, list(self.slopes.values()), alpha=share)

    @torch.no_grad()
    def end_step(self, finished: bool) -> None:
        """The step ran to its end, or broke off: a refresh may then have written some residuals."""
        if not finished:
            self.refreshed, self.refreshed_at, self.slopes, self.ahead = 0, (), {}, 0.0
            return
        if self.mode == "refresh":
            for name, was in self.slopes.items():
                was.neg_().add_(self.residuals[name].value)
            self.refreshed_at = (*self.refreshed_at[-1:], self.level)
        self.refreshed = self.due


class Generations:
    """The generations of one model that are alive, found again by the arguments of their calls.

    Args:
        video: the parameter of the model's forward that holds the video.
        timestep: the parameter that holds the noise level.
        record: when residuals are renewed; None: never, every step is dense.
    """

    def __init__(self, video: str, timestep: str, record: ReuseRecord | None = None) -> None:
        self._video, self._timestep = video, timestep
        self._record = record
        self._known: OrderedDict[Any, Generation] = OrderedDict()
        self._strangers = 0

    def begin(self, arguments: Mapping[str, Any]) -> Generation:
        """The generation that a call belongs to, told of its new step.

        Args:
            arguments: of the call, by name.

        Raises:
            UnsupportedInputError: if the call has no noise level, or several.
        """
        level = noise_level(arguments, self._timestep)
        generation = self._find(arguments, level)
        if self._record is not None:
            generation.due = self._record.due(level)
            generation.begin_step(self._record)
        return generation

    def __len__(self) -> int:
        return len(self._known)

    @property
    def residual_bytes(self) -> int:
        """Memory of the residuals of all of them."""
        return sum(
            own.nbytes
            for known in self._known.values()
            for kept in (known.residuals, known.slopes)
            for own in kept.values()
        )

    def _find(self, arguments: Mapping[str, Any], level: float) -> Generation:
        conditioning = {
            name: value
            for name, value in arguments.items()
            if isinstance(value, Tensor) and name not in (self._video, self._timestep)
        }
        tensors = {**conditioning, self._video: arguments.get(self._video)}
        shapes = tuple(
            (name, tuple(x.shape), x.dtype, x.device, _computed_in(x))
            for name, x in tensors.items()
            if isinstance(x, Tensor)
        )
        places = tuple(x.data_ptr() for x in conditioning.values())
        key = (threading.get_ident(), shapes, places)
        known = self._known.get(key)
        if known is not None and level < known.level and not known.is_over:
            known.level = level
            known.step += 1
            self._strangers = 0
        else:
            self._tell_strangers(known is None)
            storages = tuple(StorageWeakRef(x.untyped_storage()) for x in conditioning.values())
            spare = self._spare_residuals(key, shapes)
            known = Generation(level, storages, shapes, residuals=spare)
            self._known[key] = known
        self._known.move_to_end(key)
        while len(self._known) > MAX_GENERATIONS:
            self._known.popitem(last=False)
        return known

    def _spare_residuals(self, key: Any, shapes: tuple[Any, ...]) -> dict[str, Residual]:
        """The buffers of a generation that is over; other generations that are over are dropped."""
        over = [k for k, known in self._known.items() if k == key or known.is_over]
        dropped = [self._known.pop(k) for k in over]
        return next((known.residuals for known in dropped if known.shapes == shapes), {})

    def _tell_strangers(self, is_new: bool) -> None:
        self._strangers += is_new
        if self._strangers == STRANGERS and self._record is not None:
            logger.warning(
                "%d calls in a row continued no generation, so each computed dense attention: the "
                "conditioning of this pipeline is made anew in every step. Pass tensors that "
                "stay, or use a plan without reuse",
                STRANGERS,
            )


def _computed_in(value: Tensor) -> torch.dtype | None:
    """What autocast, if it is on, computes in: residuals are of that precision, too."""
    device = value.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def noise_level(arguments: Mapping[str, Any], timestep: str) -> float:
    """The noise level of a call.

    Args:
        arguments: of the call, by name.
        timestep: which of them holds the level: a number, or a tensor with one for the whole batch.

    Raises:
        UnsupportedInputError: if there is none, or there are several.
    """
    value = arguments.get(timestep)
    if value is None:
        raise UnsupportedInputError(
            f"expected the noise level in the argument {timestep!r} of the model's forward, got a "
            "call without it; reused residuals belong to a level (Config(reuse=False) does without)"
        )
    levels = value.reshape(-1).tolist() if isinstance(value, Tensor) else [value]
    if not levels or any(level != levels[0] for level in levels):
        raise UnsupportedInputError(
            f"expected one noise level for the whole batch in {timestep!r}, got {levels[:4]}; "
            "residuals that are reused belong to one step (Config(reuse=False) does without)"
        )
    return float(levels[0])
