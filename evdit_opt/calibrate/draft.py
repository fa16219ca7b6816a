"""Write plans for one model: everything but the rules is the same in all of them."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evdit_opt.calibrate.problem import Found
from evdit_opt.calibrate.search import Choice, Errors
from evdit_opt.calibrate.site_record import CandidateError
from evdit_opt.calibrate.split_heads import Split
from evdit_opt.calibrate.steps import TIMESTEP
from evdit_opt.calibrate.survey import Survey
from evdit_opt.config import Config
from evdit_opt.kernels.residual import ROUNDING, Precision
from evdit_opt.masks import CACHED, Rule
from evdit_opt.models import Denoiser, Item, config_hash
from evdit_opt.plan import (
    CalibrationRecord,
    Plan,
    ReuseRecord,
    RuleEvidence,
    SiteLayout,
    SitePlan,
    TrendPoint,
)
from evdit_opt.plan_records import call_record
from evdit_opt.second_rule import SecondRule, mean_density
from evdit_opt.versions import installed_versions

__all__ = ["Drafter"]


@dataclass(frozen=True)
class Drafter:
    """Turns choices into plans.

    Attributes:
        denoiser: whose plans are written.
        survey: its sites and layouts.
        config: of the calibration.
    """

    denoiser: Denoiser
    survey: Survey
    config: Config

    def draft(self, choice: Choice, errors: Errors, threshold: float) -> Plan:
        """A plan with the chosen rule at every site, the reason, and all candidates' errors."""
        return self._plan(
            [
                self._site(
                    name,
                    _rule(choice.get(name)),
                    self._reason(choice.get(name), errors[name], threshold),
                    errors[name],
                    _error(choice.get(name)),
                )
                for name in self.survey.layouts
            ],
            threshold,
        )

    def draft_reuse(
        self,
        found: Found,
        errors: Errors,
        levels: Sequence[float],
        trend: Sequence[TrendPoint] = (),
        precision: Precision = "model",
        memory: int | None = None,
    ) -> Plan:
        """A plan that reuses residuals, at the grid and for runs with the noise ``levels``.

        Args:
            found: rules and refreshes.
            errors: of the candidates, as evidence.
            levels: of the run.
            trend: how residuals are carried on.
            precision: in which residuals are kept.
            memory: bytes that they take, and what carries them on.
        """
        between = len(levels) - found.refreshes[0] - len(found.refreshes)
        sites = []
        for name, option in found.options.items():
            reason = "dense: nothing cheaper is worth its damage"
            if option.rule is not None:
                reason = f"error {option.error:.3f}" + (" between refreshes" * option.reuses)
            error = None if option.rule is None else option.error
            if option.reuses:  # that error counts refreshes and dense steps too, as none
                error = None
                if between:
                    reused = option.error * (len(levels) / between) ** 0.5
                    error = math.hypot(reused, ROUNDING[precision])
            sites.append(self._site(name, option.rule, reason, errors[name], error))
        reuse = ReuseRecord(
            sites=tuple(name for name, option in found.options.items() if option.reuses),
            timestep=TIMESTEP,
            refresh_at=tuple(levels[step] for step in found.refreshes),
            levels=tuple(levels),
            trend=tuple(trend),
            precision=precision,
            memory=memory,
        )
        return self._plan(sites, self.config.threshold, reuse)

    def draft_splits(self, choice: Mapping[str, Split], errors: Errors) -> Plan:
        """A plan with one rule or two at every site; ``errors``: of the candidates, as evidence."""
        sites = []
        for name in self.survey.layouts:
            own, reason, error = choice[name], "dense: nothing cheaper is worth its damage", None
            if own.rule is not None:
                reason = f"error {own.output:.3f}, from frame to frame {own.temporal:.3f}"
                error = own.output
            sites.append(self._site(name, own.rule, reason, errors[name], error, own.second))
        return self._plan(sites, self.config.threshold)

    def cached(self, levels: Sequence[float]) -> Plan:
        """A plan in which every site returns its first output in all ``levels`` but the first."""
        sites = [self._site(name, CACHED, "cached", ()) for name in self.survey.layouts]
        reuse = ReuseRecord(
            sites=tuple(self.survey.layouts),
            timestep=TIMESTEP,
            refresh_at=(levels[0],),
            levels=tuple(levels),
        )
        return self._plan(sites, self.config.threshold, reuse)

    def dense(self, reason: str) -> Plan:
        """A plan that leaves every site dense, because of ``reason``."""
        sites = [self._site(name, None, f"dense: {reason}", ()) for name in self.survey.layouts]
        return self._plan(sites, self.config.threshold)

    def _reason(
        self, chosen: CandidateError | None, candidates: Sequence[CandidateError], threshold: float
    ) -> str:
        if chosen is not None:
            return f"error {chosen.output:.3f}, from frame to frame {chosen.temporal:.3f}"
        if not candidates:
            frames = self.survey.grid.frames
            return f"dense: no rule has a density <= {self.config.max_density} at {frames} frames"
        best = min(candidate.output for candidate in candidates)
        return f"dense: the best rule errs by {best:.3f}, the threshold is {threshold:.3f}"

    def _site(
        self,
        name: str,
        rule: Rule | None,
        reason: str,
        candidates: Sequence[CandidateError],
        error: float | None = None,
        second: SecondRule | None = None,
    ) -> SitePlan:
        layout = self.survey.layouts[name]
        return SitePlan(
            name=name,
            rule=rule,
            reason=reason,
            layout=SiteLayout(prefix=layout.prefix, suffix=layout.suffix),
            density=1.0 if rule is None else mean_density(rule, second, layout),
            way="scope" if name in self.survey.scoped else "mark",
            error=error,
            second=second,
            errors=tuple(
                RuleEvidence(
                    rule=candidate.rule.describe(self.survey.grid.frames),
                    density=candidate.density,
                    output=candidate.output,
                    temporal=candidate.temporal,
                )
                for candidate in candidates
            ),
        )

    def _plan(
        self, sites: Sequence[SitePlan], threshold: float, reuse: ReuseRecord | None = None
    ) -> Plan:
        return Plan(
            model_class=type(self.denoiser.model).__name__,
            model_config_hash=config_hash(self.denoiser.model),
            sites=tuple(sites),
            grid=self.survey.grid,
            grid_source=self.survey.grid_source,
            min_tokens=self.config.min_tokens,
            reuse=reuse,
            fullgraph=self.survey.fullgraph,
            calibration=CalibrationRecord(
                prompts_hash=_hash_items(self.denoiser.items),
                prompt_count=len(self.denoiser.items),
                steps=self.config.calib_steps,
                seed=self.config.seed,
                threshold=threshold,
                call=call_record(self.config.pipe_kwargs) if self.denoiser.makes_video else (),
            ),
            versions=tuple(sorted(installed_versions().items())),
        )


def _rule(chosen: CandidateError | None) -> Rule | None:
    return None if chosen is None else chosen.rule


def _error(chosen: CandidateError | None) -> float | None:
    return None if chosen is None else chosen.output


def _hash_items(items: Sequence[Item]) -> str:
    """SHA-256 of prompts, or of the names and shapes in the calls of a module."""
    described = [
        item
        if isinstance(item, str)
        else {name: list(getattr(value, "shape", ())) for name, value in item.items()}
        for item in items
    ]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
