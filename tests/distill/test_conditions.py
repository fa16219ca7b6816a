"""Prompts become the arguments of the denoiser's call, read off the pipeline's own."""

import pytest
import torch

from evdit_opt.demo.tinywan import load_tinywan
from evdit_opt.distill.conditions import Conditions
from evdit_opt.errors import DistillationError

CALL = {"num_frames": 5, "height": 32, "width": 32, "max_sequence_length": 16}
PROMPTS = ("a red circle moving left", "a blue square moving up")


@torch.no_grad()
def test_a_bound_model_says_what_the_pipelines_call_says() -> None:
    """A batch of two against two calls: float32 sums in another order, relative to the output."""
    pipe = load_tinywan()
    conditions = Conditions(pipe, [*PROMPTS, *PROMPTS, ""], {**CALL, "guidance_scale": 7.0})
    assert set(conditions.of) == {*PROMPTS, ""}
    assert conditions.shape == (8, 3, 8, 8)
    sample = torch.randn(2, *conditions.shape, generator=torch.Generator().manual_seed(0))
    timestep = torch.tensor([900.0, 300.0])
    both = conditions.bind(pipe.transformer, PROMPTS)(sample, timestep)
    for n, prompt in enumerate(PROMPTS):
        text, _ = pipe.encode_prompt(
            prompt, do_classifier_free_guidance=False, max_sequence_length=16
        )
        one = slice(n, n + 1)
        alone = pipe.transformer(sample[one], timestep[one], text, return_dict=False)[0]
        largest = float(alone.abs().max())
        assert float((both[one] - alone).abs().max()) < 64 * 2**-23 * largest
    empty = conditions.bind(pipe.transformer, ["", ""])(sample, timestep)
    assert float((both - empty).abs().max()) > 1e-2 * float(both.abs().max())


def test_text_of_several_lengths_is_refused() -> None:
    pipe = load_tinywan()
    encode = pipe.encode_prompt

    def unpadded(prompt: object, *given: object, **named: object):
        text, negative = encode(prompt, *given, **named)
        return text[:, : len(str(prompt).split())], negative

    pipe.encode_prompt = unpadded
    with pytest.raises(DistillationError, match="max_sequence_length"):
        Conditions(pipe, ["a red circle", "a circle"], CALL)


def test_a_model_that_is_given_more_than_latents_is_refused() -> None:
    pipe = load_tinywan()
    pipe.transformer.register_to_config(in_channels=20)  # as image-to-video models have it
    with pytest.raises(DistillationError, match="takes 20 channels and makes 8"):
        Conditions(pipe, PROMPTS[:1], CALL)


def test_a_model_that_is_told_its_guidance_is_refused() -> None:
    pipe = load_tinywan()
    pipe.transformer.register_forward_pre_hook(
        lambda _, args, named: (args, {**named, "guidance": torch.ones(1)}), with_kwargs=True
    )
    with pytest.raises(DistillationError, match="guidance is distilled already"):
        Conditions(pipe, PROMPTS[:1], CALL)


def test_latents_come_in_the_precision_of_the_pipelines_call() -> None:
    """Whatever its first other argument is: a mask of integers, say."""
    pipe = load_tinywan().to(torch.bfloat16)
    pipe.transformer.register_forward_pre_hook(
        lambda _, args, named: (args, {"encoder_mask": torch.ones(1, 3).long(), **named}),
        with_kwargs=True,
    )
    seen = []

    def model(**named: torch.Tensor) -> torch.Tensor:
        seen.append(named["hidden_states"].dtype)
        return named["hidden_states"]

    bound = Conditions(pipe, PROMPTS[:1], CALL).bind(model, PROMPTS[:1])
    output = bound(torch.zeros(1, 8, 2, 8, 8), torch.zeros(1))
    assert seen == [torch.bfloat16]
    assert output.dtype == torch.float32
