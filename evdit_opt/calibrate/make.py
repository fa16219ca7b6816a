"""Calibration in a straight line: survey, record, search, try, verify -> ``Plan``."""

import itertools
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from evdit_opt.apply import is_optimized
from evdit_opt.calibrate.aim import find_budget
from evdit_opt.calibrate.clock import Clock, device_name, measure_clock
from evdit_opt.calibrate.draft import Drafter
from evdit_opt.calibrate.kept import Kept, purpose
from evdit_opt.calibrate.kept_clock import kept_clock
from evdit_opt.calibrate.kinds import Drafted, Kind, Planner, unfitted_errors
from evdit_opt.calibrate.prices import Prices, kept_pairs
from evdit_opt.calibrate.problem import Found, Problem
from evdit_opt.calibrate.record import Recording, record
from evdit_opt.calibrate.refine import MOST_RUNS, refined
from evdit_opt.calibrate.residual_memory import fit_residuals
from evdit_opt.calibrate.stage import Stage, staged
from evdit_opt.calibrate.survey import survey_attention
from evdit_opt.calibrate.trial import compare_runs, mean_error, run_with_plan, try_plan
from evdit_opt.config import Config
from evdit_opt.errors import AlreadyOptimizedError, CalibrationError, QualityFloorError
from evdit_opt.models import Item, as_denoiser
from evdit_opt.plan import CalibrationRecord, Plan, TrialRecord
from evdit_opt.progress import counting, track
from evdit_opt.quality import compare

__all__ = ["choose_kind", "make_plan", "make_problem"]

logger = logging.getLogger(__name__)

BACK_OFFS = 3
"""How often a plan that misses the quality floor is made denser before giving up."""


