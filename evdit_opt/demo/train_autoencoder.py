"""Stage one: train the autoencoder on small crops, then turn clips into shards of latents."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from evdit_opt.demo import checkpoint
from evdit_opt.demo.clips import FRAMES, SIZE, draw_clip, sample_clip
from evdit_opt.demo.tinywan import build_autoencoder

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

logger = logging.getLogger(__name__)

VALIDATION_SEED = 9_000_000
"""First of the seeds that no training stage draws clips from."""
KL_WEIGHT = 3e-5
LONG_CROPS_FROM = 1500
"""From this step on, crops outlast the memory of the causal convolutions, or colours drift."""


def draw_crops(seed: int, count: int, frames: int, size: int) -> torch.Tensor:
    """Random space-time crops, [batch, channels, frames, height, width] in -1..1."""
    random = np.random.default_rng(seed)
    crops = []
    for _ in range(count):
        video = draw_clip(sample_clip(int(random.integers(VALIDATION_SEED))))
        first = random.integers(FRAMES - frames + 1)
        top, left = random.integers(SIZE - size + 1, size=2)
        crops.append(video[first : first + frames, top : top + size, left : left + size])
    return to_tensor(np.stack(crops))


def to_tensor(videos: np.ndarray) -> torch.Tensor:
    """[batch, frames, height, width, 3] in 0..1 -> [batch, 3, frames, height, width] in -1..1."""
    return torch.from_numpy(videos).permute(0, 4, 1, 2, 3).contiguous() * 2 - 1


def psnr(left: torch.Tensor, right: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two videos in -1..1."""
    error = (left.clamp(-1, 1) - right.clamp(-1, 1)).square().mean()
    return float(10 * torch.log10(4 / error))


@torch.no_grad()
def reconstruction_psnr(autoencoder: AutoencoderKLWan, count: int = 6) -> float:
    """Mean PSNR in dB of whole validation clips after encoding and decoding."""
    clips = [sample_clip(VALIDATION_SEED + index) for index in range(count)]
    videos = [to_tensor(draw_clip(clip)[None]) for clip in clips]
    decoded = [autoencoder.decode(autoencoder.encode(v).latent_dist.mode()).sample for v in videos]
    return float(np.mean([psnr(*pair) for pair in zip(videos, decoded, strict=True)]))


def train(folder: Path, steps: int, batch: int = 2, save_every: int = 100) -> None:
    """Train until `steps`, continuing from `folder`/autoencoder.pt; the step chooses the data."""
    torch.manual_seed(0)
    autoencoder = build_autoencoder()
    optimizer = torch.optim.AdamW(
        autoencoder.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0
    )
    step, seconds = 0, 0.0
    if state := checkpoint.load(folder / "autoencoder.pt"):
        autoencoder.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds = state["step"], state["seconds"]
    started, losses = time.monotonic() - seconds, []
    while step < steps:
        torch.manual_seed(step)  # the noise of the latents
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 50, 0.02 + 2 * (1 - step / steps))
        frames, size = (9, 48) if step < LONG_CROPS_FROM else (17, 40)
        video = draw_crops(step, batch, frames, size)
        posterior = autoencoder.encode(video).latent_dist
        decoded = autoencoder.decode(posterior.sample()).sample
        # mean of the pixel error over elements; KL per latent element
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        error = (decoded - video).abs().mean() + (decoded - video).square().mean()
        optimizer.zero_grad()
        (error + KL_WEIGHT * kl).backward()
        torch.nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
        optimizer.step()
        losses.append(float(error.detach()))
        step += 1
        if step % save_every == 0 or step == steps:
            seconds = time.monotonic() - started
            record = {
                "stage": "autoencoder",
                "step": step,
                "error": round(float(np.mean(losses)), 5),
                "kl": round(float(kl.detach()), 3),
                "psnr": round(reconstruction_psnr(autoencoder, 2), 2),
                "seconds": round(seconds),
            }
            losses.clear()
            logger.info("%s", record)
            checkpoint.append_line(folder / "log.jsonl", record)
            checkpoint.save(
                folder / "autoencoder.pt",
                {
                    "model": autoencoder.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step,
                    "seconds": seconds,
                },
            )


