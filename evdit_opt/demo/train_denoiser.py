"""Stage two: train the text encoder and the transformer together on latents, by flow matching.

What made a model this small learn in an hour of one CPU core:

- most samples show only a few of the 17 latent frames, always the first and the last among them,
  each at its true place in time (`FrameRope`); attention over 400 tokens is cheap;
- an auxiliary loss asks the hidden states after the second block where their token is. RoPE is
  relative and the network could ignore position for a long time; with this loss it knows it after
  some hundred steps, and so direction of motion becomes a matter of layout. The auxiliary head is
  training-only.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from evdit_opt.demo import checkpoint
from evdit_opt.demo.tinywan import (
    LATENT_SHAPE,
    SHIFT,
    TINYWAN_CALL,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

logger = logging.getLogger(__name__)

PROBED_BLOCK = 1
"""The auxiliary loss reads the output of this block (the second)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """A stretch of training on clips of a certain length."""

    until: int
    """Steps done at the end of the phase, counted from the start of training."""
    frames: tuple[int, int]
    """Fewest and most latent frames shown."""
    batch: int


def parse_phases(text: str) -> tuple[Phase, ...]:
    """Phases from text such as "3800:3-5:8,6000:17-17:3" (until:frames:batch)."""
    phases = []
    for item in text.split(","):
        until, frames, batch = item.split(":")
        low, high = (int(number) for number in frames.split("-"))
        phases.append(Phase(until=int(until), frames=(low, high), batch=int(batch)))
    return tuple(phases)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Everything the training run depends on besides the latents."""

    phases: tuple[Phase, ...] = parse_phases("6500:3-5:8,7150:7-10:5,7500:17-17:3")
    decay_from: int = 6500
    """Step from which the learning rate falls."""
    learning_rate: float = 1.5e-3
    warmup: int = 200
    dropout: float = 0.12
    """Share of captions replaced by the empty prompt, for classifier-free guidance."""
    position_weight: float = 0.1
    ema: float = 0.998
    width: int = 96
    layers: int = 6

    @property
    def steps(self) -> int:
        """Length of the whole training."""
        return self.phases[-1].until


class FrameRope(nn.Module):
    """The transformer's rotary embedding, evaluated at chosen latent frames."""

    def __init__(self, rope: nn.Module) -> None:
        super().__init__()
        self.rope = rope
        self.frames: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cos and sin, each [1, tokens, 1, head_dim], for [batch, channels, frames, h, w]."""
        if self.frames is None:
            return self.rope(hidden_states)
        batch, channels, _, height, width = hidden_states.shape
        total = int(self.frames.max()) + 1
        whole = hidden_states.new_empty(batch, channels, total, height, width, device="meta")
        cos, sin = (
            values.unflatten(1, (total, -1))[:, self.frames].flatten(1, 2)
            for values in self.rope(whole)
        )
        return cos, sin


class Student(nn.Module):
    """The trained parts: text encoder, transformer and the training-only position head."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.text_encoder = build_text_encoder()
        self.transformer = build_transformer(recipe.width, recipe.layers)
        self.position_head = nn.Linear(recipe.width, 6)

    def parts(self) -> dict[str, dict[str, torch.Tensor]]:
        """State dictionaries by part."""
        return {name: module.state_dict() for name, module in self.named_children()}


def encode_prompts(
    tokenizer: PreTrainedTokenizerFast,
    text_encoder: UMT5EncoderModel,
    prompts: Sequence[str],
    length: int = TINYWAN_CALL["max_sequence_length"],
) -> torch.Tensor:
    """Text states [batch, length, 64], zero after the prompt's end: WanPipeline's own path."""
    tokens = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=length,
        truncation=True,
        add_special_tokens=True,
        return_attention_mask=True,
        return_tensors="pt",
    )
    states = text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    return states * tokens.attention_mask.unsqueeze(-1)


class LatentPool:
    """All latents written so far; new shards are picked up by `refresh`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.captions: list[str] = []
        self.shards: dict[str, torch.Tensor] = {}
        self.refresh()

    def refresh(self) -> None:
        """Load shards that appeared since the last call."""
        for path in sorted(self.folder.glob("*.pt")):
            if path.name not in self.shards and (state := checkpoint.load(path)):
                self.shards[path.name] = state["latents"]
                self.captions += state["captions"]

    def __len__(self) -> int:
        return len(self.captions)

    def take(self, indices: Sequence[int], frames: torch.Tensor) -> torch.Tensor:
        """Latents [batch, channels, frames, height, width] of some clips at some frames."""
        shards = list(self.shards.values())
        per_shard = len(shards[0])
        return torch.stack(
            [shards[index // per_shard][index % per_shard][:, frames].float() for index in indices]
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One training batch, a pure function of (step, pool)."""

    latents: torch.Tensor  # [batch, channels, frames, height, width]
    noise: torch.Tensor
    sigma: torch.Tensor  # [batch]
    prompts: tuple[str, ...]
    frames: torch.Tensor  # indices into the 17 latent frames


def draw_batch(step: int, pool: LatentPool, recipe: Recipe) -> Batch:
    """Choose clips, frames and noise for one step."""
    random = np.random.default_rng((1, step))
    generator = torch.Generator().manual_seed(step)
    total = LATENT_SHAPE[1]
    phase = next(phase for phase in recipe.phases if step < phase.until)
    size = phase.batch
    count = random.integers(phase.frames[0], phase.frames[1] + 1)
    # both ends are always shown, so that a subset still says where in the clip a frame is
    inner = 1 + random.permutation(total - 2)[: count - 2]
    frames = np.sort(np.concatenate(([0, total - 1], inner)))
    chosen = random.integers(len(pool), size=size)
    dropped = random.random(size) < recipe.dropout
    latents = pool.take(chosen.tolist(), torch.from_numpy(frames))
    return Batch(
        latents=latents,
        noise=torch.randn(latents.shape, generator=generator),
        sigma=draw_sigmas(size, generator),
        prompts=tuple(
            "" if drop else pool.captions[i] for i, drop in zip(chosen, dropped, strict=True)
        ),
        frames=torch.from_numpy(frames),
    )


