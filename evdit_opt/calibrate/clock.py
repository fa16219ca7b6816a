"""Milliseconds: what a forward of the model takes on this device, and what each rule saves of it.

Two measurements give the price of everything. The compiled model is timed dense, and with its
attention gone: every site returns its last output, which also spares the projections before it.
Tile attention is timed alone, under every rule, on the q, k and v that a site really gets.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evdit_opt.apply import apply_plan, restore
from evdit_opt.calibrate.draft import Drafter
from evdit_opt.calibrate.prices import Prices, RulePrice
from evdit_opt.calibrate.record import Recording
from evdit_opt.calibrate.stage import dense_attention, sparse_attention
from evdit_opt.calibrate.steps import TIMESTEP
from evdit_opt.calibrate.strengths import unfitted
from evdit_opt.errors import CalibrationError
from evdit_opt.generations import Generations
from evdit_opt.masks import CACHED, Rule
from evdit_opt.passes.capture import watched
from evdit_opt.passes.observe_attention import observe
from evdit_opt.plan import SpeedRecord
from evdit_opt.timing import interleaved_ms

__all__ = ["Clock", "device_name", "measure_clock"]

logger = logging.getLogger(__name__)

ROUNDS = 9
"""Of which the median counts."""


@dataclass(frozen=True)
class Clock:
    """What was measured.

    Attributes:
        dense_ms: one forward, every site dense.
        rest_ms: what no rule can spare of it.
        prices: of all rules, in units of ``site_ms``.
        sites: how many there are.
        device: what it ran on.
    """

    dense_ms: float
    rest_ms: float
    prices: Prices
    sites: int
    device: str

    @property
    def site_ms(self) -> float:
        """The price of the mean dense site in milliseconds."""
        return (self.dense_ms - self.rest_ms) / self.sites

    def budget(self, speedup: float) -> float:
        """What may be paid per site and step, so that forwards are ``speedup`` times faster.

        Raises:
            CalibrationError: if that is more than sparing all attention gives.
        """
        budget = (self.dense_ms / speedup - self.rest_ms) / self.sites / self.site_ms
        if budget <= 0.0:
            raise CalibrationError(
                f"expected Config.speedup below {self.dense_ms / self.rest_ms:.2f}, got {speedup}: "
                f"a forward takes {self.dense_ms:.1f} ms, {self.rest_ms:.1f} ms of it without any "
                "attention; fewer steps or a smaller model help further"
            )
        return budget

    def predict(self, price: float) -> SpeedRecord:
        """The mean forward of a plan of a mean ``price`` per site and step."""
        optimized = self.rest_ms + price * self.sites * self.site_ms
        return SpeedRecord(dense_ms=self.dense_ms, optimized_ms=optimized, device=self.device)


@dataclass(frozen=True)
class _Attention:
    """One attention call of a site."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    scale: float | None

    @property
    def kind(self) -> tuple[Any, ...]:
        """Calls of one kind take equally long."""
        tensors = (self.q, self.k, self.v)
        masked = None if self.mask is None else self.mask.shape
        return (*((x.shape, x.stride(), x.dtype, x.device) for x in tensors), masked)


def measure_clock(drafter: Drafter, recording: Recording) -> Clock:
    """Time the model and every rule that calibration tried; takes one or two compilations.

    Args:
        drafter: of the model, which must not have a plan applied.
        recording: says which rules there are.
    """
    layouts = drafter.survey.layouts
    first, second = _two_steps(drafter)
    attentions = _attentions(drafter, first)
    times: dict[Any, dict[Rule | None, float]] = {}
    for name, attention in attentions.items():
        key = (attention.kind, layouts[name])
        if key not in times:
            rules = [own.rule for own in recording.errors[name]]
            rules += [own.rule for own in recording.reuse[name]]
            times[key] = _time_rules(drafter, name, attention, rules)
    own = {name: times[a.kind, layouts[name]] for name, a in attentions.items()}
    attention_ms = sum(found[None] for found in own.values())
    if second is not None and all(recording.reuse.values()):
        # A refresh is a dense forward that keeps its attention outputs. Both run in turn, because
        # what a forward takes changes by the minute on a machine that does other work.
        cached = drafter.cached(recording.levels)
        both = _time_plan(drafter, cached, {"refresh": first, "reuse": second})
        dense_ms, rest_ms = both["refresh"], both["reuse"]
    else:
        dense_ms = _time_plan(drafter, drafter.dense("to time it"), {"dense": first})["dense"]
        rest_ms = dense_ms - attention_ms
    rest_ms = min(max(rest_ms, 1e-6), dense_ms * (1 - 1e-6))
    # What goes with a cached output beside the attention itself is shared out like the attention.
    spared = (dense_ms - rest_ms) / attention_ms
    unit = (dense_ms - rest_ms) / len(own)
    device = next(iter(attentions.values())).q.device
    logger.info(
        "a forward takes %.2f ms dense, %.2f ms without attention, %.2f ms of it in SDPA",
        dense_ms, rest_ms, attention_ms,
    )  # fmt: skip
    return Clock(
        dense_ms=dense_ms,
        rest_ms=rest_ms,
        prices=Prices(
            dense={name: found[None] * spared / unit for name, found in own.items()},
            rules={name: _rule_prices(found, spared, unit) for name, found in own.items()},
        ),
        sites=len(own),
        device=device_name(device),
    )


