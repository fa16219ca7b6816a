"""Multistep consistency distillation on Gaussian data, where the flow is a formula."""

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from evdit_opt.distill.consistency import (
    Model,
    consistency_loss,
    consistency_target,
    guided,
    jump,
    reach_back,
)
from evdit_opt.distill.segments import Draw, Segments, segments_of
from evdit_opt.scheduler import FewStepScheduler

SPREAD = 0.5  # standard deviation of the data
SCHEDULERS = {
    "flow": FlowMatchEulerDiscreteScheduler(shift=3.0),
    "epsilon": DDIMScheduler(clip_sample=False, timestep_spacing="trailing"),
    "v": DDIMScheduler(
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    ),
    "exploding": EulerDiscreteScheduler(prediction_type="epsilon", timestep_spacing="trailing"),
}


@pytest.fixture(params=SCHEDULERS)
def segments(request: pytest.FixtureRequest) -> Segments:
    return segments_of(SCHEDULERS[request.param], segments=4, full_steps=20)


def output_for(segments: Segments, clean: torch.Tensor, sample: torch.Tensor, point: int):
    """What a model has to say for `segments.predict` to find ``clean``: predict is affine."""
    points = torch.full((len(sample),), point)
    zero, _ = segments.predict(torch.zeros_like(sample), sample, points)
    one, _ = segments.predict(torch.ones_like(sample), sample, points)
    return (clean - zero) / (one - zero)


def spread_at(segments: Segments, point: int) -> float:
    """Standard deviation of noised data; the exact flow scales samples by its ratio."""
    return float(torch.hypot(SPREAD * segments.alpha[point], segments.sigma[point]))


