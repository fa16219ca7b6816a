"""How much a plan may cost: by density, by speed, by quality, or by the error of single sites."""

import logging
import math
from collections.abc import Sequence

from evdit_opt.calibrate.clock import Clock
from evdit_opt.calibrate.kinds import Planner
from evdit_opt.calibrate.stage import Stage
from evdit_opt.calibrate.trial import compare_runs, rehearse_and_keep
from evdit_opt.models import Item
from evdit_opt.plan import TrialRecord
from evdit_opt.progress import track
from evdit_opt.quality import compare

__all__ = ["find_budget"]

logger = logging.getLogger(__name__)

CHEAPEST = 0.05
"""Of dense attention: where the search by quality begins."""

ROUNDS = 5
"""Of the search by quality; the budget is then within a tenth of itself."""


def find_budget(
    stage: Stage, planner: Planner, clock: Clock | None, items: Sequence[Item]
) -> tuple[float, tuple[TrialRecord, ...]]:
    """The mean price per site and step to spend (1: stay dense), and plans run to find it.

    The config's density; or its speedup, by the clock; or the least with which clips of ``items``
    keep its quality floors; or, where it says nothing, the least that keeps its threshold.
    """
    config = planner.config
    if config.density is not None:
        return config.density, ()
    if clock is not None and config.speedup is not None:
        return clock.budget(config.speedup), ()
    if config.has_floors:
        return _least_within_floors(stage, planner, items)
    return planner.budget_within_threshold(), ()


def _least_within_floors(
    stage: Stage, planner: Planner, items: Sequence[Item]
) -> tuple[float, tuple[TrialRecord, ...]]:
    """Bisection by ratios, with a run of the likeliest plan at every budget."""
    config = planner.config
    bad, good = CHEAPEST, 1.0
    explored = []
    for _ in track(range(ROUNDS), "searching by quality", config.progress):
        budget = math.sqrt(bad * good)
        drafted = planner.likeliest(budget)
        missed: tuple[str, ...] = ("no plan is this cheap",)
        if drafted is not None:
            clips = rehearse_and_keep(stage, drafted.plan, items, config)
            dense = planner.recording.results[: len(clips)]
            missed = config.missed_floors(compare(clips, dense))
            explored.append(compare_runs("searched by quality", drafted.plan, clips, dense))
        logger.info("%.3f of dense attention: %s", budget, "; ".join(missed) or "good enough")
        bad, good = (budget, good) if missed else (bad, budget)
    return good, tuple(explored)
