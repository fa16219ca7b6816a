"""Residual reuse: what a mask drops changes slowly from one denoising step to the next.

On a *refresh* step a site computes dense attention and keeps the residual, dense - sparse; on the
steps between it returns sparse + residual. The idea is residual sharing of DiTFastAttn (Yuan et
al., arXiv 2406.08552), there for windows within an image.

Where the plan says so, a residual is carried on along its last change (see
``calibrate.trend``), outside of the graph.

The step's mode is a string that Dynamo guards, so there is one compiled graph per mode, and the
residuals are inputs that a refresh writes to. State belongs to one generation and one guidance
branch: see :mod:`evdit_opt.generations`.
"""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from evdit_opt.errors import PlanError
from evdit_opt.generations import Generation, Generations
from evdit_opt.grid import TokenLayout
from evdit_opt.kernels.residual import Precision, Residual, empty_residual
from evdit_opt.masks import Rule
from evdit_opt.passes.marks import LiveGrid, SiteMark
from evdit_opt.passes.swap_attention import ResidualMissing
from evdit_opt.plan import Plan, ReuseRecord

__all__ = ["Reusing", "refresh_every", "with_reuse", "without_reuse"]

logger = logging.getLogger(__name__)


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
    levels: Sequence[float] = (),
    precision: Precision = "model",
) -> Plan:
    """The plan with residual reuse.

    Args:
        plan: as calibration made it.
        refresh_at: noise levels, descending, in units of the model's timestep argument.
        rule: what the sites compute between refreshes; None keeps each site's own rule. Use an
            unweighted one: the residual already carries what weighting imitates. ``CACHED``: no
            attention at all, the last output is returned.
        sites: which sites reuse; None: all that have a rule.
        timestep: the parameter of the model's forward that holds the noise level.
        levels: noise levels of all steps of a run, for ``plan.density``.
        precision: in which residuals are kept; see ``kernels.residual``.

    Raises:
        PlanError: if a site has no rule, or keeps two, or a level is out of range.
    """
    names = tuple(plan.rules) if sites is None else tuple(sites)
    record = ReuseRecord(
        sites=names,
        timestep=timestep,
        refresh_at=tuple(refresh_at),
        levels=tuple(levels),
        precision=precision,
    )
    changed = []
    for site in plan.sites:
        if site.name in names:
            site = replace(site, error=None)
        if site.name in names and rule is not None:
            layout = TokenLayout(plan.grid, site.layout.prefix, site.layout.suffix)
            density = rule.density(layout)
            site = replace(
                site, rule=rule, second=None, density=density, reason="between refreshes"
            )
        changed.append(site)
    if rule is None:
        return replace(plan, sites=tuple(changed), reuse=record)
    return replace(plan, sites=tuple(changed), reuse=record, quality=None, speed=None)


def without_reuse(plan: Plan) -> Plan:
    """The plan for calls that belong to no run: its reusing sites are dense, the others as before.

    Args:
        plan: returned as it is if no site of it reuses.
    """
    if plan.reuse is None:
        return plan
    sites = tuple(
        replace(site, rule=None, density=1.0, error=None, reason="nothing to reuse")
        if site.name in plan.reuse.sites
        else site
        for site in plan.sites
    )
    return replace(plan, sites=sites, reuse=None, quality=None, speed=None)


@dataclass(frozen=True)
class _Like:
    """What a residual looks like."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Reusing:
    """The compiled call of a model whose sites reuse residuals.

    Residuals belong to one generation in one guidance branch; see :mod:`evdit_opt.generations`. The
    timestep is read back once a call.
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
        self._call, self._parameters, self._live = call, tuple(parameters), live
        self._marks: dict[str, SiteMark] = {
            name: sites[name]._evdit_site  # type: ignore[misc]
            for name in record.sites
        }
        self._precision = record.precision
        self._generations = Generations(video, record.timestep, record)
        self._like: dict[tuple[Any, ...], dict[str, _Like]] = {}  # by shapes of a call, and site
        # The mode and the residuals hang on the model while it runs.
        self._running = threading.Lock()

    @property
    def residual_bytes(self) -> int:
        """Memory of all residuals that are kept now, of whatever generation."""
        return self._generations.residual_bytes

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = dict(zip(self._parameters, args, strict=False)) | kwargs
        with self._running:
            return self._step(arguments, args, kwargs)

    def _step(self, arguments: dict[str, Any], args: Any, kwargs: Any) -> Any:
        generation = self._generations.begin(arguments)
        self._live.mode = generation.mode
        finished = False
        try:
            output = self._run(generation, args, kwargs)
            finished = True
        finally:
            self._live.mode = "sparse"
            for mark in self._marks.values():
                mark.residual = mark.residual_scale = None
            generation.end_step(finished)
        return output

    def _run(self, generation: Generation, args: Any, kwargs: Any) -> Any:
        """Run the model; where it says what its residuals look like, make them and run again."""
        if not generation.residuals and generation.shapes in self._like:
            self._make_residuals(generation)
        for _ in range(len(self._marks) + 1):
            for name, mark in self._marks.items():
                kept = generation.residuals.get(name, _NONE)
                mark.residual, mark.residual_scale = kept
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

    def _make_residuals(self, generation: Generation) -> None:
        residuals = generation.residuals
        for name, like in self._like[generation.shapes].items():
            if name not in residuals or residuals[name].value.shape != like.shape:
                residuals[name] = empty_residual(
                    like.shape, like.dtype, like.device, self._precision
                )
        size = sum(residual.nbytes for residual in residuals.values())
        logger.info("residuals of %d sites take %.1f MiB", len(residuals), size / 2**20)


_NONE = Residual(torch.empty(0))
"""The residual of a site before anything is known about it."""
