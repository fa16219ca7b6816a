"""Faster video diffusion transformers: tile-sparse 3D attention, calibrated layer by layer."""

from typing import TYPE_CHECKING, Any

from evdit_opt import scheduler
from evdit_opt.api import apply_plan, make_plan, optimize, restore
from evdit_opt.config import Config
from evdit_opt.grid import TokenLayout, VideoGrid
from evdit_opt.kernels import tile_attention
from evdit_opt.masks import Rule, TileMask
from evdit_opt.plan import Plan

if TYPE_CHECKING:
    from evdit_opt.scheduler import FewStepScheduler

__all__ = [
    "Config",
    "FewStepScheduler",
    "Plan",
    "Rule",
    "TileMask",
    "TokenLayout",
    "VideoGrid",
    "apply_plan",
    "make_plan",
    "optimize",
    "restore",
    "tile_attention",
]


def __getattr__(name: str) -> Any:
    # Made on first use: its base classes are those of diffusers, which takes seconds to import.
    if name == "FewStepScheduler":
        return scheduler.FewStepScheduler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
