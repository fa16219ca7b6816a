"""Wrong use gives one clear error each; configurations survive files and diffusers' own idioms."""

import copy
import json

import pytest
import torch
from diffusers import PNDMScheduler, UniPCMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from evdit_opt import FewStepScheduler
from evdit_opt.errors import EvditError, SchedulerError, UnsupportedInputError
from evdit_opt.sampling.few_step import OWN_KEYS
from tests.sampling.wrapped import SCHEDULERS

names = pytest.mark.parametrize("name", SCHEDULERS)
WRONG = {
    "no steps": ({"steps": 0}, "steps to be an integer of at least 1, got 0"),
    "steps of a wrong type": ({"steps": 2.5}, "steps to be an integer"),
    "more segments than steps": ({"segments": 5}, r"as many segments as steps \(4\), got 5"),
    "more steps than the schedule has": ({"full_steps": 3}, r"full_steps of at least steps \(4\)"),
    "gamma below 0": ({"segments": 4, "gamma": -0.1}, r"gamma in \[0, 1\], got -0.1"),
    "gamma above 1": ({"segments": 4, "gamma": 1.5}, r"gamma in \[0, 1\], got 1.5"),
    "gamma is nan": ({"segments": 4, "gamma": float("nan")}, r"gamma in \[0, 1\]"),
    "gamma without segments": ({"gamma": 0.3}, "gamma 0 without segments"),
    "no time": ({"time_shift": 0.0}, "time_shift above 0"),
    "time_shift is text": ({"time_shift": "3"}, "time_shift to be a number"),
    "time_shift with log_snr": ({"time_shift": 2.0, "placement": "log_snr"}, "time_shift 1 with"),
    "unknown placement": ({"placement": "karras"}, "placement 'even', 'log_snr' or a list"),
    "too few positions": ({"placement": [0.0, 0.5]}, "expected 4 positions"),
    "a position past the end": ({"placement": [0.0, 0.5, 0.7, 1.0]}, "from 0 to below 1"),
    "positions that fall": ({"placement": [0.0, 0.5, 0.4, 0.6]}, "expected rising positions"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_settings(wrong):
    arguments, message = WRONG[wrong]
    with pytest.raises(SchedulerError, match=message):
        FewStepScheduler(SCHEDULERS["flow-euler"](), **{"steps": 4, **arguments})


def test_an_unsupported_scheduler():
    with pytest.raises(UnsupportedInputError, match="got PNDMScheduler; convert it first"):
        FewStepScheduler(PNDMScheduler(), steps=4)
    few = FewStepScheduler(SCHEDULERS["flow-euler"](), steps=4)
    with pytest.raises(UnsupportedInputError, match=r"got FewStepScheduler; give .*wrapped"):
        FewStepScheduler(few, steps=4)


def test_an_unknown_prediction_type():
    scheduler = UniPCMultistepScheduler(prediction_type="score")
    with pytest.raises(SchedulerError, match="got 'score'"):
        FewStepScheduler(scheduler, steps=4)


@names
@pytest.mark.parametrize("segments", [None, 4])
def test_a_step_before_set_timesteps(name, segments):
    few = FewStepScheduler(SCHEDULERS[name](), steps=4, segments=segments)
    with pytest.raises(SchedulerError, match="expected set_timesteps first"):
        few.step(torch.zeros(1), few.timesteps[0], torch.zeros(1))


@pytest.mark.parametrize("name", ["flow-euler", "ddim-v", "unipc-epsilon"])
def test_a_timestep_that_is_not_in_the_schedule(name):
    few = FewStepScheduler(SCHEDULERS[name](), steps=4, segments=4)
    few.set_timesteps(4)
    with pytest.raises(SchedulerError, match=r"expected a timestep among .* got 3\.5"):
        few.step(torch.zeros(1), 3.5, torch.zeros(1))


def test_a_step_after_the_last():
    few = FewStepScheduler(SCHEDULERS["flow-euler"](), steps=1, segments=1)
    few.set_timesteps(1)
    few.step(torch.zeros(1), few.timesteps[0], torch.zeros(1))
    with pytest.raises(SchedulerError, match="expected at most 1 steps, got one more"):
        few.step(torch.zeros(1), few.timesteps[0], torch.zeros(1))


def test_fewer_steps_asked_for_than_set():
    few = FewStepScheduler(SCHEDULERS["flow-euler"](), steps=4)
    with pytest.raises(SchedulerError, match=r"num_inference_steps of at least steps \(4\), got 3"):
        few.set_timesteps(3)
    with pytest.raises(SchedulerError, match="at least 4 steps to place 4 in, got 2"):
        few.set_timesteps(sigmas=[1.0, 0.5])


def test_sigmas_the_wrapped_scheduler_does_not_take():
    few = FewStepScheduler(SCHEDULERS["ddim-v"](), steps=4)
    with pytest.raises(SchedulerError, match="expected no sigmas for DDIMScheduler"):
        few.set_timesteps(sigmas=[1.0, 0.8, 0.6, 0.4])


def test_a_schedule_longer_than_the_training_timesteps():
    few = FewStepScheduler(SCHEDULERS["ddim-v"](), steps=4, full_steps=2000)
    with pytest.raises(SchedulerError, match=r"'num_inference_steps': 2000.*full_steps says"):
        few.set_timesteps(50)


def test_arguments_a_first_order_step_has_not():
    few = FewStepScheduler(SCHEDULERS["ddim-v"](), steps=4)
    few.set_timesteps(4)
    with pytest.raises(SchedulerError, match="expected no eta"):
        few.step(torch.zeros(1), few.timesteps[0], torch.zeros(1), eta=0.5)


def test_pure_noise_and_noise_prediction():
    from diffusers import DDIMScheduler

    wrapped = DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(SchedulerError, match="expected some signal at the first point"):
        FewStepScheduler(wrapped, steps=4).set_timesteps(4)


def test_gamma_without_training_timesteps():
    from diffusers import EulerDiscreteScheduler

    wrapped = EulerDiscreteScheduler(
        prediction_type="v_prediction", timestep_type="continuous", sigma_min=0.002, sigma_max=700.0
    )
    FewStepScheduler(wrapped, steps=4, segments=4).set_timesteps(4)
    with pytest.raises(SchedulerError, match=r"gamma 0 with continuous timesteps, got 0\.3"):
        FewStepScheduler(wrapped, steps=4, segments=4, gamma=0.3)


def test_a_stochastic_solver_under_segments():
    from diffusers import DPMSolverMultistepScheduler

    wrapped = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")
    FewStepScheduler(wrapped, steps=4)
    with pytest.raises(SchedulerError, match="got algorithm_type='sde-dpmsolver"):
        FewStepScheduler(wrapped, steps=4, segments=4)


@names
@settings(max_examples=8)
@given(data=st.data())
def test_configurations_come_back_from_a_file(name, data, tmp_path_factory):
    steps = data.draw(st.integers(1, 10))
    segments = data.draw(st.none() | st.integers(1, steps))
    placement = data.draw(
        st.sampled_from(["even", "log_snr"])
        | st.just([k / (segments or steps) for k in range(segments or steps)])
    )
    few = FewStepScheduler(
        SCHEDULERS[name](),
        steps=steps,
        segments=segments,
        placement=placement,
        time_shift=data.draw(st.floats(0.5, 4)) if placement == "even" else 1.0,
        gamma=data.draw(st.floats(0, 1)) if segments else 0.0,
    )
    folder = tmp_path_factory.mktemp("scheduler")
    few.save_pretrained(folder)
    back = FewStepScheduler.from_pretrained(folder)
    public = {key: value for key, value in few.config.items() if key[0] != "_"}
    assert {key: value for key, value in back.config.items() if key[0] != "_"} == public
    assert FewStepScheduler.from_config(few.config).config["wrapped"] == public["wrapped"]
    for scheduler in (few, back):
        scheduler.set_timesteps(50)
    assert torch.equal(few.timesteps, back.timesteps)
    assert few.levels == back.levels


def test_made_from_the_configuration_of_a_loaded_scheduler(tmp_path):
    SCHEDULERS["flow-euler"]().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "scheduler_config.json").read_text())
    few = FewStepScheduler.from_config(config, steps=6, shift=7.0)
    assert (few.config.wrapped, few.config.steps) == ("FlowMatchEulerDiscreteScheduler", 6)
    assert few.wrapped.config.shift == few.config.shift == 7.0
    with pytest.raises(SchedulerError, match="expected steps, got none"):
        FewStepScheduler.from_config(config)
    with pytest.raises(UnsupportedInputError, match="pass the scheduler itself"):
        FewStepScheduler.from_config({"steps": 4})
    with pytest.raises(EvditError):
        FewStepScheduler.from_config(few.config, segments=7)


def test_diffusers_own_idiom_takes_the_wrapped_configuration_back():
    few = FewStepScheduler(SCHEDULERS["flow-unipc"](), steps=4)
    assert UniPCMultistepScheduler.from_config(few.config).config.flow_shift == 3.0


@names
def test_no_entry_of_a_wrapped_scheduler_is_hidden(name):
    assert not OWN_KEYS & set(SCHEDULERS[name]().config)


def test_the_wrapped_scheduler_is_a_copy_and_copies_work():
    own = SCHEDULERS["flow-euler"]()
    before = own.timesteps.clone()
    few = FewStepScheduler(own, steps=3)
    few.set_timesteps(3)
    assert torch.equal(own.timesteps, before)
    twin = copy.deepcopy(few)
    twin.set_timesteps(50)
    assert torch.equal(twin.timesteps, few.timesteps)
