"""The attention operator over tile masks, and its implementations."""

from evdit_opt.kernels.api import tile_attention

__all__ = ["tile_attention"]
