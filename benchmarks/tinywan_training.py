"""What the fine-tuning benchmarks of TinyWan share: its training latents, and few frames cheaply.

The latents are those TinyWan was trained on; `python -m evdit_opt.demo.train latents` draws and
encodes them again.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from evdit_opt.demo.tinywan import LATENT_SHAPE, load_tinywan
from evdit_opt.demo.train_denoiser import FrameRope, LatentPool, encode_prompts
from evdit_opt.distill.loop import Numbers

TRAINED_ON = 56_150
"""Samples TinyWan's own training saw, by its recipe: 6500 steps of 8, 650 of 5 and 300 of 3."""


@dataclass(frozen=True)
class Batch:
    """Clips of one step at some of their frames, a pure function of the sample numbers."""

    latents: torch.Tensor  # [batch, channels, frames, height, width]
    noise: torch.Tensor
    text: torch.Tensor  # [batch, tokens, width]
    empty: torch.Tensor  # the negative prompt, like text


class World:
    """TinyWan, a frozen teacher and a student that starts from its weights, and their data."""

    def __init__(self, latents: Path, seed: int = 0) -> None:
        self.pipe = load_tinywan()
        self.teacher = self.pipe.transformer.eval().requires_grad_(False)
        self.student = copy.deepcopy(self.teacher).requires_grad_(True)
        self.ropes = [FrameRope(model.rope) for model in (self.teacher, self.student)]
        self.teacher.rope, self.student.rope = self.ropes
        self.pool = LatentPool(latents)
        self.seed = seed
        captions = sorted({*self.pool.captions, ""})
        with torch.no_grad():
            states = encode_prompts(self.pipe.tokenizer, self.pipe.text_encoder, captions)
        self.text = dict(zip(captions, states, strict=True))

    def batch(self, numbers: Numbers, frames: tuple[int, int]) -> Batch:
        """The batch of some sample numbers, and the frames it shows set in both models."""
        total = LATENT_SHAPE[1]
        random = np.random.default_rng((self.seed, 1, numbers.step))
        count = int(random.integers(frames[0], frames[1] + 1))
        # both ends are always shown, so that a subset still says where in the clip a frame is
        inner = 1 + random.permutation(total - 2)[: count - 2]
        shown = torch.from_numpy(np.sort(np.concatenate(([0, total - 1], inner))))
        for rope in self.ropes:
            rope.frames = None if count == total else shown
        chosen = [self.clip(number) for number in numbers.samples]
        latents = self.pool.take(chosen, shown)
        noise = [
            torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(number))
            for number in numbers.samples
        ]
        return Batch(
            latents=latents,
            noise=torch.stack(noise),
            text=torch.stack([self.text[self.pool.captions[index]] for index in chosen]),
            empty=self.text[""].expand(len(chosen), -1, -1),
        )

    def clip(self, number: int) -> int:
        """Which clip of the pool a sample shows: a new permutation every epoch."""
        epoch, position = divmod(number, len(self.pool))
        order = np.random.default_rng((self.seed, 2, epoch)).permutation(len(self.pool))
        return int(order[position])


def bound(model: nn.Module, text: torch.Tensor) -> Callable[..., torch.Tensor]:
    """The model as a function of sample and timestep."""

    def call(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        output: Any = model(
            hidden_states=sample,
            timestep=timestep,
            encoder_hidden_states=text,
            return_dict=False,
        )
        return output[0]

    return call


def seeds(numbers: Numbers, purpose: int) -> list[tuple[int, ...]]:
    """One seed for each sample, for one purpose."""
    return [(purpose, number) for number in numbers.samples]


def save_half(model: nn.Module, path: Path) -> None:
    """Weights in float16, as safetensors."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {name.replace("rope.rope.", "rope."): v for name, v in model.state_dict().items()}
    save_file({name: value.half().contiguous() for name, value in weights.items()}, path)


def load_half(model: nn.Module, path: Path) -> None:
    """Weights of `save_half` into a TinyWan transformer."""
    from safetensors.torch import load_file

    model.load_state_dict({name: value.float() for name, value in load_file(path).items()})


@dataclass(frozen=True)
class Phase:
    """A stretch of training on clips of a certain length."""

    steps: int
    frames: tuple[int, int]
    batch: int
    rate: float
    decay_from: int


def parse_phase(text: str) -> Phase:
    """A phase from text such as "500:3-5:8:5e-4:250", steps:frames:batch:rate:decay_from."""
    steps, frames, batch, rate, decay_from = text.split(":")
    low, high = (int(number) for number in frames.split("-"))
    return Phase(int(steps), (low, high), int(batch), float(rate), int(decay_from))
