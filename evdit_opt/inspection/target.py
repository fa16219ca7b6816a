"""What to inspect: a pipeline, a transformer's checkpoint folder, what a Python function makes."""

import importlib
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evdit_opt.errors import UnsupportedInputError
from evdit_opt.inspection.random_call import random_call
from evdit_opt.models import Denoiser, as_denoiser, denoiser_of, load_pipeline, load_transformer

__all__ = ["Target", "find_target", "load_target"]

PYTHON_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
PROMPT = "a red circle moving left"


@dataclass(frozen=True)
class Target:
    """What a name means.

    Attributes:
        target: a pipeline or a module.
        items: prompts for a pipeline, forward kwargs for a module.
        pipe_kwargs: further arguments of every pipeline call.
        made_up: True if the forward kwargs are random.
    """

    target: Any
    items: tuple[Any, ...]
    pipe_kwargs: Mapping[str, Any] = field(default_factory=dict)
    made_up: bool = False


def load_target(
    name: str,
    prompt: str | None = None,
    sizes: Mapping[str, int] | None = None,
    device: str | None = None,
    dtype: torch.dtype | None = None,
) -> Denoiser:
    """The denoiser that ``name`` means, with its first call; arguments as :func:`find_target`'s.

    Raises:
        UnsupportedInputError: if ``name`` means nothing, or the call cannot be made.
        CalibrationError: if the pipeline takes no such sizes.
    """
    found = find_target(name, [prompt or PROMPT], sizes, device, dtype)
    return as_denoiser(found.target, found.items, found.pipe_kwargs)


def find_target(
    name: str,
    prompts: Sequence[str],
    call: Mapping[str, Any] | None = None,
    device: str | None = None,
    dtype: torch.dtype | None = None,
) -> Target:
    """Load what ``name`` means.

    Args:
        name: "tinywan"; a pipeline's folder or its id on Hugging Face; the folder of a transformer,
            or of one whose ``transformer`` subfolder holds it; or ``module:factory``, a function
            without arguments that returns a pipeline, or a module and the kwargs of its call, or of
            several calls.
        prompts: for pipelines; not looked at for a module, which is given calls.
        call: further arguments of a pipeline; num_frames, height and width of the video in pixels,
            or for a transformer by itself of its latents.
        device: where to run; None: where it was loaded.
        dtype: what to run in; None: as it was loaded.

    Raises:
        UnsupportedInputError: if ``name`` is none of these, or a call cannot be made.
    """
    call, prompts = dict(call or {}), tuple(prompts)
    if name == "tinywan":
        from evdit_opt.demo.tinywan import TINYWAN_CALL, load_tinywan

        return Target(_move(load_tinywan(), device, dtype), prompts, {**TINYWAN_CALL, **call})
    folder = _transformer_folder(Path(name))
    if folder is not None:
        if unknown := sorted(set(call) - {"num_frames", "height", "width"}):
            raise UnsupportedInputError(
                f"expected a pipeline to take {', '.join(unknown)}, {name!r} is a transformer"
            )
        transformer = _move(load_transformer(folder), device, dtype)
        return Target(transformer, (random_call(transformer, **call),), made_up=True)
    if PYTHON_PATH.fullmatch(name) and not Path(name).exists():
        made = _make(name)
        if isinstance(made, tuple):
            return _as_given(name, made, call, device, dtype)
        denoiser_of(made)  # says what is wrong with it, before its .to is missed
        return Target(_move(made, device, dtype), prompts, call)
    return Target(_move(load_pipeline(name), device, dtype), prompts, call)


def _transformer_folder(path: Path) -> Path | None:
    if (path / "model_index.json").is_file():
        return None  # a whole pipeline
    for folder in (path, path / "transformer"):
        if (folder / "config.json").is_file():
            return folder
    return None


def _make(name: str) -> Any:
    module, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does, and the evdit command does not
    try:
        factory: Any = importlib.import_module(module)
        for part in attribute.split("."):
            factory = getattr(factory, part)
    except (ImportError, AttributeError) as error:
        raise UnsupportedInputError(
            f"expected {name!r} to name a function as module:factory, got {error}; modules are "
            "looked for in the current folder and on Python's path"
        ) from error
    if not callable(factory):
        raise UnsupportedInputError(
            f"expected {name!r} to be a function, got {type(factory).__name__}"
        )
    return factory()


def _as_given(
    name: str,
    made: tuple[Any, ...],
    call: Mapping[str, Any],
    device: str | None,
    dtype: torch.dtype | None,
) -> Target:
    calls = made[1] if len(made) == 2 and isinstance(made[1], list) else list(made[1:])
    right = len(made) == 2 and all(isinstance(one, Mapping) for one in calls) and calls
    if not right or not isinstance(made[0], nn.Module):
        kinds = ", ".join(type(part).__name__ for part in made)
        raise UnsupportedInputError(
            f"expected {name!r} to return a pipeline, or a module and a dict of forward kwargs "
            f"(or a list of them), got ({kinds})"
        )
    if call:
        raise UnsupportedInputError(
            f"expected no {', '.join(call)}: {name!r} returned a call with sizes of its own"
        )
    if device is not None or dtype is not None:
        raise UnsupportedInputError(
            f"expected no device and no dtype: {name!r} returned a call with its own"
        )
    return Target(made[0].eval(), tuple(calls))


def _move(loaded: Any, device: str | None, dtype: torch.dtype | None) -> Any:
    try:
        loaded = loaded if dtype is None else loaded.to(dtype)
        return loaded if device is None else loaded.to(device)
    except (RuntimeError, AssertionError) as error:  # no such device, or not in this build of torch
        raise UnsupportedInputError(
            f"expected a device that runs {type(loaded).__name__}, {device!r} does not: {error}"
        ) from error
