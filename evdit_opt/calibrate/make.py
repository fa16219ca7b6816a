"""Calibration in a straight line: survey, measure, search, try, verify -> ``Plan``."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from evdit_opt.apply import is_optimized
from evdit_opt.calibrate.draft import Drafter
from evdit_opt.calibrate.record import record_errors
from evdit_opt.calibrate.search import (
    Errors,
    choose_rules,
    choose_uniform,
    mean_density,
    threshold_for_density,
)
from evdit_opt.calibrate.survey import survey_attention
from evdit_opt.calibrate.trial import mean_error, run_with_plan, try_plans
from evdit_opt.config import Config
from evdit_opt.errors import AlreadyOptimizedError, CalibrationError, QualityFloorError
from evdit_opt.masks import Weighting
from evdit_opt.models import Item, as_denoiser
from evdit_opt.plan import Plan
from evdit_opt.quality import compare

__all__ = ["make_plan"]

logger = logging.getLogger(__name__)

BACK_OFFS = 3
"""How often a plan that misses the quality floor is made denser before giving up."""


def make_plan(target: object, calib: Iterable[Item], config: Config | None = None) -> Plan:
    """Calibrate: find out where a model's 3D attention can be sparse, and how sparse.

    Runs the dense model on the calibration items and measures every candidate mask at every site
    (Efficient-vDiT, arXiv 2502.06155, Algorithm 1, with a relative threshold), chooses between
    weightings, and between searched and uniform masks, by whole runs, and measures quality on the
    last ``config.verify_prompts`` items, which the search never sees. The model is left dense.

    Args:
        target: a diffusers video pipeline, or an ``nn.Module``.
        calib: prompts (pipeline), or dicts of forward kwargs (module).
        config: settings; ``Config()`` if None. For a pipeline, ``config.pipe_kwargs`` gives the
            size of the clips.

    Returns:
        The plan. Sites that stay dense are in it with the reason.

    Raises:
        AlreadyOptimizedError: if a plan is applied to the model already.
        CalibrationError: if there are too few items, or items of the wrong kind.
        LayoutError: if frames, height and width of the token sequence cannot be established.
        NoVideoAttentionError: if the model has no 3D full self-attention.
        NonFiniteOutputError: if a run holds NaN or infinity.
        QualityFloorError: if held-out quality misses the floor also after backing off.
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
    survey = survey_attention(denoiser, config.grid)
    drafter = Drafter(denoiser, survey, config)
    longest = max(layout.seq_len for layout in survey.layouts.values())
    if longest < config.min_tokens:
        return drafter.dense(f"{longest} tokens, fewer than min_tokens = {config.min_tokens}")

    errors, dense_runs = record_errors(
        denoiser, survey.layouts, denoiser.items[:searched], config, survey.scoped
    )
    found = _search(drafter, errors, dense_runs)
    return _verify(drafter, found, errors, searched) if found.plan.rules else found.plan


@dataclass(frozen=True)
class _Found:
    """A plan, and what it takes to make a denser one of the same kind."""

    plan: Plan
    weighting: Weighting
    uniform: bool

    @property
    def name(self) -> str:
        return f"{'uniform' if self.uniform else 'searched'}, weighting {self.weighting}"


def _search(drafter: Drafter, errors: Errors, dense_runs: Sequence[torch.Tensor]) -> _Found:
    """Search each weighting at equal density, and uniform masks; keep what whole runs favour."""
    config = drafter.config
    first = _only(errors, config.weightings[0])
    threshold = config.threshold
    if config.density is not None:
        threshold = threshold_for_density(first, config.density, config.max_distinct_rules)
    choice = choose_rules(first, threshold, config.max_distinct_rules)
    if not any(choice.values()):
        return _Found(drafter.draft(choice, first, threshold), config.weightings[0], False)
    density = mean_density(choice)
    options = [
        _Found(_at_density(drafter, errors, density, weighting, uniform), weighting, uniform)
        for weighting in config.weightings
        for uniform in (False, True)
    ]
    # Small searches often agree; one run per different plan is enough, and the first name stays.
    options = list({option.plan.fingerprint(): option for option in reversed(options)}.values())
    options = [option for option in reversed(options) if option.plan.rules]
    items = drafter.denoiser.items[: min(config.trial_prompts, len(dense_runs))]
    plans = [(option.name, option.plan) for option in options]
    trials = try_plans(drafter.denoiser, plans, items, dense_runs, config)
    order = sorted(range(len(trials)), key=lambda index: trials[index].temporal)
    best = options[order[0]]
    record = replace(best.plan.calibration, trials=tuple(trials[index] for index in order))
    return replace(best, plan=replace(best.plan, calibration=record))


def _at_density(
    drafter: Drafter, errors: Errors, density: float, weighting: Weighting, uniform: bool
) -> Plan:
    """The plan of one kind whose mean density is at most ``density``."""
    limit = drafter.config.max_distinct_rules
    own = _only(errors, weighting)
    threshold = threshold_for_density(own, density, limit)
    choice = choose_uniform(own, density) if uniform else choose_rules(own, threshold, limit)
    return drafter.draft(choice, own, threshold)


def _only(errors: Errors, weighting: Weighting) -> Errors:
    """The candidates of one weighting. Those without references have none to weight, and stay."""
    return {
        site: tuple(c for c in own if c.rule.weighting == weighting or c.rule.references == 0)
        for site, own in errors.items()
    }


def _verify(drafter: Drafter, found: _Found, errors: Errors, searched: int) -> Plan:
    """Measure quality on held-out items; back off towards dense while it misses the floor."""
    denoiser, config = drafter.denoiser, drafter.config
    held_out = denoiser.items[searched:]
    if not held_out:
        return found.plan
    dense = [
        denoiser.run(item, config.seed + searched + index, config.calib_steps)
        for index, item in enumerate(held_out)
    ]
    plan = found.plan
    for back_offs in range(BACK_OFFS + 1):
        sparse = run_with_plan(denoiser, plan, held_out, config, first=searched)
        record = replace(plan.calibration, held_out_error=mean_error(sparse, dense))
        quality = compare(sparse, dense) if denoiser.makes_video else None
        plan = replace(plan, calibration=record, quality=quality)
        missed = "; ".join(config.missed_floors(quality))
        if not missed:
            return plan
        logger.warning("held-out quality at density %.3f: %s", plan.density, missed)
        if back_offs < BACK_OFFS:
            denser = (1.0 + plan.density) / 2
            plan = _at_density(drafter, errors, denser, found.weighting, found.uniform)
    raise QualityFloorError(
        f"expected a plan within the quality floor, the best found misses it: {missed}; lower the "
        "floor or Config.threshold, or keep the model dense (the plan is this error's .plan)",
        plan,
    )
