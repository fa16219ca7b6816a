"""Drift guard: is the sparse attention still as close to dense as calibration measured?

A plan's errors hold for the weights, prompts and sampler it was made with. With a guard, one call
in ``every`` also computes dense attention at some random queries of every sparse site. Where their
error stays above what the plan expects, a warning says so, once.

Checked calls run a graph of their own, one more than without a guard, and read one tensor back.
All others run the graph they would run anyway, and wait for nothing. Of a plan that reuses
residuals the steps between refreshes are checked.
"""

import logging
import random
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evdit_opt.errors import PlanError
from evdit_opt.passes.marks import LiveGrid, SiteMark
from evdit_opt.plan import Plan

__all__ = ["Guard", "Guarding", "expected_errors"]

logger = logging.getLogger(__name__)

ROWS = 64
"""Queries of every head that are looked at in a check."""

ROUNDING = 2**-6
"""Relative errors below are no drift: twice the precision of bfloat16, in which sparse and dense
output are rounded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Guard:
    """How often to compare with dense attention, and what is too far from it.

    Attributes:
        every: calls of the model per check, on average; which one is random, so that checks do not
            fall on the same step of every run.
        tolerance: how many times the error that calibration measured is still no drift.
        checks: that many of the latest checks are taken together; fewer say nothing, because
            errors differ from step to step.
        seed: of the choice of calls and queries.

    Raises:
        PlanError: if a value is outside its range.
    """

    every: int = 50
    tolerance: float = 2.0
    checks: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if self.every < 1 or self.checks < 1 or not self.tolerance >= 1.0:
            raise PlanError(
                f"expected every >= 1, checks >= 1 and tolerance >= 1, got {self.every}, "
                f"{self.checks}, {self.tolerance}"
            )


def expected_errors(plan: Plan) -> dict[str, float]:
    """Relative error of the output of every sparse site, as far as the plan knows.

    Raises:
        PlanError: if it knows none.
    """
    frames = (plan.calibrated_at or plan.grid).frames
    reusing = () if plan.reuse is None else plan.reuse.sites
    found = {}
    for site in plan.sites:
        if site.rule is None:
            continue
        if site.error is not None:
            found[site.name] = site.error
        elif site.name not in reusing and site.second is None:
            rule = site.rule.describe(frames)
            known = [own.output for own in site.errors if own.rule == rule]
            if known:
                found[site.name] = known[0]
    if not found:
        raise PlanError(
            "expected a plan that knows the error of a site, to guard it by, this one knows none: "
            "it was made by hand, for another size, or by an earlier version; make it with "
            "evdit_opt.make_plan, or leave out guard"
        )
    return found


class Guarding:
    """The call of an optimized model, checked now and then.

    Args:
        call: what is checked.
        guard: how often.
        expected: relative error by site.
        sites: their marks.
        live: of the model.
    """

    def __init__(
        self,
        call: Callable[..., Any],
        guard: Guard,
        expected: Mapping[str, float],
        sites: Mapping[str, SiteMark],
        live: LiveGrid,
    ) -> None:
        self._call, self._guard, self._live = call, guard, live
        self._expected, self._sites = dict(expected), dict(sites)
        self._seen: dict[str, deque[tuple[float, float]]] = {
            name: deque(maxlen=guard.checks) for name in expected
        }
        self._random = random.Random(guard.seed)
        self._rows = torch.Generator().manual_seed(guard.seed)
        self._checking = threading.Lock()
        self._over = False
        self._calls, self._next = 0, self._random.randrange(guard.every)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._over:
            return self._call(*args, **kwargs)
        due = self._calls >= self._next and self._live.mode in ("sparse", "reuse")
        self._calls += 1
        # A check that another thread has begun is enough.
        if not due or not self._checking.acquire(blocking=False):
            return self._call(*args, **kwargs)
        try:
            return self._check(args, kwargs)
        finally:
            self._checking.release()

    def _check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        device = next((x.device for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        try:
            self._live.rows = torch.rand(ROWS, generator=self._rows).to(device)
            drifts = {name: torch.zeros(2, device=device) for name in self._sites}
            for name, mark in self._sites.items():
                mark.drift = drifts[name]
            output = self._call(*args, **kwargs)
        finally:
            self._live.rows = None
            for mark in self._sites.values():
                mark.drift = None
        period = -(-self._calls // self._guard.every)
        self._next = period * self._guard.every + self._random.randrange(self._guard.every)
        self._judge(dict(zip(drifts, torch.stack(list(drifts.values())).tolist(), strict=True)))
        return output

    def error(self, name: str) -> float:
        """Relative error of a site over the latest checks, as calibration computes it."""
        wrong, right = (sum(part) for part in zip(*self._seen[name], strict=True))
        return float((wrong / right) ** 0.5)

    def _judge(self, drifts: Mapping[str, tuple[float, float]]) -> None:
        worst, found = 0.0, None
        for name, (wrong, right) in drifts.items():
            if right == 0.0:
                continue  # dense at this size
            seen = self._seen[name]
            seen.append((wrong, right))
            error = self.error(name)
            excess = error / (self._guard.tolerance * self._expected[name] + ROUNDING)
            if len(seen) == self._guard.checks and not excess <= max(1.0, worst):
                worst, found = excess, (name, error, self._expected[name])
        if found is None:
            return
        self._over = True
        logger.warning(
            "%s is off dense attention by %.3f, calibration measured %.3f (relative errors, over "
            "%d checks): weights, adapters, sampler or clips are not those that this plan "
            "was made with. Make it again with evdit_opt.make_plan; evdit_opt.restore(model) is "
            "exact until then. Checks end here",
            *found,
            self._guard.checks,
        )
