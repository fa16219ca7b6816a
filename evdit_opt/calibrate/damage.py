"""How the errors of sites and steps add up to what is wrong with the video.

An error at a site moves the latents, and what follows carries it on; errors of other steps and
sites move them further the same way, as what a mask drops or a residual misses changes slowly. So
errors add up like lengths, not like the squares of independent ones, and all steps and sites count
alike. docs/notes/damage.md has the measurements, and what else was tried.
"""

from typing import Any

__all__ = ["damage_of"]

TEMPORAL = 0.05
"""What the squared error from frame to frame counts beside that of the output. It is relative to
changes that are small, so it is the larger number, and it is what becomes flicker."""


def damage_of(output: Any, temporal: Any) -> Any:
    """Damage of one step at one site; of several, the sum.

    Args:
        output: squared relative error of the site's output, a number or a tensor of any shape.
        temporal: the same for its change from frame to frame.
    """
    return (output + TEMPORAL * temporal) ** 0.5
