"""In real pipelines: TinyWan from text and from video, saved, loaded elsewhere, measured."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanTransformer3DModel, WanVideoToVideoPipeline
from peft import get_peft_model_state_dict
from PIL import Image

import evdit_opt
from evdit_opt import FewStepScheduler
from evdit_opt.demo.tinywan import load_tinywan
from evdit_opt.distill.adapters import add_lora
from evdit_opt.errors import CalibrationError, NonFiniteOutputError
from evdit_opt.sampling.measure import measure_jump_errors, measure_placement

PROMPT = "a red circle moves right"
SMALL = {
    "num_frames": 3,
    "height": 16,
    "width": 16,
    "max_sequence_length": 16,
    "guidance_scale": 2.0,
}


@pytest.fixture(scope="module")
def pipe():
    return load_tinywan()


@pytest.fixture(autouse=True)
def _own_scheduler(pipe):
    own = pipe.scheduler
    yield
    pipe.scheduler = own


def latents(pipe, **call):
    generator = torch.Generator().manual_seed(0)
    return pipe(PROMPT, generator=generator, output_type="latent", **{**SMALL, **call}).frames


def test_a_pipeline_that_asks_for_50_steps_gets_few_and_its_callbacks(pipe):
    pipe.scheduler = FewStepScheduler(pipe.scheduler, steps=3, segments=3)
    seen = []

    def callback(pipeline, number, timestep, tensors):
        seen.append((number, float(timestep), tensors["latents"].shape))
        return {"latents": tensors["latents"]}

    result = latents(pipe, callback_on_step_end=callback)
    assert [number for number, _, _ in seen] == [0, 1, 2]
    assert [timestep for _, timestep, _ in seen] == pipe.scheduler.timesteps.tolist()
    assert torch.equal(result, latents(pipe, num_inference_steps=3))
    assert bool(result.isfinite().all())


def test_the_pipeline_s_own_schedule_gives_its_own_clip(pipe):
    own = latents(pipe, num_inference_steps=4)
    for segments in (None, 4):
        pipe.scheduler = FewStepScheduler(
            pipe.scheduler if segments is None else pipe.scheduler.wrapped,
            steps=4,
            segments=segments,
            full_steps=4,
        )
        assert torch.allclose(latents(pipe, num_inference_steps=4), own, atol=1e-4)


@pytest.mark.parametrize("segments", [None, 4])
def test_video_to_video_starts_inside_the_schedule(pipe, segments):
    pipe.scheduler = FewStepScheduler(pipe.scheduler, steps=4, segments=segments)
    parts = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
    again = WanVideoToVideoPipeline(**{name: pipe.components[name] for name in parts})
    again.set_progress_bar_config(disable=True)
    video = [np.zeros((16, 16, 3), dtype=np.uint8)] * 3
    seen = []

    def callback(pipeline, number, timestep, tensors):
        seen.append(float(timestep))
        return {}

    call = {key: value for key, value in SMALL.items() if key != "num_frames"}
    result = again(
        video=video,
        prompt=PROMPT,
        strength=0.5,
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        callback_on_step_end=callback,
        **call,
    ).frames
    assert seen == pipe.scheduler.timesteps.tolist()[2:]
    assert bool(result.isfinite().all())


def test_a_lora_from_a_file_is_sampled_in_few_steps(tmp_path):
    """As consistency and DMD adapters are published: a file that diffusers' pipelines load."""
    trained = load_tinywan()
    add_lora(trained.transformer, 2, ("to_q", "to_v"), seed=0)
    for name, value in trained.transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.1)
    layers = get_peft_model_state_dict(trained.transformer)
    type(trained).save_lora_weights(tmp_path, transformer_lora_layers=layers)
    loaded = load_tinywan()
    loaded.load_lora_weights(tmp_path)
    results = []
    for one in (loaded, trained, load_tinywan()):
        one.scheduler = FewStepScheduler(one.scheduler, steps=2, segments=2)
        results.append(latents(one))
    assert torch.equal(results[0], results[1])
    assert not torch.allclose(results[0], results[2], atol=1e-2)


