"""Residual reuse: what a mask drops changes slowly from one denoising step to the next.

On a *refresh* step a site computes dense attention and keeps the residual, dense - sparse; on the
steps between it returns sparse + residual. The idea is residual sharing of DiTFastAttn (Yuan et
al., arXiv 2406.08552), there for windows within an image.

The step's mode is a string that Dynamo guards, so there is one compiled graph per mode, and the
residuals are inputs that a refresh writes to. State belongs to one generation and one guidance
branch: see :class:`Reusing`.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from evdit_opt.errors import PlanError, UnsupportedInputError
from evdit_opt.masks import Rule
from evdit_opt.passes.marks import LiveGrid, SiteMark
from evdit_opt.passes.swap_attention import ResidualMissing
from evdit_opt.plan import Plan, ReuseRecord

__all__ = ["Reusing", "refresh_every", "with_reuse"]

logger = logging.getLogger(__name__)

MAX_GENERATIONS = 4
"""Generations and guidance branches whose residuals are kept at a time; the oldest gives way."""

STRANGERS = 8
"""Calls in a row that continue no generation, after which it is worth telling the user."""


def refresh_every(levels: Sequence[float], steps: int) -> tuple[float, ...]:
    """Refresh levels for every ``steps``-th step of a run.

    Args:
        levels: the noise levels of the run in order, as its model is told them.
        steps: distance of the refreshes; 1 refreshes always.

    Raises:
        PlanError: if steps is below 1, or levels is empty.
    """
    if steps < 1 or not levels:
        raise PlanError(f"expected steps >= 1 and at least one level, got {steps}, {len(levels)}")
    return tuple(float(level) for level in levels[::steps])


def with_reuse(
    plan: Plan,
    refresh_at: Sequence[float],
    *,
    rule: Rule | None = None,
    sites: Sequence[str] | None = None,
    timestep: str = "timestep",
) -> Plan:
    """The plan with residual reuse.

    Args:
        plan: as calibration made it.
        refresh_at: noise levels, descending, in units of the model's timestep argument.
        rule: what the sites compute between refreshes; None keeps each site's own rule. Use an
            unweighted one: the residual already carries what weighting imitates.
        sites: which sites reuse; None: all that have a rule.
        timestep: the parameter of the model's forward that holds the noise level.

    Raises:
        PlanError: if a site has no rule, or a level is out of range.
    """
    names = tuple(plan.rules) if sites is None else tuple(sites)
    record = ReuseRecord(sites=names, timestep=timestep, refresh_at=tuple(refresh_at))
    if rule is None:
        return replace(plan, reuse=record)
    density = rule.mask(plan.grid.frames).density
    changed = tuple(
        replace(s, rule=rule, density=density, reason="between refreshes") if s.name in names else s
        for s in plan.sites
    )
    return replace(plan, sites=changed, reuse=record, quality=None, speed=None)


@dataclass(frozen=True)
class _Like:
    """What a residual looks like."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass
class _Generation:
    """One generation in one guidance branch.

    Attributes:
        level: noise level of the latest step.
        storages: of the conditioning that tells the generation from others.
        shapes: shapes and dtypes of the call's tensors, on which those of the residuals depend.
        refreshed: how many refresh levels lay at or above the latest refresh; 0: not refreshed yet.
        residuals: by site, like the output of its attention.
    """

    level: float
    storages: tuple[StorageWeakRef, ...]
    shapes: tuple[Any, ...]
    refreshed: int = 0
    residuals: dict[str, Tensor] = field(default_factory=dict)

    @property
    def is_over(self) -> bool:
        """Whether its conditioning is gone, so that no call can continue it."""
        return any(storage.expired() for storage in self.storages)