def polish_decoder(folder: Path, steps: int, save_every: int = 50) -> None:
    """Train the decoder alone on stored, slightly noisy latents; the latents stay as they are.

    So this may run beside the transformer stage. Continues from `folder`/decoder.pt.
    """
    autoencoder = load_autoencoder(folder)
    trained = (autoencoder.post_quant_conv, autoencoder.decoder)
    parameters = [p.requires_grad_() for module in trained for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0)
    step, seconds = 0, 0.0
    if state := checkpoint.load(folder / "decoder.pt"):
        optimizer.load_state_dict(state["optimizer"])
        step, seconds = state["step"], state["seconds"]
    mean, std = _statistics(autoencoder)
    started, losses = time.monotonic() - seconds, []
    while step < steps:
        random = np.random.default_rng((2, step))
        torch.manual_seed(step)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 20, 0.02 + 1.5 * (1 - step / steps))
        shards = sorted((folder / "latents").glob("*.pt"))
        shard = int(random.integers(len(shards)))
        latents = checkpoint.load(shards[shard])["latents"]
        row = int(random.integers(len(latents)))
        # 12 of 20 latent rows and columns; clipping makes the true borders frequent
        top, left = np.clip(random.integers(-4, 13, size=2), 0, 8)
        window = latents[row : row + 1, :, :, top : top + 12, left : left + 12].float()
        window = (window + 0.05 * torch.randn_like(window)) * std + mean
        video = to_tensor(draw_clip(sample_clip(shard * len(latents) + row))[None])
        target = video[..., 4 * top : 4 * top + 48, 4 * left : 4 * left + 48]
        decoded = autoencoder.decode(window).sample
        error = (decoded - target).abs().mean() + (decoded - target).square().mean()
        optimizer.zero_grad()
        error.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(float(error.detach()))
        step += 1
        if step % save_every == 0 or step == steps:
            seconds = time.monotonic() - started
            record = {
                "stage": "decoder",
                "step": step,
                "error": round(float(np.mean(losses)), 5),
                "psnr": round(reconstruction_psnr(autoencoder, 2), 2),
                "seconds": round(seconds),
            }
            losses.clear()
            logger.info("%s", record)
            checkpoint.append_line(folder / "log.jsonl", record)
            checkpoint.save(
                folder / "decoder.pt",
                {
                    "model": autoencoder.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step,
                    "seconds": seconds,
                },
            )


@torch.no_grad()
def load_autoencoder(folder: Path, clips: int = 48) -> AutoencoderKLWan:
    """The trained autoencoder with the per-channel mean and std of its latents in the config."""
    state = checkpoint.load(folder / "autoencoder.pt")
    if state is None:
        raise FileNotFoundError(f"expected {folder / 'autoencoder.pt'}; run the vae stage first")
    statistics = checkpoint.load(folder / "statistics.pt")
    if statistics is None:
        autoencoder = build_autoencoder()
        autoencoder.load_state_dict(state["model"])
        latents = torch.cat(
            [
                autoencoder.encode(to_tensor(draw_clip(sample_clip(seed))[None])).latent_dist.mode()
                for seed in range(clips)
            ]
        )
        statistics = {
            "mean": latents.mean(dim=(0, 2, 3, 4)).tolist(),
            "std": latents.std(dim=(0, 2, 3, 4)).tolist(),
        }
        checkpoint.save(folder / "statistics.pt", statistics)
    autoencoder = build_autoencoder(tuple(statistics["mean"]), tuple(statistics["std"]))
    polished = checkpoint.load(folder / "decoder.pt")  # same encoder, better decoder
    autoencoder.load_state_dict((polished or state)["model"])
    return autoencoder.requires_grad_(False).eval()


def _statistics(autoencoder: AutoencoderKLWan) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and std of the latents, each [1, channels, 1, 1, 1]."""
    config = autoencoder.config
    return (
        torch.tensor(config.latents_mean).view(1, -1, 1, 1, 1),
        torch.tensor(config.latents_std).view(1, -1, 1, 1, 1),
    )


@torch.no_grad()
def encode(autoencoder: AutoencoderKLWan, video: torch.Tensor) -> torch.Tensor:
    """Normalised latents of [batch, 3, frames, height, width] in -1..1: what the denoiser sees."""
    latents = autoencoder.encode(video).latent_dist.mode()  # [batch, channels, frames, h, w]
    mean, std = _statistics(autoencoder)
    return (latents - mean) / std


def write_latents(folder: Path, shards: int, per_shard: int = 64) -> Iterator[Path]:
    """Encode clips into float16 shards; existing shards are kept, so this can be resumed."""
    autoencoder = load_autoencoder(folder)
    for shard in range(shards):
        path = folder / "latents" / f"{shard:05d}.pt"
        if path.exists():
            continue
        clips = [sample_clip(shard * per_shard + index) for index in range(per_shard)]
        latents = [encode(autoencoder, to_tensor(draw_clip(clip)[None])) for clip in clips]
        checkpoint.save(
            path,
            {
                "latents": torch.cat(latents).half(),  # [clips, channels, frames, height, width]
                "captions": [clip.caption for clip in clips],
            },
        )
        yield path
