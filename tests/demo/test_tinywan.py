"""The embedded pipeline loads, encodes text as in training, decodes what it encodes, and generates;
training continues bit for bit after being killed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from evdit_opt.demo import TINYWAN_CALL, checkpoint, load_tinywan
from evdit_opt.demo.clips import HELD_OUT, LABELS, VOCABULARY, draw_clip, sample_clip
from evdit_opt.demo.detect import caption_accuracy
from evdit_opt.demo.tinywan import LATENT_SHAPE, WEIGHTS, build_tokenizer
from evdit_opt.demo.train import main
from evdit_opt.demo.train_autoencoder import psnr, to_tensor
from evdit_opt.demo.train_denoiser import FrameRope, Recipe, encode_prompts, parse_phases, train

if TYPE_CHECKING:
    from diffusers import WanPipeline

TINY = Recipe(width=32, layers=2, phases=parse_phases("5:3-5:2,8:17-17:2"), decay_from=5, warmup=2)


@pytest.fixture(scope="module")
def pipeline() -> WanPipeline:
    return load_tinywan()


def test_weights_fit_into_the_package() -> None:
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) < 12e6


def test_every_word_has_its_own_token() -> None:
    tokenizer = build_tokenizer()
    for word in VOCABULARY:
        (token, end) = tokenizer(word).input_ids
        assert token not in (0, 1, 2)
        assert end == 1
    assert tokenizer("a pink circle").input_ids[1] == 2


@torch.no_grad()
def test_training_encodes_prompts_exactly_as_the_pipeline(pipeline: WanPipeline) -> None:
    prompts = ["a red circle moving left", "", HELD_OUT[0].caption(2)]
    theirs, _ = pipeline.encode_prompt(
        prompts, do_classifier_free_guidance=False, max_sequence_length=16
    )
    ours = encode_prompts(pipeline.tokenizer, pipeline.text_encoder, prompts)
    assert torch.equal(ours, theirs)
    assert ours.shape == (3, 16, 64)


@torch.no_grad()
def test_the_autoencoder_keeps_what_detectors_read(pipeline: WanPipeline) -> None:
    clips = [sample_clip(500 + index, LABELS[index * 19]) for index in range(4)]
    decoded, quality = [], []
    for clip in clips:
        video = to_tensor(draw_clip(clip)[None])
        latents = pipeline.vae.encode(video).latent_dist.mode()
        assert latents.shape[1:] == LATENT_SHAPE
        again = pipeline.vae.decode(latents).sample
        quality.append(psnr(video, again))
        decoded.append((again[0].permute(1, 2, 3, 0).numpy() + 1) / 2)
    accuracy = caption_accuracy(decoded, [clip.caption for clip in clips])
    assert accuracy.everything == 1.0
    assert np.mean(quality) > 28, f"{np.mean(quality):.1f} dB"


def test_two_steps_give_a_finite_clip(pipeline: WanPipeline) -> None:
    video = pipeline(
        "a blue square moving right",
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
        **TINYWAN_CALL,
    ).frames
    assert video.shape == (1, 33, 80, 80, 3)
    assert np.isfinite(video).all()


def test_rope_at_all_frames_is_the_models_own(pipeline: WanPipeline) -> None:
    rope = FrameRope(pipeline.transformer.rope)
    latents = torch.zeros(1, *LATENT_SHAPE)
    own = rope(latents)
    rope.frames = torch.tensor([0, 5, 16])
    for whole, chosen in zip(own, rope(latents[:, :, :3]), strict=True):
        expected = whole.view(1, 17, 100, 1, -1)[:, [0, 5, 16]].flatten(1, 2)
        assert torch.equal(chosen, expected)


def test_all_stages_make_a_pipeline_from_nothing(tmp_path: Path) -> None:
    from diffusers import WanPipeline

    small = "--shards 1 --autoencoder-steps 1 --phases 1:3-3:1 --decay-from 0".split()
    threads = ("--threads", str(torch.get_num_threads()))
    folders = ("--folder", str(tmp_path / "run"), "--target", str(tmp_path / "pipeline"))
    main(["all", *small, *threads, *folders])
    assert isinstance(WanPipeline.from_pretrained(tmp_path / "pipeline"), WanPipeline)


def test_a_killed_training_continues_bit_for_bit(tmp_path: Path) -> None:
    for name in ("straight", "killed"):
        generator = torch.Generator().manual_seed(0)
        checkpoint.save(
            tmp_path / name / "pool" / "00000.pt",
            {
                "latents": torch.randn(4, *LATENT_SHAPE, generator=generator).half(),
                "captions": [sample_clip(seed).caption for seed in range(4)],
            },
        )
    list(train(tmp_path / "straight", TINY, log_every=4, save_every=3))

    run = train(tmp_path / "killed", TINY, log_every=4, save_every=3)
    assert next(run)["step"] == 4  # the last checkpoint is of step 3
    run.close()
    (tmp_path / "killed" / "denoiser.partial").write_bytes(b"half a checkpoint")
    assert checkpoint.load(tmp_path / "killed" / "denoiser.pt")["step"] == 3
    list(train(tmp_path / "killed", TINY, log_every=4, save_every=3))

    straight, killed = (
        checkpoint.load(tmp_path / name / "denoiser.pt") for name in ("straight", "killed")
    )
    assert straight["step"] == killed["step"] == 8
    for part, values in straight["average"].items():
        for name, value in values.items():
            assert torch.equal(value, killed["average"][part][name]), f"{part}.{name}"
