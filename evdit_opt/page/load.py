"""What a page shows beside its plan, from files that may come from a stranger."""

from pathlib import Path
from typing import Any

from evdit_opt import strict_json
from evdit_opt.calibrate.measure import Measurement
from evdit_opt.errors import PlanError, UnsupportedInputError
from evdit_opt.inspection.attention_share import AttentionShare
from evdit_opt.plan import Plan

__all__ = ["load_measurement", "load_share"]

MAX_BYTES = 16 * 2**20


def load_measurement(path: Path, plan: Plan) -> Measurement:
    """A ``measure.json`` of the plan's model.

    Raises:
        UnsupportedInputError: if it is none, or of another model.
    """
    value = _parsed(path, plan)
    try:
        found: Measurement = strict_json.build(Measurement, value, "measurement")
    except PlanError as error:
        raise _wrong(path, "what evdit measure --json prints", str(error)) from error
    return found


def load_share(path: Path, plan: Plan) -> AttentionShare:
    """The cost of attention in what ``evdit inspect --json`` printed for the plan's model.

    Raises:
        UnsupportedInputError: if it is none, of another model, or was not timed.
    """
    value = _parsed(path, plan)
    try:
        found: AttentionShare = strict_json.build(
            AttentionShare, value.get("attention"), "attention"
        )
    except PlanError as error:
        raise _wrong(path, "what evdit inspect --json prints, timed", str(error)) from error
    if not 0.0 <= found.share < 1.0:
        raise _wrong(path, "a share of attention of 0 to 1", str(found.share))
    return found


def _parsed(path: Path, plan: Plan) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise _wrong(path, f"a file of at most {MAX_BYTES} bytes", "a larger one")
        value = strict_json.parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, PlanError) as error:
        raise _wrong(path, "a JSON file", str(error)) from error
    if not isinstance(value, dict) or value.get("model") != plan.model_class:
        model = value.get("model") if isinstance(value, dict) else value
        raise _wrong(path, f"figures of {plan.model_class}", strict_json.shorten(model))
    return value


def _wrong(path: Path, expected: str, got: str) -> UnsupportedInputError:
    return UnsupportedInputError(f"expected {path} to be {expected}, got {got}")