def make_plan(
    target: object,
    calib: Iterable[Item],
    config: Config | None = None,
    *,
    keep_in: str | os.PathLike[str] | None = None,
) -> Plan:
    """Calibrate: find out where a model's 3D attention can be sparse, and how sparse.

    Runs the dense model on the calibration items and measures every candidate mask at every site
    (Efficient-vDiT, arXiv 2502.06155, Algorithm 1, with a relative threshold), and how fast what it
    drops changes from step to step. Chooses between weightings, between searched and uniform masks,
    and between static masks and residual reuse, by whole runs, and measures quality on the last
    ``config.verify_prompts`` items, which the search never sees. The model is left dense.

    Args:
        target: a diffusers video pipeline, or an ``nn.Module``.
        calib: prompts (pipeline), or dicts of forward kwargs (module).
        config: settings; ``Config()`` if None. For a pipeline, ``config.pipe_kwargs`` gives the
            size of the clips.
        keep_in: a folder for what is finished, so that a calibration that was killed goes on where
            it was: every run is kept there, one clip each. It is made if missing; what lies in it
            is taken up, and stays: remove it when the plan is saved. None: nothing is kept.

    Returns:
        The plan. Sites that stay dense are in it with the reason.

    Raises:
        AlreadyOptimizedError: if a plan is applied to the model already.
        CalibrationError: if there are too few items, or items of the wrong kind, or ``keep_in``
            holds another calibration.
        LayoutError: if frames, height and width of the token sequence cannot be established.
        NoVideoAttentionError: if the model has no 3D full self-attention.
        NonFiniteOutputError: if a run holds NaN or infinity.
        QualityFloorError: if held-out quality misses the floor also after backing off; its ``plan``
            is the best of those tried, the one of the highest mean held-out PSNR.
        UnsupportedInputError: if ``target`` is nothing this package can call.
    """
    config = config or Config()
    denoiser = as_denoiser(target, calib, config.pipe_kwargs)
    if is_optimized(denoiser.model):
        raise AlreadyOptimizedError(
            f"expected a dense {type(denoiser.model).__name__}, this one has a plan applied; "
            "call evdit_opt.restore on it first"
        )
    searched = len(denoiser.items) - config.verify_prompts
    if searched < 1:
        raise CalibrationError(
            f"expected more than {config.verify_prompts} calibration prompts or calls (the last "
            f"{config.verify_prompts} are held out to measure quality on), got "
            f"{len(denoiser.items)}; give more, or lower Config.verify_prompts"
        )
    if config.has_floors and not denoiser.makes_video:
        raise CalibrationError(
            "expected no quality floor for a module, which makes no clips to judge; give its "
            "pipeline, or Config(density=...)"
        )
    kept = Kept()
    if keep_in is not None:
        kept = Kept(Path(keep_in), purpose(target, denoiser, config))
    survey = survey_attention(denoiser, config.grid)
    drafter = Drafter(denoiser, survey, config)
    longest = max(layout.seq_len for layout in survey.layouts.values())
    if longest < config.min_tokens:
        return drafter.dense(f"{longest} tokens, fewer than min_tokens = {config.min_tokens}")

    searched_items = denoiser.items[:searched]
    with staged(denoiser, survey.layouts, survey.scoped) as stage:
        recording = record(stage, searched_items, config, survey.grid_source.input, kept)
    # Compiled models are timed without the stage.
    clock = None
    if config.speedup is not None:
        device = device_name(next(denoiser.model.parameters()).device)
        clock = kept_clock(kept, config, device, partial(measure_clock, drafter, recording))
    prices = kept_pairs(recording.errors, recording.reuse) if clock is None else clock.prices
    problem = make_problem(recording, prices, config, denoiser.model)
    planner = Planner(drafter, recording, problem, timed=clock is not None)
    with staged(denoiser, survey.layouts, survey.scoped, kept) as stage:
        rehearsed = searched_items[: config.trial_prompts]
        budget, explored = find_budget(stage, planner, clock, rehearsed)
        kind, drafted = choose_kind(stage, planner, budget, rehearsed)
    if kind is None or drafted is None:
        _tell_missed(config, budget, 1.0)
        plan = planner.all_dense(budget)
        return replace(plan, calibration=replace(plan.calibration, explored=explored))
    _tell_missed(config, budget, drafted.price)
    found = replace(drafted.plan.calibration, explored=explored)
    drafted = replace(drafted, plan=replace(drafted.plan, calibration=found))
    return _verify(drafter, kind, drafted, clock, searched, kept)


def _tell_missed(config: Config, budget: float, price: float) -> None:
    asked = f"density {config.density}" if config.speedup is None else f"speedup {config.speedup}"
    if asked != "density None" and price > budget * (1 + 1e-6):
        logger.warning(
            "%s is out of reach: it allows a price of %.3f of dense attention, the cheapest plan "
            "that was found has %.3f",
            asked, budget, price,
        )  # fmt: skip


def make_problem(
    recording: Recording, prices: Prices, config: Config, model: torch.nn.Module
) -> Problem:
    """What the search of plans that reuse has to know."""
    fit = fit_residuals(recording, config, model)
    return Problem(
        errors=unfitted_errors(recording.errors),
        reuse=recording.reuse,
        levels=recording.levels,
        prices=prices,
        max_reusing=fit.sites,
        max_rules=config.max_distinct_rules,
        trend=fit.trend,
        precision=fit.precision,
    )


