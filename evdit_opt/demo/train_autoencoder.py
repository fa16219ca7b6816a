"""Stages one and two: write latents, and train the autoencoder's two halves to speak their code.

The code is linear (linear_code.py), so latents need no trained autoencoder, and encoder, decoder
and transformer can be trained side by side.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from evdit_opt.demo import checkpoint
from evdit_opt.demo.clips import draw_clip, sample_clip
from evdit_opt.demo.linear_code import fit
from evdit_opt.demo.tinywan import build_autoencoder

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

logger = logging.getLogger(__name__)

VALIDATION_SEED = 9_000_000
"""First of the seeds that no training stage draws clips from."""
PER_SHARD = 64
PARTS = {"encoder": ("encoder.", "quant_conv."), "decoder": ("decoder.", "post_quant_conv.")}
"""Names of the parameters of each half."""


def write_latents(folder: Path, shards: int) -> Iterator[Path]:
    """Encode clips into float16 shards; existing shards are kept, so this can be resumed."""
    code = fit()
    for shard in range(shards):
        path = folder / "pool" / f"{shard:05d}.pt"
        if path.exists():
            continue
        clips = [sample_clip(shard * PER_SHARD + index) for index in range(PER_SHARD)]
        latents = np.stack([code.encode(draw_clip(clip)) for clip in clips])
        checkpoint.save(
            path,
            {
                "latents": torch.from_numpy(latents).half(),  # [clips, 8, 17, 20, 20]
                "captions": [clip.caption for clip in clips],
            },
        )
        yield path


def train(folder: Path, part: str, steps: int, batch: int = 1, save_every: int = 50) -> None:
    """Train the "encoder" or the "decoder" on stored latents, continuing from `folder`/<part>.pt.

    The decoder sees slightly noisy latents, because generated ones are not exact either.
    """
    torch.manual_seed(0)
    autoencoder = build_autoencoder()
    trained = [p for n, p in autoencoder.named_parameters() if n.startswith(PARTS[part])]
    optimizer = torch.optim.AdamW(trained, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0)
    step, seconds = 0, 0.0
    if state := checkpoint.load(folder / f"{part}.pt"):
        autoencoder.load_state_dict(state["model"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        step, seconds = state["step"], state["seconds"]
    started, losses = time.monotonic() - seconds, []
    while step < steps:
        torch.manual_seed(step)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 50, 0.02 + 1.6 * (1 - step / steps))
        latents, video = draw_window(folder, step, batch)
        if part == "decoder":
            difference = (
                autoencoder.decode(latents + 0.04 * torch.randn_like(latents)).sample - video
            )
        else:
            difference = autoencoder.encode(video).latent_dist.mode() - latents
        error = difference.abs().mean() + difference.square().mean()
        optimizer.zero_grad()
        error.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(float(error.detach()))
        step += 1
        if step % save_every == 0 or step == steps:
            seconds = time.monotonic() - started
            record = {
                "stage": part,
                "step": step,
                "error": round(float(np.mean(losses)), 5),
                "seconds": round(seconds),
            }
            losses.clear()
            logger.info("%s", record)
            checkpoint.append_line(folder / "log.jsonl", record)
            own = {
                name: value
                for name, value in autoencoder.state_dict().items()
                if name.startswith(PARTS[part])
            }
            state = {"model": own, "optimizer": optimizer.state_dict()}
            checkpoint.save(folder / f"{part}.pt", {**state, "step": step, "seconds": seconds})


def draw_window(folder: Path, step: int, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents [batch, 8, 17, 12, 12] and pixels [batch, 3, 33, 48, 48] of random windows."""
    random = np.random.default_rng((2, step))
    shards = sorted((folder / "pool").glob("*.pt"))
    shard = shards[random.integers(len(shards))]
    stored = torch.load(shard, weights_only=True)["latents"]
    latents, videos = [], []
    for row in random.integers(PER_SHARD, size=batch).tolist():
        # of 20 latent rows and columns; clipping makes the true borders frequent
        top, left = np.clip(random.integers(-4, 13, size=2), 0, 8)
        latents.append(stored[row, :, :, top : top + 12, left : left + 12].float())
        video = to_tensor(draw_clip(sample_clip(int(shard.stem) * PER_SHARD + row))[None])[0]
        videos.append(video[..., 4 * top : 4 * top + 48, 4 * left : 4 * left + 48])
    return torch.stack(latents), torch.stack(videos)


def load_autoencoder(folder: Path) -> AutoencoderKLWan:
    """Both trained halves, from `folder`/encoder.pt and `folder`/decoder.pt."""
    autoencoder = build_autoencoder()
    for part in PARTS:
        state = checkpoint.load(folder / f"{part}.pt")
        if state is None:
            raise FileNotFoundError(f"expected {folder / part}.pt; run the {part} stage first")
        autoencoder.load_state_dict(state["model"], strict=False)
    return autoencoder.requires_grad_(False).eval()


def to_tensor(videos: np.ndarray) -> torch.Tensor:
    """[batch, frames, height, width, 3] in 0..1 -> [batch, 3, frames, height, width] in -1..1."""
    return torch.from_numpy(videos).permute(0, 4, 1, 2, 3).contiguous() * 2 - 1


def psnr(left: torch.Tensor, right: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two videos in -1..1."""
    error = (left.clamp(-1, 1) - right.clamp(-1, 1)).square().mean()
    return float(10 * torch.log10(4 / error))
