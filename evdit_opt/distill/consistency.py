"""Multistep consistency distillation: the target and the loss.

Source: Heek et al., Multistep Consistency Models (arXiv 2403.06807), Algorithm 1, with a
deterministic (DDIM) teacher step. For flow matching the same jumps are Euler steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from evdit_opt.distill.segments import Draw, Segments

__all__ = ["Model", "consistency_loss", "consistency_target", "guided", "jump", "reach_back"]

Model = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""``(input [batch, ...], timestep [batch]) -> output [batch, ...]``, the prompt bound already."""


def guided(conditional: Model, unconditional: Model, scale: float) -> Model:
    """Classifier-free guidance as one model: what a student learns to do in a single call.

    Args:
        conditional: the model with the prompt.
        unconditional: the model with the negative prompt.
        scale: guidance scale; at 1 the second call is left out.
    """
    if scale == 1:
        return conditional

    def call(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        without = unconditional(sample, timestep)
        return without + scale * (conditional(sample, timestep) - without)

    return call


def jump(
    segments: Segments,
    model: Model,
    sample: torch.Tensor,
    start: torch.Tensor,
    end: torch.Tensor,
) -> torch.Tensor:
    """One call of the model and one first-order step, from point to point.

    Args:
        segments: the schedule.
        model: called once.
        sample: at the points ``start``, [batch, ...], float32 or float64.
        start: [batch], indices of points.
        end: [batch], indices of points.

    Returns:
        The sample at the points ``end``, like ``sample``.
    """
    clean, noise = segments.predict(model(*segments.model_input(sample, start)), sample, start)
    return segments.noised(clean, noise, end)


def reach_back(
    segments: Segments,
    sample: torch.Tensor,
    start: torch.Tensor,
    landed: torch.Tensor,
    edge: torch.Tensor,
) -> torch.Tensor:
    """The clean sample whose jump from ``sample`` at ``start`` lands on ``landed`` at ``edge``.

    The inverse DDIM step of Heek et al.
    """
    alpha, sigma = segments.level(start, sample)
    edge_alpha, edge_sigma = segments.level(edge, sample)
    ratio = edge_sigma / sigma
    return (landed - ratio * sample) / (edge_alpha - ratio * alpha)


@torch.no_grad()
def consistency_target(
    segments: Segments,
    draw: Draw,
    sample: torch.Tensor,
    teacher: Model,
    student: Model,
    always: bool = False,
) -> torch.Tensor:
    """The clean sample that the student is asked for at ``draw.start``; no gradient.

    The teacher steps to ``draw.next``, the student goes on from there to the segment's edge. Where
    the teacher's step ends on the edge the student has no say: this is what anchors the whole
    segment, and why a constant student is not a solution. ``always`` calls it even where no sample
    needs it: the processes of a sharded student have to call it equally often.
    """
    after = jump(segments, teacher, sample, draw.start, draw.next)
    # The student's jump divides by the noise there, and at the clean end there is none.
    inside = draw.next < draw.edge
    landed = after.clone()
    if always or bool(inside.any()):
        # All of the batch, also those that are there already: the prompt is bound to the model.
        start = torch.where(inside, draw.next, draw.start)
        onward = jump(segments, student, after, start, draw.edge)
        shape = (-1,) + (1,) * (sample.ndim - 1)
        landed = torch.where(inside.reshape(shape).to(sample.device), onward, landed)
    return reach_back(segments, sample, draw.start, landed, draw.edge)


def consistency_loss(
    segments: Segments,
    draw: Draw,
    sample: torch.Tensor,
    target: torch.Tensor,
    output: torch.Tensor,
    huber: float | None = None,
) -> torch.Tensor:
    """Weighted distance of the student's clean sample from the target, for each sample.

    Args:
        segments: the schedule.
        draw: where each sample is.
        sample: the student's (unscaled) input, [batch, ...].
        target: of `consistency_target`, like ``sample``.
        output: the student's at ``draw.start``, like ``sample``; has the gradient.
        huber: c of the pseudo-Huber distance ``sqrt(d^2 + c^2) - c``, in units of the velocity's
            root mean square error d; None: ``d^2``.

    Returns:
        [batch], in the dtype of ``sample``. Without ``huber`` it is the velocity's mean square
        error.
    """
    clean, _ = segments.predict(output, sample, draw.start)
    error = (clean - target).square().flatten(1).mean(1)
    square = error * segments.weight(draw.start, sample).flatten()
    if huber is None:
        return square
    return (square + huber**2).sqrt() - huber