def choose_kind(
    stage: Stage, planner: Planner, budget: float, items: Sequence[Item]
) -> tuple[Kind | None, Drafted | None]:
    """Run a plan of every kind that may be the best, refine one that reuses; keep the best.

    Plans are ranked by the errors of whole runs: of the video times that of its change in time.
    """
    config, results = planner.config, planner.recording.results
    tried: list[tuple[Kind, Drafted, TrialRecord]] = []

    def run(kind: Kind, drafted: Drafted) -> float:
        for _, other, known in tried:
            if other.plan.fingerprint() == drafted.plan.fingerprint():
                return known.score
        record = try_plan(stage, kind.name, drafted.plan, items, results, config)
        tried.append((kind, drafted, record))
        logger.info("%s: video off by %.4f, its change by %.4f",
                    kind.name, record.output, record.temporal)  # fmt: skip
        return record.score

    options = planner.worth_trying(budget)
    for kind, drafted in track(options, "trying plans", config.progress):
        run(kind, drafted)
    if planner.reuses and budget < 1.0:
        refining = Kind("reuse, refined", planner.likeliest)
        with counting("refining", MOST_RUNS, config.progress) as done:

            def score(found: Found) -> float:
                value = run(refining, planner.drafted(found))
                done()
                return value

            refined(planner.problem, budget, score)
    if not tried:
        return None, None
    tried.sort(key=lambda one: one[2].score)
    kind, best, _ = tried[0]
    shown = {record.name: record for _, _, record in reversed(tried)}  # the best of every name
    trials = tuple(sorted(shown.values(), key=lambda record: record.score))
    found = replace(best.plan.calibration, trials=trials)
    return kind, replace(best, plan=replace(best.plan, calibration=found))


def _verify(
    drafter: Drafter,
    kind: Kind,
    drafted: Drafted,
    clock: Clock | None,
    searched: int,
    kept: Kept,
) -> Plan:
    """Measure quality on held-out items; back off towards dense while it misses the floor."""
    denoiser, config = drafter.denoiser, drafter.config
    held_out = denoiser.items[searched:]
    if not held_out:
        return _predicted(drafted, clock)
    dense = [
        kept.run(f"dense-{n}", partial(denoiser.run, item, config.seed + n, config.calib_steps))
        for n, item in enumerate(track(held_out, "dense, held out", config.progress), searched)
    ]
    begun = drafted.plan.calibration
    missed: dict[str, tuple[Plan, TrialRecord]] = {}
    budgets = [1.0 - (1.0 - drafted.price) / 2**n for n in range(1, BACK_OFFS + 1)]
    for denser in itertools.chain((drafted,), map(kind.at, budgets)):
        if denser is None or denser.plan.fingerprint() in missed:
            continue
        plan = _predicted(denser, clock)
        sparse = run_with_plan(denoiser, plan, held_out, config, searched, kept)
        found = replace(plan.calibration, held_out_error=mean_error(sparse, dense))
        quality = compare(sparse, dense) if denoiser.makes_video else None
        plan = replace(plan, calibration=found, quality=quality)
        floors = config.missed_floors(quality)
        if not floors:
            return _beside(plan, begun, missed)
        logger.warning("held-out quality at density %.3f: %s", plan.density, "; ".join(floors))
        record = compare_runs("missed the floor, held out", plan, sparse, dense)
        missed[plan.fingerprint()] = plan, record
    best = max((plan for plan, _ in missed.values()), key=_psnr)
    raise QualityFloorError(
        "expected a plan within the quality floor, the best found misses it: "
        f"{'; '.join(config.missed_floors(best.quality))}; lower the floor, or keep the model "
        "dense (the plan is this error's .plan)",
        _beside(best, begun, missed),
    )


def _psnr(plan: Plan) -> float:
    """Plans that miss the floor are ranked by it."""
    return -math.inf if plan.quality is None else plan.quality.psnr.mean


def _beside(
    plan: Plan, begun: CalibrationRecord, missed: Mapping[str, tuple[Plan, TrialRecord]]
) -> Plan:
    """The plan with what was run beside it: in the search, and held out."""
    searched = () if plan.calibration.trials else begun.trials
    others = tuple(record for other, record in missed.values() if other is not plan)
    explored = (*searched, *begun.explored, *others)
    return replace(plan, calibration=replace(plan.calibration, explored=explored))


def _predicted(drafted: Drafted, clock: Clock | None) -> Plan:
    predicted = None if clock is None else clock.predict(drafted.price)
    return replace(drafted.plan, predicted=predicted)