@pytest.mark.parametrize("segments", [None, 3])
def test_image_to_video(pipe, segments):
    """A condition beside the latents: 8 channels, and 2 that say which frames are given."""
    torch.manual_seed(0)
    sizes = {**pipe.transformer.config, "in_channels": 18, "num_layers": 1}
    transformer = WanTransformer3DModel.from_config(sizes).eval()
    again = WanImageToVideoPipeline(
        tokenizer=pipe.tokenizer,
        text_encoder=pipe.text_encoder,
        vae=pipe.vae,
        transformer=transformer,
        scheduler=FewStepScheduler(pipe.scheduler, steps=3, segments=segments),
    )
    again.set_progress_bar_config(disable=True)
    seen = []

    def callback(pipeline, number, timestep, tensors):
        seen.append(float(timestep))
        return {}

    result = again(
        image=Image.new("RGB", (16, 16), "red"),
        prompt=PROMPT,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        callback_on_step_end=callback,
        **{**SMALL, "num_frames": 5},
    ).frames
    assert seen == again.scheduler.timesteps.tolist()
    assert len(seen) == 3
    assert result.shape[1] == 8
    assert bool(result.isfinite().all())


def test_a_saved_pipeline_loads_in_a_process_that_only_imported_the_package(pipe, tmp_path):
    pipe.scheduler = FewStepScheduler(
        pipe.scheduler, steps=2, segments=2, placement=[0.0, 0.6], gamma=0.25
    )
    pipe.save_pretrained(tmp_path)
    code = f"""
import evdit_opt
from diffusers import WanPipeline
scheduler = WanPipeline.from_pretrained({str(tmp_path)!r}).scheduler
assert type(scheduler) is evdit_opt.FewStepScheduler, type(scheduler)
scheduler.set_timesteps(50)
print(*scheduler.timesteps.tolist(), scheduler.config.gamma, scheduler.wrapped.config.shift)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pipe.scheduler.set_timesteps(50)
    expected = [*pipe.scheduler.timesteps.tolist(), 0.25, pipe.scheduler.wrapped.config.shift]
    assert [float(word) for word in done.stdout.split()] == expected


def test_a_measured_placement_misses_less_than_an_even_one(pipe):
    call = {key: value for key, value in SMALL.items() if key != "num_inference_steps"}
    errors = measure_jump_errors(pipe, [PROMPT], full_steps=12, pipe_kwargs=call)
    own = pipe.scheduler
    assert type(own).__name__ == "FlowMatchEulerDiscreteScheduler"  # put back
    # The trajectory is Euler's own: every single step of it is a first-order jump.
    scale = float(errors.max())
    assert float(errors.diagonal(1).max()) < 1e-5 * scale
    positions = measure_placement(pipe, [PROMPT], steps=3, full_steps=12, pipe_kwargs=call)

    def total(indices):
        pairs = zip(indices, [*indices[1:], 12], strict=True)
        return sum(float(errors[i, j]) for i, j in pairs)

    assert total([round(12 * position) for position in positions]) < total([0, 4, 8])
    pipe.scheduler = FewStepScheduler(own, steps=3, full_steps=12, placement=positions)
    assert bool(latents(pipe).isfinite().all())


def test_measuring_on_nothing_or_on_nan_is_an_error(pipe):
    with pytest.raises(CalibrationError, match="at least one prompt"):
        measure_jump_errors(pipe, [])
    hook = pipe.transformer.register_forward_hook(
        lambda module, given, output: (output[0] * float("nan"),)
    )
    own = pipe.scheduler
    try:
        with pytest.raises(NonFiniteOutputError):
            measure_jump_errors(pipe, [PROMPT], full_steps=2, pipe_kwargs=SMALL)
    finally:
        hook.remove()
    assert pipe.scheduler is own


def test_other_names_of_the_module_are_errors():
    with pytest.raises(AttributeError):
        evdit_opt.NoSuchScheduler  # noqa: B018
    with pytest.raises(AttributeError):
        evdit_opt.scheduler.NoSuchScheduler  # noqa: B018
