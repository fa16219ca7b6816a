"""Which points of a long schedule a few steps use.

A placement is a rising list of indices into a schedule of ``n`` points; index 0 is pure noise and
the last step always lands on the terminal point ``n``. Every point is thus a noise level the long
schedule visits, with the timestep the wrapped scheduler gave it.
"""

import bisect
import math
from collections.abc import Sequence

import torch

from evdit_opt.errors import SchedulerError
from evdit_opt.sampling.levels import NoiseLevels

__all__ = ["best_placement", "even", "jump_errors", "log_snr", "subdivide", "to_indices"]


def to_indices(positions: Sequence[float], n: int) -> list[int]:
    """Positions in [0, 1), rising, as distinct indices below ``n``, each the nearest one free."""
    count = len(positions)
    if count > n:
        raise SchedulerError(
            f"expected a schedule of at least {count} steps to place {count} in, got {n}; "
            "raise full_steps or lower steps"
        )
    indices: list[int] = []
    for k, position in enumerate(positions):
        earliest = indices[-1] + 1 if indices else 0
        indices.append(min(max(earliest, math.floor(position * n + 0.5)), n - count + k))
    return indices


def even(count: int, time_shift: float = 1.0) -> list[float]:
    """Equal segments of the schedule's own time (Heek et al., arXiv 2403.06807, Algorithm 2).

    Args:
        count: number of segments.
        time_shift: bends time by ``w -> r w / (1 + (r - 1) w)`` for noise share w, as the ``shift``
            of flow-matching schedulers does; shifts multiply, so over a scheduler with shift s it
            gives the schedule with shift r s. Above 1 more steps go to high noise.
    """
    shares = [1 - k / count for k in range(count)]
    return [1 - time_shift * w / (1 + (time_shift - 1) * w) for w in shares]


def log_snr(levels: NoiseLevels, count: int) -> list[float]:
    """Equal steps in log-SNR, continued linearly to both ends where it is infinite.

    Even steps in log-SNR are the usual choice of exponential integrators (DPM-Solver, arXiv
    2206.00927, section 3). A ratio of levels says nothing about the data, see `best_placement`.
    """
    curve = list(levels.log_snr())
    n = len(curve) - 1
    if math.isinf(curve[0]) and n > 2:
        curve[0] = 2 * curve[1] - curve[2]
    if math.isinf(curve[n]) and n > 2:
        curve[n] = 2 * curve[n - 1] - curve[n - 2]
    if not all(map(math.isfinite, curve)) or sorted(curve) != curve:
        raise SchedulerError(
            "expected a schedule of at least 3 steps whose log-SNR is finite inside and rises, got "
            f"{curve}; use placement='even'"
        )
    positions = [0.0]
    for k in range(1, count):
        target = curve[0] + (curve[n] - curve[0]) * k / count
        above = min(bisect.bisect_left(curve, target), n)
        width = curve[above] - curve[above - 1]
        inside = (target - curve[above - 1]) / width if width > 0 else 0.0
        positions.append((above - 1 + inside) / n)
    return positions


def subdivide(edges: Sequence[int], n: int, steps: int) -> list[int]:
    """Indices of ``steps`` steps in segments that start at ``edges``; extra ones go first."""
    segments = len(edges)
    indices: list[int] = []
    for k, (start, stop) in enumerate(zip(edges, [*edges[1:], n], strict=True)):
        calls = steps // segments + (k < steps % segments)
        if calls > stop - start:
            raise SchedulerError(
                f"expected room for {calls} steps in segment {k}, got {stop - start} points of the "
                "long schedule; raise full_steps"
            )
        indices += [start + index for index in to_indices(even(calls), stop - start)]
    return indices


def jump_errors(
    levels: NoiseLevels, samples: torch.Tensor, clean: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """By how much one first-order jump misses the point that the long trajectory reaches.

    From point i the jump predicts ``alpha_j clean_i + sigma_j noise_i`` for point j. No further
    call of the model is needed: one recorded trajectory holds the error of every jump.

    Args:
        levels: of the n + 1 points.
        samples: ``[n + 1, elements]``, the trajectory.
        clean: ``[n, elements]``, the clean sample the model saw at each point but the last.
        noise: ``[n, elements]``, the noise it saw.

    Returns:
        ``[n, n + 1]`` float64: root mean square over the elements, at (i, j) with i < j, relative
        to ``hypot(alpha_j, sigma_j)``, the scale of samples at that level; 0 elsewhere.
    """
    n = len(clean)
    errors = torch.zeros(n, n + 1, dtype=torch.float64)
    alpha, sigma = (
        torch.tensor(values, dtype=samples.dtype, device=samples.device)[:, None]
        for values in (levels.alpha, levels.sigma)
    )
    scale = torch.hypot(alpha, sigma)
    for i in range(n):
        after = slice(i + 1, n + 1)
        missed = alpha[after] * clean[i] + sigma[after] * noise[i] - samples[after]
        errors[i, after] = (missed / scale[after]).square().mean(1).sqrt().double().cpu()
    return errors


def best_placement(errors: torch.Tensor, count: int) -> list[float]:
    """Positions of the ``count`` jumps with the smallest sum of errors, by dynamic programming.

    The sum bounds the error of the whole path where the flow neither stretches nor shrinks
    distances between normalised samples (exactly so for unit Gaussian data). For small steps a
    jump's error is ``c(u) du^2`` for the local curvature c, and the smallest sum then spaces steps
    evenly in the integral of ``sqrt(c)``: equidistribution of the root of the curvature.

    Args:
        errors: ``[n, n + 1]`` of `jump_errors`, a mean over clips perhaps.
        count: number of jumps from point 0 to point n, 1 to n.

    Returns:
        ``count`` positions in [0, 1), the first one 0.
    """
    n = len(errors)
    if not 1 <= count <= n:
        raise SchedulerError(
            f"expected 1 to {n} steps, got {count}; measure on a longer trajectory"
        )
    allowed = torch.ones_like(errors, dtype=torch.bool).triu(1)
    costs = errors.masked_fill(~allowed, torch.inf)
    best, came_from = costs[0], []
    for _ in range(count - 1):
        best, previous = (best[:n, None] + costs).min(0)
        came_from.append(previous)
    path = [n]
    for previous in reversed(came_from):
        path.append(int(previous[path[-1]]))
    return [0.0, *(index / n for index in reversed(path[1:]))]