def _rule_prices(
    times: Mapping[Rule | None, float], spared: float, unit: float
) -> dict[Rule, RulePrice]:
    dense = times[None] * spared
    found = {}
    for rule, ms in times.items():
        if rule is not None:
            alone = max(0.0, dense - times[None] + ms)
            reused, refresh = (0.0, dense) if rule.keeps_nothing else (alone, dense + ms)
            found[rule] = RulePrice(alone / unit, reused / unit, refresh / unit)
    return found


def _two_steps(drafter: Drafter) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The arguments of a forward, and of the next step's forward of the same guidance branch."""
    denoiser = drafter.denoiser
    if not denoiser.makes_video:
        return dict(denoiser.items[0]), None
    calls: list[dict[str, Any]] = []
    with watched(denoiser.model, calls.append):
        denoiser.run(denoiser.items[0], 0, 2)
    if not drafter.config.reuse or calls[0].get(TIMESTEP) is None:
        return calls[0], None
    generations = Generations(drafter.survey.grid_source.input, TIMESTEP)
    owners = [generations.begin(call) for call in calls]
    later = (call for call, owner in zip(calls[1:], owners[1:], strict=True) if owner is owners[0])
    return calls[0], next(later, None)


def _attentions(drafter: Drafter, call: Mapping[str, Any]) -> dict[str, _Attention]:
    """What every site's attention gets in one forward."""
    found: dict[str, _Attention] = {}

    def keep(
        name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
    ) -> None:
        new = _Attention(q, k, v, mask, scale)
        alike = (own for own in found.values() if own.kind == new.kind)
        found[name] = next(alike, new)  # one set of tensors per kind is enough

    survey = drafter.survey
    with observe(drafter.denoiser.model, tuple(survey.layouts), keep, scoped=survey.scoped):
        _forward(drafter.denoiser.model, call)()
    return found


def _time_rules(
    drafter: Drafter, name: str, attention: _Attention, rules: Sequence[Rule]
) -> dict[Rule | None, float]:
    """Milliseconds of a site's attention, dense (None) and under every rule."""
    layout, impl = drafter.survey.layouts[name], drafter.config.impl
    given = (attention.q, attention.k, attention.v, attention.mask, attention.scale)
    actions: dict[Rule | None, Callable[[], object]] = {None: lambda: dense_attention(*given)}
    # A weight is a number in the mask: it takes no time, and one rule is timed for all strengths.
    timed = {rule: _any_strength(rule) for rule in rules}
    for rule in dict.fromkeys(timed.values()):
        if not rule.keeps_nothing:
            actions[rule] = lambda rule=rule: sparse_attention(rule, layout, *given, impl)  # type: ignore[misc]
    with torch.no_grad():
        found = interleaved_ms(actions, ROUNDS, warmup=2)
    found[CACHED] = 0.0
    return {None: found[None], CACHED: 0.0} | {rule: found[timed[rule]] for rule in rules}


def _any_strength(rule: Rule) -> Rule:
    return unfitted(rule, "balanced") if rule.weighting == "fitted" else rule


def _time_plan(
    drafter: Drafter, plan: Any, calls: Mapping[str, Mapping[str, Any]]
) -> dict[str, float]:
    """Milliseconds of forwards under a plan, compiled as it will be."""
    model, config = drafter.denoiser.model, drafter.config
    apply_plan(model, plan, inner=config.inner, impl=config.impl)
    try:
        actions = {name: _forward(model, call) for name, call in calls.items()}
        return interleaved_ms(actions, ROUNDS, warmup=2)
    finally:
        restore(model)


def _forward(model: torch.nn.Module, call: Mapping[str, Any]) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return model(**call)

    return run


def device_name(device: torch.device) -> str:
    """What was timed on, for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"
