"""LoRA adapters: what is trained of a model, and how that is saved."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evdit_opt.errors import DistillationError
from evdit_opt.whole_file import whole_file

__all__ = ["LARGE", "add_lora", "load_weights", "lora_rank_for", "save_weights", "trained_weights"]

LARGE = 1_000_000_000
"""Numbers in a model from which on adapters are trained, unless told otherwise."""

USUAL_RANK = 32


def lora_rank_for(model: nn.Module, wanted: int | str | None) -> int | None:
    """The rank of the adapters that are trained; None: all weights are.

    Args:
        model: as it was loaded.
        wanted: a rank, None, or "auto" for adapters in large models.
    """
    if wanted == "auto":
        return USUAL_RANK if sum(v.numel() for v in model.parameters()) >= LARGE else None
    assert not isinstance(wanted, str), "checked by FinetuneConfig"
    return wanted


def add_lora(model: nn.Module, rank: int, modules: Sequence[str], seed: int) -> int:
    """Give linear layers adapters, and let only those train; what the model says does not change.

    The adapters are float32, whatever the model is.

    Args:
        model: a diffusers model.
        rank: of the adapters.
        modules: ends of the paths of the linear layers.
        seed: of the adapters' first matrix; the second one is zero.

    Returns:
        How many numbers are trained.

    Raises:
        DistillationError: a model without adapters, or no such layers.
    """
    from peft import LoraConfig

    add: Any = getattr(model, "add_adapter", None)
    if add is None:
        raise DistillationError(
            f"expected a diffusers model for LoRA, got {type(model).__name__}; train all weights "
            "with lora_rank=None"
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            add(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(modules)))
        except ValueError as error:
            raise DistillationError(
                f"expected linear layers named {', '.join(modules)} in {type(model).__name__}: "
                f"{error}; set lora_modules"
            ) from error
    for name, value in model.named_parameters():
        value.requires_grad_("lora_" in name)
        if "lora_" in name:
            value.data = value.data.float()  # a step is smaller than what bfloat16 can add
    return sum(value.numel() for value in model.parameters() if value.requires_grad)


def trained_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Adapters of a model that has some, else all its weights and buffers, by name."""
    state = model.state_dict()
    adapters = {name: value for name, value in state.items() if "lora_" in name}
    return adapters or state


def save_weights(model: nn.Module, path: Path) -> str:
    """Write `trained_weights` as safetensors, whole or not at all; returns the file's SHA-256.

    Raises:
        DistillationError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    held = trained_weights(model)
    try:
        with whole_file(path) as partial:
            save_file({n: value.detach().cpu().contiguous() for n, value in held.items()}, partial)
            digest = hashlib.sha256(partial.read_bytes()).hexdigest()
    except (OSError, SafetensorError) as error:
        raise DistillationError(
            f"expected to write {path}: {error}; make room and start again"
        ) from error
    return digest


def load_weights(model: nn.Module, path: Path) -> None:
    """Put what `save_weights` wrote into a model that has the same parameters.

    Raises:
        DistillationError: the file cannot be read, or is of another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DistillationError(f"expected weights in {path}, cannot read them: {error}") from error
    held = trained_weights(model)
    wrong = found.keys() ^ held.keys()
    wrong |= {name for name in found.keys() & held.keys() if found[name].shape != held[name].shape}
    if wrong:
        raise DistillationError(
            f"expected weights of this {type(model).__name__} in {path}, {len(wrong)} differ, "
            f"{min(wrong)} among them; load the model they were trained from"
        )
    with torch.no_grad():
        for name, value in held.items():
            value.copy_(found[name])
