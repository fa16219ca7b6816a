"""Noise levels mean in every wrapped class what its own ``add_noise`` or ``scale_noise`` does."""

import pytest
import torch
from diffusers import PNDMScheduler
from hypothesis import given
from hypothesis import strategies as st

from evdit_opt.errors import SchedulerError, UnsupportedInputError
from evdit_opt.sampling.levels import (
    PREDICTIONS,
    clean_and_noise,
    convention_of,
    noise_levels,
    prediction_type_of,
)
from tests.sampling.wrapped import SCHEDULERS, prediction

names = pytest.mark.parametrize("name", SCHEDULERS)


@names
def test_levels_are_those_of_the_scheduler_s_own_noising(name):
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(10)
    levels = noise_levels(scheduler)
    clean, noise = torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(0))
    for point, timestep in enumerate(scheduler.timesteps):
        if hasattr(scheduler, "scale_noise"):
            theirs = scheduler.scale_noise(clean, timestep[None], noise)
        else:
            theirs = scheduler.add_noise(clean, noise, timestep[None])
        ours = levels.alpha[point] * clean + levels.sigma[point] * noise
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@names
def test_the_terminal_point_has_no_noise(name):
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(10)
    levels = noise_levels(scheduler)
    assert (levels.alpha[-1], levels.sigma[-1]) == (1.0, 0.0)
    snr = levels.log_snr()
    assert list(snr) == sorted(snr)


@given(
    alpha=st.floats(0.01, 1),
    sigma=st.floats(0.01, 100),
    kind=st.sampled_from([kind for kind in PREDICTIONS if kind != "flow_prediction"]),
)
def test_predictions_are_taken_apart_again(alpha, sigma, kind):
    clean, noise = torch.randn(2, 8, generator=torch.Generator().manual_seed(1)).double()
    sample = alpha * clean + sigma * noise
    output = prediction(kind, clean, sample, alpha, sigma)
    back = clean_and_noise(kind, output, sample, alpha, sigma)
    # Cancellation loses what the other part outweighs, at most 1e4 here.
    for got, wanted in zip(back, (clean, noise), strict=True):
        assert torch.allclose(got, wanted, rtol=0, atol=1e-10)


@given(sigma=st.floats(0, 1))
def test_the_flow_s_velocity_is_taken_apart_again(sigma):
    clean, noise = torch.randn(2, 8, generator=torch.Generator().manual_seed(1)).double()
    sample = (1 - sigma) * clean + sigma * noise
    back = clean_and_noise("flow_prediction", noise - clean, sample, 1 - sigma, sigma)
    assert torch.allclose(torch.stack(back), torch.stack((clean, noise)), atol=1e-14)


def test_another_scheduler_is_refused():
    with pytest.raises(UnsupportedInputError, match=r"UniPCMultistepScheduler, got PNDM"):
        convention_of(PNDMScheduler())


@pytest.mark.parametrize(
    ("name", "kind"),
    [("flow-unipc", "epsilon"), ("unipc-v", "flow_prediction"), ("ddim-v", "mean")],
)
def test_a_prediction_type_without_meaning_is_refused(name, kind):
    scheduler = SCHEDULERS[name]()
    scheduler.register_to_config(prediction_type=kind)
    with pytest.raises(SchedulerError, match=f"expected a prediction_type among .* got '{kind}'"):
        prediction_type_of(scheduler)
