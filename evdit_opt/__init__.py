"""Faster video diffusion transformers: tile-sparse 3D attention, calibrated layer by layer."""

from evdit_opt.api import apply_plan, make_plan, optimize, restore
from evdit_opt.config import Config
from evdit_opt.grid import TokenLayout, VideoGrid
from evdit_opt.kernels import tile_attention
from evdit_opt.masks import Rule, TileMask
from evdit_opt.plan import Plan

__all__ = [
    "Config",
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
