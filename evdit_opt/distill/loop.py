"""The training loop, on accelerate: one process or many; killed at any moment, it goes on.

What a step does is a pure function of (weights, step): samples are numbered through the whole
training, and their number is all that a loss may draw random numbers from. So a checkpoint needs
weights, optimizer and the step, a resumed run on one CPU process repeats the uninterrupted one bit
for bit, and two processes see the same global batch as one.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from evdit_opt.distill.checkpoint import (
    LOG,
    STATE,
    TrainingState,
    append,
    forget_after,
    kept,
    save_atomically,
)
from evdit_opt.distill.processes import (
    average_gradients,
    begin_alike,
    make_accelerator,
    processes,
    require_launch,
)
from evdit_opt.distill.sharding import sharded_copy, take_back, whole
from evdit_opt.errors import DistillationError

__all__ = [
    "Losses",
    "Numbers",
    "TrainingConfig",
    "recomputing",
    "require_possible",
    "train",
]

logger = logging.getLogger(__name__)

USUAL_RATE = 1e-4

SWITCHES = ("enable_gradient_checkpointing", "disable_gradient_checkpointing")
"""Methods of diffusers models."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Numbers:
    """Which samples of the training a loss is asked for."""

    step: int
    """The same in all processes, so what it decides (a clip length) is shared by the batch."""
    samples: tuple[int, ...]
    """Counted through the whole training; no two steps or processes share one."""
    total: int
    """Samples a step, over all processes and accumulated forwards."""

    @property
    def rows(self) -> tuple[int, ...]:
        """The samples' places within the step, 0 to below ``total``."""
        return tuple(sample - self.step * self.total for sample in self.samples)


