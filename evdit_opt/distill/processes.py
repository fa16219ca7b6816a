"""One process or many: what a launch may ask for, and what only one of them does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evdit_opt.errors import DistillationError

__all__ = [
    "average_gradients",
    "begin_alike",
    "first_process",
    "make_accelerator",
    "processes",
    "require_launch",
]

PATIENCE = timedelta(days=1)
"""How long processes wait for the one that encodes; torchrun ends them if it dies."""


def processes() -> Any:
    """accelerate's state of the processes of this launch; the first call joins them."""
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)


@contextmanager
def first_process() -> Iterator[bool]:
    """True in one process, for whom the others wait at the end."""
    state = processes()
    yield state.is_main_process
    state.wait_for_everyone()


def require_launch() -> None:
    """Refuse what a launch asks of accelerate and is not done here.

    accelerate would not: on a CPU it ignores its FSDP plugin and float16 without a word.

    Raises:
        DistillationError: a launch with FSDP, DeepSpeed, Megatron-LM or mixed precision.
    """
    from accelerate.utils import parse_choice_from_env, parse_flag_from_env

    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
            raise DistillationError(
                f"expected a launch without {name}, which is not supported; launch with torchrun, "
                "and set shard: true of the stage to spread weights and optimizer"
            )
    precision = parse_choice_from_env("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no":
        raise DistillationError(
            f"expected a launch with mixed_precision no, got {precision}; set bf16: true, or "
            "fp16: true, of the stage instead"
        )


def make_accelerator(folder: Path, tensorboard: bool) -> Any:
    """An ``Accelerator`` of this launch.

    Args:
        folder: for its trackers.
        tensorboard: make that one of them.
    """
    from accelerate import Accelerator

    processes()
    # Its settings are one per process; those that differ from stage to stage are the caller's.
    return Accelerator(
        cpu=not torch.accelerator.is_available(),
        log_with="tensorboard" if tensorboard else None,
        project_dir=folder,
    )


@torch.no_grad()
def begin_alike(parameters: Iterable[nn.Parameter]) -> None:
    """Give all processes the first one's values."""
    for value in parameters:
        torch.distributed.broadcast(value.detach(), src=0)


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Give all processes the mean of their gradients.

    ``DistributedDataParallel`` would do it while the backward runs, but Dynamo then compiles a
    model in slices of its buckets' size, in which a plan's sites are cut in two.
    """
    for value in parameters:
        if value.grad is not None:
            torch.distributed.all_reduce(value.grad)
            value.grad /= torch.distributed.get_world_size()
