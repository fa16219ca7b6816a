"""How residuals are kept, and how many sites may reuse them, within a memory budget."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from evdit_opt.calibrate.record import Recording
from evdit_opt.config import Config
from evdit_opt.errors import UnsupportedInputError
from evdit_opt.kernels.residual import Precision, bytes_of, require_float8

__all__ = ["Fit", "fit_residuals", "residual_bytes"]

logger = logging.getLogger(__name__)

GIB = 2**30


@dataclass(frozen=True)
class Fit:
    """What the budget allows.

    Attributes:
        precision: in which residuals are kept.
        trend: whether they are carried on, which takes as much memory again.
        sites: how many sites may reuse.
    """

    precision: Precision
    trend: bool
    sites: int


def fit_residuals(recording: Recording, config: Config, model: torch.nn.Module) -> Fit:
    """The first of ``config.reuse_precisions`` in which all sites may reuse, with a trend if any.

    Rounding does much less than leaving a site out: what a site may be off by is in
    ``kernels.residual.ROUNDING``, and the plans that are run have it in them. If no precision is
    small enough for all sites, it is the one with room for the most, and a warning says what
    the others would need. 8 bits hold no trend: their rounding is of the size of a change.

    Args:
        recording: of the dense runs.
        config: the budget.
        model: on whose device residuals lie.

    Raises:
        UnsupportedInputError: if only float8 is allowed, and the device does not know it.
    """
    able = [name for name in recording.errors if recording.reuse.get(name)]
    if not able:
        return Fit("model", False, 0)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    budget = _budget(config, device)
    if budget == 0.0:
        return Fit("model", False, 0)
    known = _known(config, device)
    ways: list[tuple[Precision, bool]] = [
        (p, True) for p in known if p != "float8" and config.reuse_trend
    ]
    ways += [(p, False) for p in known]
    needed = {way: residual_bytes(recording, able, *way) for way in ways}
    fits = {way: _count(recording, able, *way, budget) for way in ways}
    most = max(fits.values())
    enough = most == len(able)  # a trend is no reason to leave a site out
    precision, trend = next(
        w for w, count in fits.items() if count == most and (enough or not w[1])
    )
    costs = ", ".join(f"{size / GIB:.3g} GiB {_words(*way)}" for way, size in needed.items())
    text = (
        f"residuals of all {len(able)} sites and {recording.branches} guidance branches take "
        f"{costs}; {budget / GIB:.3g} GiB are allowed"
    )
    if not enough:
        least = min(needed.values())
        logger.warning(
            "%s: %d sites may reuse, %s; Config(reuse_memory=%.3g) lets all of them",
            text, most, _words(precision, trend), _rounded_up(least / GIB),
        )  # fmt: skip
    else:
        logger.info("%s: all may reuse, %s", text, _words(precision, trend))
    return Fit(precision, trend, most)


def residual_bytes(
    recording: Recording, sites: Sequence[str], precision: Precision, trend: bool
) -> int:
    """Memory of the residuals of some sites in a run, all guidance branches counted."""
    numbers = sum(recording.residual_bytes[name] for name in sites) // recording.itemsize
    return (1 + trend) * recording.branches * bytes_of(numbers, recording.itemsize, precision)


def _known(config: Config, device: torch.device) -> list[Precision]:
    """The precisions that may be used here."""
    allowed = list(config.reuse_precisions)
    if "float8" in allowed:
        try:
            require_float8(device)
        except UnsupportedInputError as error:
            allowed.remove("float8")
            if not allowed:
                raise
            logger.info("residuals are not kept in float8: %s", error)
    return allowed


def _words(precision: Precision, trend: bool) -> str:
    return f"in precision {precision}" + " with their trend" * trend


def _count(
    recording: Recording, sites: Sequence[str], precision: Precision, trend: bool, budget: float
) -> int:
    """How many sites fit, whichever they are."""
    largest = max(residual_bytes(recording, [name], precision, trend) for name in sites)
    return min(len(sites), int(budget // largest))


def _budget(config: Config, device: torch.device) -> float:
    """Bytes that residuals may take."""
    if config.reuse_memory is not None:
        return config.reuse_memory * GIB
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 4
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 4


def _rounded_up(gib: float) -> float:
    """So that three digits are enough of it."""
    return gib * 1.005
