"""Placements: properties of the indices, and that the measured one is the best there is."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evdit_opt.errors import SchedulerError
from evdit_opt.sampling.levels import NoiseLevels
from evdit_opt.sampling.placement import (
    best_placement,
    even,
    jump_errors,
    log_snr,
    subdivide,
    to_indices,
)


def flow_levels(n: int, shift: float = 1.0) -> NoiseLevels:
    shares = [1 - k / n for k in range(n + 1)]
    sigma = tuple(shift * w / (1 + (shift - 1) * w) for w in shares)
    return NoiseLevels(alpha=tuple(1 - s for s in sigma), sigma=sigma)


@given(st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=20), st.integers(20, 60))
def test_indices_are_distinct_and_in_range(positions, n):
    indices = to_indices(sorted(positions), n)
    assert indices == sorted(set(indices))
    assert indices[-1] < n


@given(count=st.integers(1, 30))
def test_even_steps_of_a_schedule_of_that_length_are_all_of_it(count):
    assert to_indices(even(count), count) == list(range(count))


@given(count=st.integers(1, 10), first=st.floats(0.2, 5), second=st.floats(0.2, 5))
def test_time_shifts_multiply(count, first, second):
    def shifted(w, r):
        return r * w / (1 + (r - 1) * w)

    twice = [1 - shifted(1 - u, second) for u in even(count, first)]
    assert even(count, first * second) == pytest.approx(twice, abs=1e-12)


@given(segments=st.integers(1, 8), calls=st.integers(1, 4), more=st.integers(0, 7))
def test_every_segment_gets_its_calls(segments, calls, more):
    n, steps = 64, segments * calls + more % segments
    edges = to_indices(even(segments), n)
    indices = subdivide(edges, n, steps)
    assert indices == sorted(set(indices))
    assert len(indices) == steps
    assert set(edges) <= set(indices)
    for start, stop in itertools.pairwise([*edges, n]):
        assert calls <= sum(start <= index < stop for index in indices) <= calls + 1


def test_a_segment_without_room_is_an_error():
    with pytest.raises(SchedulerError, match="expected room for 3 steps in segment 1, got 2"):
        subdivide([0, 8], 10, 6)


def test_log_snr_is_even_in_log_snr():
    levels = flow_levels(4000, shift=3.0)
    positions = log_snr(levels, 5)
    inside = [levels.log_snr()[round(position * 4000)] for position in positions[1:]]
    gaps = [high - low for low, high in itertools.pairwise(inside)]
    # Points are 1 / 4000 apart; where log-SNR is steepest, near its ends, that is below 0.2.
    assert gaps == pytest.approx([sum(gaps) / len(gaps)] * len(gaps), abs=0.2)


def test_jump_errors_by_hand():
    """A trajectory z_i of one element whose model is right about everything but the first point."""
    levels = flow_levels(3)
    clean, noise = torch.ones(3, 1).double(), torch.full((3, 1), 2.0).double()
    samples = torch.tensor([[a + 2 * s] for a, s in zip(levels.alpha, levels.sigma, strict=True)])
    clean[0] = 4.0
    errors = jump_errors(levels, samples.double(), clean, noise)
    scales = [math.hypot(a, s) for a, s in zip(levels.alpha, levels.sigma, strict=True)]
    wanted = [3 * a / scale for a, scale in zip(levels.alpha, scales, strict=True)]
    # The samples were rounded to float32.
    assert errors[0, 1:].tolist() == pytest.approx(wanted[1:], abs=1e-6)
    assert float(errors[1:].abs().max()) < 1e-6


@given(seed=st.integers(0, 10_000), n=st.integers(1, 7), data=st.data())
def test_the_best_placement_is_the_best_of_all(seed, n, data):
    count = data.draw(st.integers(1, n))
    errors = torch.rand(n, n + 1, generator=torch.Generator().manual_seed(seed)).double().triu(1)

    def total(indices):
        return sum(float(errors[i, j]) for i, j in itertools.pairwise([*indices, n]))

    found = to_indices(best_placement(errors, count), n)
    best = min(total((0, *rest)) for rest in itertools.combinations(range(1, n), count - 1))
    assert len(found) == count
    assert total(found) == pytest.approx(best, abs=1e-12)


def test_small_jumps_spread_the_root_of_the_curvature_evenly():
    """c(u) du^2 with c = (1 + 9u)^2: density of steps grows as 1 + 9u, so the k-th of N positions
    solves u + 4.5 u^2 = 5.5 k / N."""
    n, count = 400, 8
    u = torch.arange(n + 1).double() / n
    middle = (u[:n, None] + u[None]) / 2
    errors = ((1 + 9 * middle).square() * (u[None] - u[:n, None]).square()).triu(1)
    wanted = [(math.sqrt(1 + 18 * 5.5 * k / count) - 1) / 9 for k in range(count)]
    assert best_placement(errors, count) == pytest.approx(wanted, abs=0.02)


@pytest.mark.parametrize("count", [0, 5])
def test_more_jumps_than_points_is_an_error(count):
    with pytest.raises(SchedulerError, match=f"expected 1 to 4 steps, got {count}"):
        best_placement(torch.rand(4, 5), count)


def test_log_snr_of_a_schedule_without_inside_is_an_error():
    with pytest.raises(SchedulerError, match="use placement='even'"):
        log_snr(NoiseLevels(alpha=(0.0, 1.0), sigma=(1.0, 0.0)), 1)