def draw_sigmas(count: int, generator: torch.Generator) -> torch.Tensor:
    """Noise levels [count]: logit-normal, stratified over the batch, shifted like the scheduler."""
    strata = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    level = torch.special.ndtri(strata.clamp(1e-4, 1 - 1e-4)).mul(1.2).sigmoid()
    return SHIFT * level / (1 + (SHIFT - 1) * level)


def position_targets(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Where each token is, [tokens, 6]: (t, y, x) in -1..1 and their Legendre polynomials P2."""
    axes = (
        frames.float() * (2 / (LATENT_SHAPE[1] - 1)) - 1,
        torch.linspace(-1, 1, height),
        torch.linspace(-1, 1, width),
    )
    linear = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    return torch.cat([linear, 1.5 * linear.square() - 0.5], -1)


def losses(
    student: Student, tokenizer: PreTrainedTokenizerFast, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor]:
    """Velocity error per clip, [batch], and the auxiliary position error, a scalar."""
    hidden: list[torch.Tensor] = []
    transformer = student.transformer
    handle = transformer.blocks[PROBED_BLOCK].register_forward_hook(
        lambda module, inputs, output: hidden.append(output)
    )
    transformer.rope.frames = batch.frames
    sigma = batch.sigma.view(-1, 1, 1, 1, 1)
    predicted = transformer(
        (1 - sigma) * batch.latents + sigma * batch.noise,
        batch.sigma * 1000,
        encode_prompts(tokenizer, student.text_encoder, batch.prompts),
        return_dict=False,
    )[0]
    handle.remove()
    transformer.rope.frames = None
    error = (predicted - (batch.noise - batch.latents)).square().mean(dim=(1, 2, 3, 4))
    states = nn.functional.layer_norm(hidden[0], hidden[0].shape[-1:])  # [batch, tokens, width]
    height, width = (side // 2 for side in batch.latents.shape[-2:])
    target = position_targets(batch.frames, height, width)
    return error, (student.position_head(states) - target).square().mean()


def learning_rate(step: int, recipe: Recipe) -> float:
    """Warm up, hold, then fall linearly to 2 %."""
    left = (recipe.steps - step) / max(1, recipe.steps - recipe.decay_from)
    return recipe.learning_rate * min(1, (step + 1) / recipe.warmup, 0.02 + 0.98 * left)


class Trainer:
    """Model, average and optimizer; `state` and `restore` make a run resumable bit for bit."""

    def __init__(self, recipe: Recipe) -> None:
        torch.manual_seed(0)
        self.recipe = recipe
        self.tokenizer = build_tokenizer()
        self.student = Student(recipe)
        self.student.transformer.rope = FrameRope(self.student.transformer.rope)
        self.average = copy.deepcopy(self.student).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.student.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.01
        )
        self.step = 0
        self.seconds = 0.0

    def state(self) -> dict[str, Any]:
        """Everything needed to continue."""
        return {
            "student": self.student.parts(),
            "average": self.average.parts(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        for name in ("student", "average"):
            for part, values in state[name].items():
                getattr(self, name).get_submodule(part).load_state_dict(values)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]

    def train_step(self, pool: LatentPool) -> tuple[np.ndarray, np.ndarray, float]:
        """One update; returns sigma [batch], velocity error [batch] and the position error."""
        recipe = self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, recipe)
        batch = draw_batch(self.step, pool, recipe)
        error, position = losses(self.student, self.tokenizer, batch)
        self.optimizer.zero_grad()
        (error.mean() + recipe.position_weight * position).backward()
        nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        decay = min(recipe.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.average.parameters()), list(self.student.parameters()), 1 - decay
            )
        return batch.sigma.numpy(), error.detach().numpy(), float(position.detach())


def train(
    folder: Path, recipe: Recipe, log_every: int = 50, save_every: int = 50
) -> Iterator[dict[str, Any]]:
    """Train until `recipe.steps`, continuing from `folder`/denoiser.pt; yields log records."""
    trainer = Trainer(recipe)
    if state := checkpoint.load(folder / "denoiser.pt"):
        trainer.restore(state)
    pool = LatentPool(folder / "pool")
    if not len(pool):
        raise FileNotFoundError(f"expected latents in {folder / 'pool'}; run the latents stage")
    started, seen = time.monotonic() - trainer.seconds, []
    while trainer.step < recipe.steps:
        seen.append(trainer.train_step(pool))
        trainer.seconds = time.monotonic() - started
        done = trainer.step == recipe.steps
        if trainer.step % log_every == 0 or done:
            sigma, error = (np.concatenate([item[i] for item in seen]) for i in (0, 1))
            record: dict[str, Any] = {
                "stage": "denoiser",
                "step": trainer.step,
                "loss": round(float(error.mean()), 5),
            }
            for low, high in ((0, 0.5), (0.5, 0.8), (0.8, 0.95), (0.95, 1)):
                inside = (sigma >= low) & (sigma < high)
                mean = round(float(error[inside].mean()), 5) if inside.any() else None
                record[f"loss_{high:g}"] = mean
            record |= {
                "position": round(float(np.mean([item[2] for item in seen])), 5),
                "clips": len(pool),
                "seconds": round(trainer.seconds),
            }
            seen.clear()
            pool.refresh()
            yield record
        if trainer.step % save_every == 0 or done:
            checkpoint.save(folder / "denoiser.pt", trainer.state())