def model_that_lands(segments: Segments, end_of: dict[int, int], exact: bool = True) -> Model:
    """A model whose jump from each point lands where the exact flow is at ``end_of`` the point.

    With exact=False it is the true model of the data instead: the conditional mean.
    """

    def call(scaled: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        rows = []
        for row, time in zip(scaled, timestep.tolist(), strict=True):
            point = segments.timesteps.tolist().index(time)
            alpha, sigma = float(segments.alpha[point]), float(segments.sigma[point])
            scale = (alpha**2 + sigma**2) ** 0.5 if segments.convention == "exploding" else 1.0
            sample = (row * scale)[None]
            if exact:
                end = end_of[point]
                landed = sample * spread_at(segments, end) / spread_at(segments, point)
                one = torch.tensor([point]), torch.tensor([end])
                clean = reach_back(segments, sample, one[0], landed, one[1])
            else:
                clean = sample * alpha * SPREAD**2 / spread_at(segments, point) ** 2
            rows.append(output_for(segments, clean, sample, point))
        return torch.cat(rows)

    return call


def every_step(segments: Segments) -> Draw:
    """All single steps of the schedule, one a sample."""
    ends = torch.tensor(segments.edges[1:])
    start = torch.arange(segments.edges[-1])
    edge = ends[torch.searchsorted(ends, start, right=True)]
    return Draw(start=start, next=start + 1, edge=edge)


def samples(segments: Segments, draw: Draw) -> torch.Tensor:
    noise = torch.randn(len(draw.start), 6, generator=torch.Generator().manual_seed(0)).double()
    clean = SPREAD * torch.randn(noise.shape, generator=torch.Generator().manual_seed(1)).double()
    return segments.noised(clean, noise, draw.start)


def loss_of(segments: Segments, draw: Draw, teacher: Model, student: Model) -> torch.Tensor:
    sample = samples(segments, draw)
    target = consistency_target(segments, draw, sample, teacher, student)
    output = student(*segments.model_input(sample, draw.start))
    return consistency_loss(segments, draw, sample, target, output)


def rounding(segments: Segments, draw: Draw) -> torch.Tensor:
    """Loss that float64 alone makes, for each sample.

    Some 32 operations lie between a sample and the clean sample that the loss compares, on numbers
    no larger than what is divided by the length of a jump, or by the slope of `Segments.predict`.
    """
    sample = samples(segments, draw)
    alpha, sigma = segments.level(draw.start, sample)
    next_alpha, next_sigma = segments.level(draw.next, sample)
    length = next_alpha - next_sigma / sigma * alpha
    sizes = [sample / length]
    sizes += [segments.predict(torch.full_like(sample, x), sample, draw.start)[0] for x in (0, 1)]
    largest = float(torch.stack(sizes).abs().max())
    error = 32 * torch.finfo(torch.float64).eps * largest
    return segments.weight(draw.start, sample).flatten() * error**2


def test_the_exact_flow_is_a_fixed_point(segments: Segments) -> None:
    """A student that jumps to the edge along the exact flow has no loss with an exact teacher."""
    draw = every_step(segments)
    teacher = model_that_lands(segments, {i: i + 1 for i in range(20)})
    student = model_that_lands(segments, dict(enumerate(draw.edge.tolist())))
    bound = rounding(segments, draw)
    assert float(bound.max()) < 1e-14
    assert bool((loss_of(segments, draw, teacher, student) <= bound).all())


def test_so_is_the_teachers_own_path(segments: Segments) -> None:
    """With a real teacher the student's fixed point lands where the teacher's many steps do."""
    teacher = model_that_lands(segments, {}, exact=False)
    draw = every_step(segments)

    def student(scaled: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        rows = []
        for row, time in zip(scaled, timestep.tolist(), strict=True):
            point = segments.timesteps.tolist().index(time)
            level = torch.tensor([point])
            alpha, sigma = segments.level(level, row[None])
            exploding = segments.convention == "exploding"
            sample = row[None] * (torch.hypot(alpha, sigma) if exploding else 1.0)
            landed = sample
            for i in range(point, int(draw.edge[point])):
                landed = jump(segments, teacher, landed, torch.tensor([i]), torch.tensor([i + 1]))
            clean = reach_back(segments, sample, level, landed, draw.edge[point : point + 1])
            rows.append(output_for(segments, clean, sample, point))
        return torch.cat(rows)

    assert bool((loss_of(segments, draw, teacher, student) <= rounding(segments, draw)).all())


def test_a_collapsed_student_has_loss(segments: Segments) -> None:
    """A student that always says the same agrees with itself, but not with the teacher's step."""
    draw = every_step(segments)
    teacher = model_that_lands(segments, {i: i + 1 for i in range(20)})

    def collapsed(scaled: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        points = [segments.timesteps.tolist().index(time) for time in timestep.tolist()]
        zero = torch.zeros_like(scaled[:1])
        unscaled = [
            row[None] * float(torch.hypot(segments.alpha[p], segments.sigma[p]))
            if segments.convention == "exploding"
            else row[None]
            for row, p in zip(scaled, points, strict=True)
        ]
        pairs = zip(unscaled, points, strict=True)
        return torch.cat([output_for(segments, zero, row, point) for row, point in pairs])

    last = torch.tensor(segments.edges[1:]) - 1
    sample = samples(segments, draw)
    clean = sample * torch.tensor(
        [[spread_at(segments, i + 1) / spread_at(segments, i)] for i in range(20)],
        dtype=torch.float64,
    )
    clean = reach_back(segments, sample, draw.start, clean, draw.next)
    missed = (clean.square().mean(1) * segments.weight(draw.start, sample).flatten())[last]
    loss = loss_of(segments, draw, teacher, collapsed)[last]
    assert float(missed.min()) > 1e6 * float(rounding(segments, draw).max())
    assert torch.allclose(loss, missed, rtol=1e-9)


def test_training_finds_the_teachers_path() -> None:
    """One number a point, trained on the loss alone, ends where the teacher's steps end."""
    segments = segments_of(SCHEDULERS["flow"], segments=2, full_steps=8)
    teacher = model_that_lands(segments, {}, exact=False)
    draw = every_step(segments)
    slopes = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    times = segments.timesteps.tolist()

    def student(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return slopes[[times.index(time) for time in timestep.tolist()]][:, None] * sample

    optimizer = torch.optim.Adam([slopes], lr=0.05)
    for step in range(600):
        optimizer.param_groups[0]["lr"] = 0.05 * min(1.0, (600 - step) / 300)
        optimizer.zero_grad()
        loss_of(segments, draw, teacher, student).sum().backward()
        optimizer.step()
    start = torch.ones(1, 1, dtype=torch.float64)
    jumped, stepped = start, start
    for first, last in ((0, 4), (4, 8)):
        jumped = jump(segments, student, jumped, torch.tensor([first]), torch.tensor([last]))
    for i in range(8):
        stepped = jump(segments, teacher, stepped, torch.tensor([i]), torch.tensor([i + 1]))
    # Adam stops moving at about its last learning rate, here 0.05 / 300, times jumps of length < 1.
    assert abs(float(jumped - stepped)) < 2 * 0.05 / 300


def test_the_sampler_visits_the_trained_points() -> None:
    scheduler = SCHEDULERS["flow"]
    segments = segments_of(scheduler, segments=6, full_steps=50, time_shift=1.5)
    few = FewStepScheduler(scheduler, steps=6, segments=6, full_steps=50, time_shift=1.5)
    few.set_timesteps(6)
    assert segments.timesteps[list(segments.edges[:-1])].tolist() == few.timesteps.tolist()
    assert segments.alpha[list(segments.edges)].tolist() == list(few.levels.alpha)


def test_a_jump_is_the_samplers_step(segments: Segments, request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.params["segments"]
    few = FewStepScheduler(SCHEDULERS[name], steps=4, segments=4, full_steps=20)
    few.set_timesteps(4)
    sample = torch.randn(1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    output = torch.randn(1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    first, second = (torch.tensor([edge]) for edge in segments.edges[:2])
    jumped = jump(segments, lambda *_: output, sample, first, second)
    stepped = few.step(output, few.timesteps[0], sample).prev_sample
    assert torch.allclose(jumped, stepped, rtol=8 * torch.finfo(torch.float64).eps, atol=0)


def test_without_huber_flow_loss_is_the_velocitys() -> None:
    segments = segments_of(SCHEDULERS["flow"], segments=2, full_steps=8)
    draw = every_step(segments)
    sample = samples(segments, draw)
    wanted, output = torch.zeros_like(sample), torch.full_like(sample, 0.5)
    target, _ = segments.predict(wanted, sample, draw.start)
    square = consistency_loss(segments, draw, sample, target, output)
    assert torch.allclose(square, torch.full_like(square, 0.25))
    huber = consistency_loss(segments, draw, sample, target, output, huber=1e-3)
    assert torch.allclose(huber, torch.full_like(huber, (0.25 + 1e-6) ** 0.5 - 1e-3))


def test_guidance_is_folded_in() -> None:
    calls = []

    def model(value: float) -> Model:
        def call(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            calls.append(value)
            return torch.full_like(sample, value)

        return call

    at = torch.zeros(1, 2), torch.zeros(1)
    assert guided(model(3.0), model(1.0), 2.0)(*at).tolist() == [[5.0, 5.0]]
    calls.clear()
    assert guided(model(3.0), model(1.0), 1.0)(*at).tolist() == [[3.0, 3.0]]
    assert calls == [3.0]
