"""The scheduler against diffusers' first-order solvers and flows known in closed form."""

import math

import pytest
import torch
from diffusers import TCDScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from evdit_opt import FewStepScheduler
from evdit_opt.sampling.levels import prediction_type_of
from tests.sampling.wrapped import (
    SCHEDULERS,
    first_order,
    gaussian_flow,
    posterior_mean,
    prediction,
)

names = pytest.mark.parametrize("name", SCHEDULERS)


def noise(seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def sample_with(few, model, sample):
    """Run all steps; ``model(sample, point) -> the clean sample it believes in``."""
    kind = prediction_type_of(few.wrapped)
    for point, timestep in enumerate(few.timesteps):
        few.scale_model_input(sample, timestep) if hasattr(few, "scale_model_input") else None
        alpha, sigma = few.levels.alpha[point], few.levels.sigma[point]
        output = prediction(kind, model(sample, point), sample, alpha, sigma)
        sample = few.step(output, timestep, sample, return_dict=False)[0]
    return sample


def start_of(few, seed: int = 0) -> torch.Tensor:
    return noise(seed) * math.hypot(few.levels.alpha[0], few.levels.sigma[0])


def level(few, point: int) -> tuple[float, float]:
    return few.levels.alpha[point], few.levels.sigma[point]


@names
def test_as_many_segments_as_steps_is_the_wrapped_solver_of_first_order(name):
    few = FewStepScheduler(SCHEDULERS[name](), steps=10, segments=10, full_steps=10)
    own = first_order(name)
    few.set_timesteps(10)
    own.set_timesteps(10)
    assert torch.equal(few.timesteps, own.timesteps)
    ours = theirs = noise(dtype=torch.float32) * float(getattr(own, "init_noise_sigma", 1.0))
    for timestep in own.timesteps:
        if hasattr(own, "scale_model_input"):
            scaled = own.scale_model_input(theirs, timestep)
            assert torch.equal(scaled, few.scale_model_input(theirs, timestep))
        output = torch.tanh(1.3 * theirs) + 0.1  # any function will do: both get the same output
        ours = few.step(output, timestep, theirs).prev_sample
        theirs = own.step(output, timestep, theirs, return_dict=False)[0]
        # Both round in float32, in another order; with a few operations of the size of the terms.
        size = theirs.abs().max() + output.abs().max()
        assert float((ours - theirs).abs().max()) <= 64 * torch.finfo(torch.float32).eps * size


@pytest.mark.parametrize("name", ["flow-euler", "flow-unipc", "dpm-epsilon", "euler-v"])
def test_without_segments_the_wrapped_solver_itself_steps(name):
    few, own = FewStepScheduler(SCHEDULERS[name](), steps=7, full_steps=7), SCHEDULERS[name]()
    few.set_timesteps(7)
    own.set_timesteps(7)
    ours = theirs = noise(dtype=torch.float32)
    for timestep in own.timesteps:
        for scheduler in (few, own):
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(ours, timestep)
        ours = few.step(torch.sin(ours), timestep, ours, return_dict=False)[0]
        theirs = own.step(torch.sin(theirs), timestep, theirs, return_dict=False)[0]
    assert torch.equal(ours, theirs)


@names
def test_the_shortened_schedule_is_whole(name):
    """Noising, input scaling and the wrapped solver see the same levels as the segments' steps."""
    few = FewStepScheduler(first_order(name), steps=6, segments=6, placement="log_snr")
    reducer = FewStepScheduler(first_order(name), steps=6, placement="log_snr")
    few.set_timesteps(50)
    reducer.set_timesteps(50)
    clean, fresh = noise(4, torch.float32), noise(5, torch.float32)
    for point, timestep in enumerate(few.timesteps):
        noised = (
            few.scale_noise(clean, timestep.repeat(2), fresh)
            if hasattr(few, "scale_noise")
            else few.add_noise(clean, fresh, timestep.repeat(2))
        )
        alpha, sigma = level(few, point)
        assert torch.allclose(noised, alpha * clean + sigma * fresh, rtol=1e-5, atol=1e-5)
    ours = theirs = start_of(few).float()
    for timestep in few.timesteps:
        for scheduler in (few, reducer):
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(ours, timestep)
        output = torch.tanh(1.3 * theirs) + 0.1
        ours = few.step(output, timestep, ours).prev_sample
        theirs = reducer.step(output, timestep, theirs).prev_sample
        size = theirs.abs().max() + output.abs().max()
        assert float((ours - theirs).abs().max()) <= 1e-4 * size


@names
@settings(max_examples=10)
@given(segments=st.integers(1, 12), std=st.floats(0.1, 3.0), mean=st.floats(-2, 2))
def test_exact_for_a_consistency_model_of_gaussian_data(name, segments, std, mean):
    """A model that names the clean sample whose jump meets the exact flow at the segment's edge
    is carried along the exact flow, whatever the segments, from any prediction type."""
    few = FewStepScheduler(SCHEDULERS[name](), steps=segments, segments=segments, full_steps=40)
    few.set_timesteps(50)

    def model(sample, point):
        here, there = level(few, point), level(few, point + 1)
        target = gaussian_flow(sample, here, there, mean, std)
        share = there[1] / here[1]
        return (target - share * sample) / (there[0] - share * here[0])

    first = start_of(few)
    got = sample_with(few, model, first)
    exact = gaussian_flow(first, level(few, 0), level(few, segments), mean, std)
    # A prediction divides by sigma, noise prediction is divided by alpha in turn: rounding errors
    # of size 2^-53 that are multiplied back only in part.
    divisors = [sigma for sigma in few.levels.sigma if sigma > 0]
    if prediction_type_of(few.wrapped) == "epsilon":
        divisors += few.levels.alpha
    size = float(first.abs().max()) + abs(mean) + std
    assert float((got - exact).abs().max()) <= 64 * segments * 2**-53 * size / min(divisors)


@names
@given(segments=st.integers(1, 8), extra=st.integers(0, 6))
@settings(max_examples=5)
def test_exact_for_a_single_point_of_data(name, segments, extra):
    """For std = 0 the flow is straight: a plain model is exact, with any number of calls."""
    steps = segments + extra
    few = FewStepScheduler(SCHEDULERS[name](), steps=steps, segments=segments, full_steps=50)
    few.set_timesteps(50)
    target = noise(3)
    first = start_of(few)
    got = sample_with(few, lambda sample, point: target, first)
    alpha, sigma = level(few, 0)
    end_alpha, end_sigma = level(few, steps)
    exact = end_alpha * target + end_sigma * (first - alpha * target) / sigma
    assert float((got - exact).abs().max()) <= 1e-9 * float(first.abs().max())


@pytest.mark.parametrize("name", ["flow-euler", "dpm-epsilon", "ddim-v", "euler-epsilon"])
def test_first_order_convergence_of_a_plain_model(name):
    """Doubling the steps halves the error against the closed-form flow."""

    def error(steps):
        few = FewStepScheduler(SCHEDULERS[name](), steps=steps, segments=steps, full_steps=500)
        few.set_timesteps(500)
        mean, std = 0.5, 0.6
        first = start_of(few)
        got = sample_with(few, lambda z, i: posterior_mean(z, *level(few, i), mean, std), first)
        exact = gaussian_flow(first, level(few, 0), level(few, steps), mean, std)
        return float((got - exact).abs().mean())

    orders = [math.log2(error(steps) / error(2 * steps)) for steps in (25, 50, 100)]
    # The last one is nearest to the limit 1; the schedule's end and rounding to points bend it.
    assert 0.8 < orders[-1] < 1.3, orders


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_gamma_is_that_of_tcd(kind, gamma):
    """The same timesteps in diffusers' TCDScheduler: equal up to its last step, which stops at
    timestep 0 where this one goes to the wrapped scheduler's terminal point."""
    from diffusers import DDIMScheduler

    ddim = DDIMScheduler(prediction_type=kind, clip_sample=False, timestep_spacing="trailing")
    few = FewStepScheduler(ddim, steps=5, segments=5, full_steps=10, gamma=gamma)
    few.set_timesteps(10)
    tcd = TCDScheduler(prediction_type=kind, beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
    tcd.set_timesteps(5)
    tcd.timesteps = few.timesteps
    ours = theirs = noise(dtype=torch.float32)
    generators = [torch.Generator().manual_seed(9) for _ in range(2)]
    for timestep in few.timesteps[:-1]:
        output = torch.tanh(theirs)
        ours = few.step(output, timestep, theirs, generator=generators[0]).prev_sample
        theirs = tcd.step(output, timestep, theirs, eta=gamma, generator=generators[1]).prev_sample
        # TCD takes roots of float32 tables; at timestep 999 1/alpha is 157.
        assert torch.allclose(ours, theirs, rtol=0, atol=2e-3 * 1e-1 * float(theirs.abs().max()))


@pytest.mark.parametrize("name", ["flow-euler", "unipc-v", "ddim-epsilon", "euler-epsilon"])
@pytest.mark.parametrize("gamma", [0.1, 0.5, 1.0])
def test_gamma_keeps_the_variance_of_every_level(name, gamma):
    """For data at 0 the sample is pure noise of variance sigma^2 at every edge, also after noise
    was added: the coefficients of kept and fresh noise are orthogonal parts of it."""
    few = FewStepScheduler(SCHEDULERS[name](), steps=4, segments=4, gamma=gamma)
    few.set_timesteps(50)
    kind = prediction_type_of(few.wrapped)
    sample = torch.randn(
        1, 400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    sample = sample * few.levels.sigma[0]
    few.generator = torch.Generator().manual_seed(1)
    for point, timestep in enumerate(few.timesteps):
        zero = torch.zeros_like(sample)
        output = prediction(kind, zero, sample, *level(few, point))
        sample = few.step(output, timestep, sample, return_dict=False)[0]
        # The standard error of a deviation from n values is 1 / sqrt(2 n) of it; 5 of them.
        wanted = few.levels.sigma[point + 1]
        assert float(sample.std()) == pytest.approx(wanted, rel=5 / math.sqrt(2 * 4e5), abs=1e-12)


def test_the_generator_decides_the_noise():
    def run(seed, through):
        few = FewStepScheduler(SCHEDULERS["flow-euler"](), steps=3, segments=3, gamma=0.5)
        few.set_timesteps(3)
        generator, sample = torch.Generator().manual_seed(seed), noise(dtype=torch.float32)
        if through == "attribute":
            few.generator = generator
        for timestep in few.timesteps:
            passed = generator if through == "argument" else None
            sample = few.step(sample / 2, timestep, sample, generator=passed).prev_sample
        return sample

    assert torch.equal(run(1, "argument"), run(1, "argument"))
    assert torch.equal(run(1, "argument"), run(1, "attribute"))
    assert not torch.equal(run(1, "argument"), run(2, "argument"))


@names
@settings(max_examples=15)
@given(
    steps=st.integers(1, 20),
    share=st.floats(0, 1),
    shift=st.floats(0.2, 5),
    asked=st.integers(20, 100),
)
def test_timesteps_fall_and_levels_get_quieter(name, steps, share, shift, asked):
    segments = max(1, round(share * steps))
    few = (
        FewStepScheduler(
            SCHEDULERS[name](), steps=steps, segments=segments, full_steps=60, time_shift=shift
        )
        if steps == segments
        else FewStepScheduler(SCHEDULERS[name](), steps=steps, time_shift=shift)
    )
    few.set_timesteps(asked)
    timesteps, snr = few.timesteps.tolist(), few.levels.log_snr()
    assert len(timesteps) == steps == len(snr) - 1
    assert timesteps == sorted(set(timesteps), reverse=True)
    assert list(snr) == sorted(snr)


def test_a_time_shift_multiplies_the_one_of_the_scheduler():
    """Shift 2 over shift 3 is shift 6, up to half a point of the long schedule."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    def sigmas(own, extra):
        wrapped = FlowMatchEulerDiscreteScheduler(shift=own)
        few = FewStepScheduler(wrapped, steps=5, full_steps=1000, time_shift=extra)
        few.set_timesteps(sigmas=[1 - i / 1000 for i in range(1000)])
        return few.sigmas

    slope = 6.0  # of the shifted time at its steepest, at the quiet end
    assert torch.allclose(sigmas(3.0, 2.0), sigmas(6.0, 1.0), rtol=0, atol=slope * 1e-3)


def test_mochi_s_inverted_sigmas():
    from diffusers import FlowMatchEulerDiscreteScheduler

    wrapped = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    few = FewStepScheduler(wrapped, steps=4, segments=4)
    few.set_timesteps(50)
    clean, sample = noise(2), noise(1)
    alpha, sigma = level(few, 0)
    sample = alpha * clean + sigma * sample
    for point, timestep in enumerate(few.timesteps):
        alpha, sigma = level(few, point)
        velocity = clean - (sample - alpha * clean) / sigma  # towards the clean sample
        sample = few.step(velocity, timestep, sample).prev_sample
    assert torch.allclose(sample, clean, atol=1e-12)


@pytest.mark.parametrize("thresholding", [False, True])
def test_clipping_is_that_of_ddim(thresholding):
    from diffusers import DDIMScheduler

    own = DDIMScheduler(
        clip_sample=True,
        thresholding=thresholding,
        timestep_spacing="trailing",
        sample_max_value=2.0,
    )
    few = FewStepScheduler(own, steps=10, segments=10, full_steps=10)
    few.set_timesteps(10)
    own.set_timesteps(10)
    sample = 3 * noise(dtype=torch.float32)
    for timestep in own.timesteps:
        ours = few.step(torch.tanh(sample), timestep, sample).prev_sample
        theirs = own.step(torch.tanh(sample), timestep, sample).prev_sample
        assert torch.allclose(ours, theirs, atol=1e-5)
        sample = theirs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_sample_keeps_the_dtype_of_the_model_s_output(dtype):
    few = FewStepScheduler(SCHEDULERS["flow-unipc"](), steps=2, segments=2)
    few.set_timesteps(2)
    sample = noise(dtype=dtype)
    result = few.step(sample, few.timesteps[0], sample)
    assert result.prev_sample.dtype == dtype
    assert result.pred_original_sample.dtype == torch.promote_types(dtype, torch.float32)
