"""A plan's key figures, for programs."""

from typing import Any

__all__ = ["summary"]


def summary(plan: Any) -> dict[str, Any]:
    """A plan's key figures, for programs."""
    return {
        "fingerprint": plan.fingerprint(),
        "model_class": plan.model_class,
        "density": plan.density,
        "sites": len(plan.sites),
        "sparse_sites": len(plan.rules),
        "reusing_sites": 0 if plan.reuse is None else len(plan.reuse.sites),
        "psnr_db": None if plan.quality is None else plan.quality.psnr.mean,
        "held_out_error": plan.calibration.held_out_error,
        "speedup": None if plan.speed is None else plan.speed.speedup,
        "predicted_speedup": None if plan.predicted is None else plan.predicted.speedup,
    }