class Reusing:
    """The compiled call of a model whose sites reuse residuals.

    A call continues a generation if it comes from the same thread, with the same conditioning (the
    very tensors, still alive: every argument but the video and the timestep), at a lower noise
    level. Anything else starts anew with a refresh: another prompt or guidance branch, another
    batch, another pipeline sharing the model, the next video. So residuals never pass from one to
    another. The timestep is read back once a call.
    """

    def __init__(
        self,
        call: Callable[..., Any],
        record: ReuseRecord,
        video: str,
        parameters: Sequence[str],
        live: LiveGrid,
        sites: Mapping[str, nn.Module],
    ) -> None:
        self._call, self._record, self._video = call, record, video
        self._parameters, self._live = tuple(parameters), live
        self._marks: dict[str, SiteMark] = {
            name: sites[name]._evdit_site  # type: ignore[misc]
            for name in record.sites
        }
        self._generations: OrderedDict[Any, _Generation] = OrderedDict()
        self._like: dict[tuple[Any, ...], dict[str, _Like]] = {}  # by shapes of a call, and site
        self._strangers = 0
        # The mode and the residuals hang on the model while it runs.
        self._running = threading.Lock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = dict(zip(self._parameters, args, strict=False)) | kwargs
        with self._running:
            return self._step(arguments, args, kwargs)

    def _step(self, arguments: dict[str, Any], args: Any, kwargs: Any) -> Any:
        level = self._level(arguments)
        due = sum(level <= at * (1 + 1e-6) for at in self._record.refresh_at)
        generation = self._generation(arguments, level)
        if due == 0:
            self._live.mode = "dense"
        elif due > generation.refreshed:
            self._live.mode = "refresh"
        else:
            self._live.mode = "reuse"
        finished = False
        try:
            output = self._run(generation, args, kwargs)
            finished = True
        finally:
            self._live.mode = "sparse"
            for mark in self._marks.values():
                mark.residual = None
            if not finished:
                generation.refreshed = 0  # a refresh may have written some residuals
        generation.refreshed = due
        return output

    def _run(self, generation: _Generation, args: Any, kwargs: Any) -> Any:
        """Run the model; where it says what its residuals look like, make them and run again."""
        if not generation.residuals and generation.shapes in self._like:
            self._make_residuals(generation)
        for _ in range(len(self._marks) + 1):
            for name, mark in self._marks.items():
                mark.residual = generation.residuals.get(name, _NONE)
            try:
                return self._call(*args, **kwargs)
            except ResidualMissing as missing:  # of an attention outside all graphs
                self._learn(generation.shapes, missing.like)
            except torch._dynamo.exc.BackendCompilerFailed as error:
                missing_in_graph = error.inner_exception
                if not isinstance(missing_in_graph, ResidualMissing):
                    raise
                self._learn(generation.shapes, missing_in_graph.like)
            self._make_residuals(generation)
        raise AssertionError("every site has named its residual once")

    def _learn(self, shapes: tuple[Any, ...], like: Mapping[str, Tensor]) -> None:
        # Layers that share a compiled graph are known by the first one's name: all get its shape.
        found = {
            name: _Like(tuple(int(size) for size in x.shape), x.dtype, x.device)
            for name, x in like.items()
        }
        first = next(iter(found.values()))
        known = self._like.setdefault(shapes, dict.fromkeys(self._marks, first))
        known.update({name: like for name, like in found.items() if name in known})

    def _make_residuals(self, generation: _Generation) -> None:
        residuals = generation.residuals
        for name, like in self._like[generation.shapes].items():
            if name not in residuals or residuals[name].shape != like.shape:
                residuals[name] = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
        size = sum(x.numel() * x.element_size() for x in residuals.values())
        logger.info("residuals of %d sites take %.1f MiB", len(residuals), size / 2**20)

    def _level(self, arguments: Mapping[str, Any]) -> float:
        name = self._record.timestep
        value = arguments.get(name)
        if value is None:
            raise UnsupportedInputError(
                f"expected the noise level in the argument {name!r} of the model's forward, got a "
                "call without it; this plan reuses residuals by noise level"
            )
        levels = value.reshape(-1).tolist() if isinstance(value, Tensor) else [value]
        if not levels or any(level != levels[0] for level in levels):
            raise UnsupportedInputError(
                f"expected one noise level for the whole batch in {name!r}, got {levels[:4]}; this "
                "plan reuses residuals, which belong to one step"
            )
        return float(levels[0])

    def _generation(self, arguments: Mapping[str, Any], level: float) -> _Generation:
        conditioning = {
            name: value
            for name, value in arguments.items()
            if isinstance(value, Tensor) and name not in (self._video, self._record.timestep)
        }
        tensors = {**conditioning, self._video: arguments.get(self._video)}
        shapes = tuple(
            (name, tuple(x.shape), x.dtype, x.device)
            for name, x in tensors.items()
            if isinstance(x, Tensor)
        )
        places = tuple(x.data_ptr() for x in conditioning.values())
        key = (threading.get_ident(), shapes, places)
        known = self._generations.get(key)
        if known is not None and level < known.level and not known.is_over:
            known.level = level
            self._strangers = 0
        else:
            self._tell_strangers(known is None)
            storages = tuple(StorageWeakRef(x.untyped_storage()) for x in conditioning.values())
            known = _Generation(level, storages, shapes, 0, self._spare_residuals(key, shapes))
            self._generations[key] = known
        self._generations.move_to_end(key)
        while len(self._generations) > MAX_GENERATIONS:
            self._generations.popitem(last=False)
        return known

    def _spare_residuals(self, key: Any, shapes: tuple[Any, ...]) -> dict[str, Tensor]:
        """The buffers of a generation that is over; other generations that are over are dropped."""
        over = [k for k, known in self._generations.items() if k == key or known.is_over]
        dropped = [self._generations.pop(k) for k in over]
        return next((known.residuals for known in dropped if known.shapes == shapes), {})

    def _tell_strangers(self, is_new: bool) -> None:
        self._strangers += is_new
        if self._strangers == STRANGERS:
            logger.warning(
                "%d calls in a row continued no generation, so each computed dense attention: the "
                "conditioning of this pipeline is made anew in every step. Pass tensors that "
                "stay, or use a plan without reuse",
                STRANGERS,
            )


_NONE = torch.empty(0)
"""The residual of a site before anything is known about it."""
