"""The clock of an unfinished calibration: measured once, or plans tried before a kill would differ.

Times never repeat to the digit. A calibration that timed the model anew when it is taken up would
search within another budget, and find none of its finished runs.
"""

import hashlib
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from evdit_opt.calibrate.clock import Clock
from evdit_opt.calibrate.kept import Kept
from evdit_opt.calibrate.prices import Prices, RulePrice
from evdit_opt.config import Config
from evdit_opt.masks import Rule

__all__ = ["kept_clock"]


def kept_clock(kept: Kept, config: Config, device: str, measure: Callable[[], Clock]) -> Clock:
    """What ``measure`` tells, or told when it was last asked in this calibration.

    Args:
        kept: where it is kept.
        config: of the calibration.
        device: what the model runs on; another one is timed anew.
        measure: times the model.
    """
    # What a purpose does not hold, and times depend on.
    told = f"{config.inner} {config.min_tokens} {device}"
    name = f"clock-{hashlib.sha256(told.encode()).hexdigest()[:32]}"
    known = kept.load(name)
    if known is not None:
        return _read(known[1])
    clock = measure()
    kept.save(name, {}, _facts(clock))
    return clock


def _facts(clock: Clock) -> dict[str, Any]:
    return {
        "dense_ms": clock.dense_ms,
        "rest_ms": clock.rest_ms,
        "sites": clock.sites,
        "device": clock.device,
        "dense": dict(clock.prices.dense),
        "rules": {
            site: [[asdict(rule), list(price)] for rule, price in own.items()]
            for site, own in clock.prices.rules.items()
        },
    }


def _read(facts: dict[str, Any]) -> Clock:
    rules = {
        site: {Rule(**rule): RulePrice(*price) for rule, price in own}
        for site, own in facts["rules"].items()
    }
    return Clock(
        dense_ms=facts["dense_ms"],
        rest_ms=facts["rest_ms"],
        prices=Prices(dense=facts["dense"], rules=rules),
        sites=facts["sites"],
        device=facts["device"],
    )
