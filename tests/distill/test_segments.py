"""Segments: which points a teacher steps through, and how training draws them."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from evdit_opt.distill.segments import annealed_steps, segments_of
from evdit_opt.errors import DistillationError, SchedulerError

SCHEDULER = FlowMatchEulerDiscreteScheduler(shift=4.0)


@pytest.mark.parametrize("steps", [1, 3, 9, 100])
def test_points_of_a_segment_go_from_edge_to_edge(steps: int) -> None:
    segments = segments_of(SCHEDULER, segments=6, full_steps=50)
    assert segments.edges == (0, 8, 17, 25, 33, 42, 50)
    for k in range(6):
        points = segments.points(k, steps)
        first, last = segments.edges[k : k + 2]
        assert (points[0], points[-1]) == (first, last)
        assert len(points) == min(steps, last - first) + 1
        assert sorted(set(points)) == points


def test_draws_cover_every_step_and_nothing_else() -> None:
    segments = segments_of(SCHEDULER, segments=3, full_steps=12)
    draw = segments.draw([(0, n) for n in range(400)], 2)
    found = set(zip(draw.start.tolist(), draw.next.tolist(), draw.edge.tolist(), strict=True))
    assert found == {(0, 2, 4), (2, 4, 4), (4, 6, 8), (6, 8, 8), (8, 10, 12), (10, 12, 12)}


def test_a_draw_depends_on_its_own_seed_only() -> None:
    """So a batch may be split over processes."""
    segments = segments_of(SCHEDULER, segments=4, full_steps=20)
    seeds = [(7, n) for n in range(8)]
    whole, part = segments.draw(seeds, 5), segments.draw(seeds[3:5], 5)
    assert torch.equal(whole.start[3:5], part.start)
    assert torch.equal(whole.next[3:5], part.next)


def test_teacher_steps_grow_log_linearly() -> None:
    assert [annealed_steps(x, 1, 16) for x in (-1, 0, 0.25, 0.5, 0.75, 1, 2)] == [
        1, 1, 2, 4, 8, 16, 16,
    ]  # fmt: skip
    with pytest.raises(DistillationError, match="first <= last"):
        annealed_steps(0.5, 3, 2)


def test_more_segments_than_steps_are_refused() -> None:
    with pytest.raises(SchedulerError, match="full_steps"):
        segments_of(SCHEDULER, segments=9, full_steps=8)