Losses = Callable[[nn.Module, Numbers], Mapping[str, torch.Tensor]]
"""Means over the samples asked for; "loss" is what is trained on, the others are logged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """How a stage is trained.

    Attributes:
        steps: optimizer steps.
        batch: samples a forward, in each process.
        accumulate: forwards a step.
        learning_rate: the highest. "auto": 1e-4; for knowledge distillation in the pipeline what
            `evdit_opt.distill.rate.knowledge_rate` decides.
        warmup: steps of its linear rise.
        decay_from: step from which it falls linearly to a fiftieth; None: it never falls.
        betas: of AdamW.
        weight_decay: of AdamW.
        clip: largest norm of the gradient.
        average: decay of a moving average of the weights, which takes their place at the end (a
            checkpoint has both); None: none.
        bf16: compute in bfloat16 where autocast does; weights and optimizer stay as they are.
        fp16: the same in float16, for devices without bfloat16. The loss is scaled so that small
            gradients do not vanish; a step whose gradients overflow is skipped, which its record
            says, and the scale is halved.
        checkpointing: recompute activations in the backward, as diffusers models offer it.
        save_every: steps between checkpoints.
        tensorboard: write TensorBoard's event files too, in the stage's folder.
        shard: spread the student's weights, gradients and optimizer over all processes (FSDP).
    """

    steps: int
    batch: int = 4
    accumulate: int = 1
    learning_rate: float | Literal["auto"] = "auto"
    warmup: int = 20
    decay_from: int | None = None
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.0
    clip: float = 1.0
    average: float | None = None
    bf16: bool = False
    fp16: bool = False
    checkpointing: bool = False
    save_every: int = 50
    tensorboard: bool = False
    shard: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "save_every"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise DistillationError(f"expected {name} to be an integer above 0, got {value!r}")
        if type(self.warmup) is not int or self.warmup < 0:
            raise DistillationError(
                f"expected warmup to be an integer of at least 0, got {self.warmup!r}"
            )
        fall = self.decay_from
        if fall is not None and (type(fall) is not int or not 0 <= fall <= self.steps):
            raise DistillationError(
                f"expected decay_from to be one of the stage's {self.steps} steps, or none, got "
                f"{fall!r}, from which the rate would never fall"
            )
        for name in ("learning_rate", "clip"):
            value = getattr(self, name)
            if (name, value) != ("learning_rate", "auto") and not 0 < value < math.inf:
                raise DistillationError(f"expected {name} above 0, got {value!r}")
        betas = self.betas
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise DistillationError(f"expected two betas in [0, 1), got {betas!r}")
        if not 0 <= self.weight_decay < float("inf"):
            raise DistillationError(
                f"expected weight_decay of at least 0, got {self.weight_decay!r}"
            )
        if self.average is not None and not 0 <= self.average < 1:
            raise DistillationError(f"expected average in [0, 1), got {self.average!r}")
        if self.fp16 and (self.bf16 or self.shard):
            raise DistillationError(
                f"expected fp16 alone, got it with {'bf16' if self.bf16 else 'shard'}; set fp16 to "
                "false (its scaled gradients are not spread over processes)"
            )
        if self.tensorboard and find_spec("tensorboard") is None:
            raise DistillationError(
                "expected the package tensorboard for tensorboard=True, it is not installed; "
                "pip install tensorboard, or set tensorboard=False"
            )

    def settings(self) -> dict[str, Any]:
        """What a training depends on."""
        values = asdict(self)
        del values["save_every"], values["tensorboard"], values["shard"]
        if not self.fp16:
            del values["fp16"]  # so that runs begun before there was such a thing go on
        return values

    def autocast(self, device: str) -> torch.autocast:
        """What losses are computed in on a kind of device, such as "cuda"."""
        dtype = torch.float16 if self.fp16 else torch.bfloat16
        return torch.autocast(device, dtype, enabled=self.fp16 or self.bf16)

    def rate(self, step: int) -> float:
        """Learning rate of a step: warm up, hold, then fall linearly to a fiftieth."""
        fall = 1.0
        if self.decay_from is not None and step > self.decay_from:
            fall = 0.02 + 0.98 * (self.steps - step) / max(1, self.steps - self.decay_from)
        highest = USUAL_RATE if self.learning_rate == "auto" else self.learning_rate
        return highest * min(1.0, (step + 1) / max(1, self.warmup), fall)


def train(
    model: nn.Module,
    losses: Losses,
    config: TrainingConfig,
    folder: Path,
    stop: Callable[[int], bool] = lambda step: False,
) -> Iterator[dict[str, Any]]:
    """Train the parameters of ``model`` that require gradients; go on from ``folder`` if it can.

    Args:
        model: changed in place.
        losses: see `Losses`; called with the model, or with its sharded copy.
        config: a checkpoint of another one is refused, but for ``save_every``,
            ``tensorboard`` and ``shard``.
        folder: holds ``state.pt``, which is always a whole checkpoint, and ``log.jsonl``, a line a
            step; and ``tensorboard/``, where that is asked for.
        stop: asked after each step; True saves and ends early.

    Yields:
        The record of each step, as logged: step, samples, seconds, learning rate, every loss.

    Raises:
        DistillationError: nothing to train, a checkpoint of another run, or a loss that is not
            finite; the last checkpoint stays as it is. Also ``shard`` with one process.
    """
    require_possible(model, config)
    accelerator = make_accelerator(folder, config.tensorboard)
    kept_on = next(model.parameters()).device
    worker = sharded_copy(model) if config.shard else model.to(accelerator.device)
    trained = {name: value for name, value in worker.named_parameters() if value.requires_grad}
    if not trained:
        raise DistillationError("expected parameters that require gradients, the model has none")
    optimizer = torch.optim.AdamW(
        trained.values(), lr=0.0, betas=config.betas, weight_decay=config.weight_decay
    )
    total = config.batch * config.accumulate * accelerator.num_processes
    scaler = torch.amp.GradScaler(accelerator.device.type, enabled=config.fp16)
    state = TrainingState(trained, optimizer, scaler, config.settings(), total, config.average)
    folder.mkdir(parents=True, exist_ok=True)
    state.restore(folder)
    if accelerator.is_main_process:
        forget_after(folder / LOG, state.step)
    many = accelerator.num_processes > 1 and not config.shard
    if many:
        begin_alike(trained.values())
    started = time.monotonic() - state.seconds
    with _tracked(accelerator, state.step), recomputing(worker, config.checkpointing):
        while state.step < config.steps:
            for group in optimizer.param_groups:
                group["lr"] = config.rate(state.step)
            totals = _accumulate(worker, losses, config, accelerator, scaler, state.step)
            if many:
                average_gradients(trained.values())
            scaler.unscale_(optimizer)
            norm = float(whole(accelerator.clip_grad_norm_(list(trained.values()), config.clip)))
            scale, stepped = scaler.get_scale(), math.isfinite(norm)
            # A loss times the scale may overflow where the loss does not: that is what it is for.
            if not math.isfinite(totals["loss"]) or not (stepped or scale > 1):
                raise DistillationError(
                    f"expected a finite loss, got {totals['loss']} (gradient norm {norm}) at step "
                    f"{state.step}; {kept(folder)} lower the learning rate or turn bf16 and fp16 "
                    "off, and begin in another folder"
                )
            if stepped:
                scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            state.step += 1
            state.seconds = time.monotonic() - started
            if stepped:
                state.update_average()
            curves = {"learning_rate": config.rate(state.step - 1), **totals}
            curves |= {"gradient_norm": norm} if stepped else {"skipped": 1.0}
            curves |= {"loss_scale": scale} if config.fp16 else {}
            record = {
                "step": state.step,
                "samples": state.step * total,
                "seconds": round(state.seconds, 2),
                **curves,
            }
            done = state.step == config.steps or stop(state.step)
            save = done or state.step % config.save_every == 0
            content = state.content() if save and config.shard else None
            if accelerator.is_main_process:
                append(folder / LOG, record)
                if save:
                    save_atomically(folder / STATE, content or state.content())
            accelerator.log(curves, step=state.step)
            yield record
            if done:
                break
    state.use_average()
    if config.shard:
        take_back(model, worker, kept_on)
    accelerator.wait_for_everyone()
    accelerator.free_memory()


def require_possible(model: nn.Module, config: TrainingConfig) -> None:
    """Refuse what `train` could not do, before anything is prepared for it.

    Raises:
        DistillationError: as `train`, for a launch, sharding or recomputation that cannot be.
    """
    require_launch()
    if config.shard and processes().num_processes == 1:
        raise DistillationError(
            "expected several processes for shard=True, this is the only one; launch with "
            "torchrun --nproc_per_node N, or set shard=False"
        )
    supported = getattr(model, "_supports_gradient_checkpointing", True)
    if config.checkpointing and not (supported and hasattr(model, SWITCHES[0])):
        raise DistillationError(
            f"expected a model with {SWITCHES[0]}, {type(model).__name__} has none; set "
            "checkpointing=False"
        )


@contextmanager
def recomputing(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Activations are computed again in the backward; a later stage decides for itself."""
    if not wanted or getattr(model, "is_gradient_checkpointing", False):
        yield
        return
    enable, disable = (getattr(model, name) for name in SWITCHES)
    enable()
    try:
        yield
    finally:
        disable()


@contextmanager
def _tracked(accelerator: Any, step: int) -> Iterator[None]:
    """The trackers that were asked for go on after a step, and are closed, however this ends."""
    accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": step + 1}})
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()


def _accumulate(
    worker: nn.Module,
    losses: Losses,
    config: TrainingConfig,
    accelerator: Any,
    scaler: torch.amp.GradScaler,
    step: int,
) -> dict[str, float]:
    """Gradients of one step; the means of its losses."""
    per_process = config.batch * config.accumulate
    first = (step * accelerator.num_processes + accelerator.process_index) * per_process
    totals: dict[str, float] = {}
    for micro in range(config.accumulate):
        begin = first + micro * config.batch
        numbers = Numbers(
            step=step,
            samples=tuple(range(begin, begin + config.batch)),
            total=per_process * accelerator.num_processes,
        )
        with config.autocast(accelerator.device.type):
            found = losses(worker, numbers)
        scaler.scale(found["loss"] / config.accumulate).backward()
        for name, value in found.items():
            mean = accelerator.reduce(value.detach().float(), reduction="mean")
            totals[name] = totals.get(name, 0.0) + float(mean) / config.accumulate
    return totals
