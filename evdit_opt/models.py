"""How to call a pipeline or a module: prompts or calls in, denoiser forwards out.

The only file that knows diffusers classes. Everything downstream sees a :class:`Denoiser`.
"""

import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evdit_opt.errors import CalibrationError, NonFiniteOutputError, UnsupportedInputError
from evdit_opt.offload import require_weights_in_place

__all__ = [
    "USUAL_STEPS",
    "Denoiser",
    "Item",
    "as_denoiser",
    "config_hash",
    "config_value",
    "denoiser_of",
    "first_call",
    "load_pipeline",
    "load_transformer",
    "output_tensor",
    "require_finite",
]

USUAL_STEPS = 50
"""To ask a pipeline for: a scheduler for few steps refuses less than its own number."""
OWN_ARGUMENTS = frozenset({"prompt", "num_inference_steps", "generator"})
"""What every run of a pipeline is given its own of."""
Item = Any  # a prompt (str) for a pipeline, the kwargs of one forward for a module


class _FirstCallSeen(Exception):
    """Carries the arguments of a denoiser call out of a pipeline that need not go on."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__("first denoiser call")
        self.call_args, self.call_kwargs = args, kwargs


@dataclass(frozen=True)
class Denoiser:
    """A video denoiser and a way to run it.

    Attributes:
        model: the module whose attention is rewritten, in place.
        items: prompts (pipeline) or forward kwargs (module), in the order given.
        run: ``run(item, seed, steps)`` runs one item to its end. Returns a video
            ``[frames, height, width, 3]`` in 0..1 (pipeline) or the model's output (module).
        makes_video: True if ``run`` returns decoded video.
    """

    model: nn.Module
    items: tuple[Item, ...]
    run: Callable[[Item, int, int], torch.Tensor]
    makes_video: bool


def as_denoiser(
    target: object, items: Iterable[Item], pipe_kwargs: Mapping[str, Any] | None = None
) -> Denoiser:
    """Wrap a diffusers video pipeline with prompts, or a module with the kwargs of its calls.

    Args:
        target: a ``DiffusionPipeline`` with a ``transformer``, or an ``nn.Module``.
        items: prompts for a pipeline, dicts of forward kwargs for a module; at least one.
        pipe_kwargs: further arguments of every pipeline call (num_frames, height, width,
            guidance_scale, negative_prompt, ...).

    Raises:
        UnsupportedInputError: if target is neither, or holds two denoisers, or hooks load or
            cast the weights of its single layers.
        CalibrationError: if items is empty, or not of the kind the target needs.
    """
    given = (items,) if isinstance(items, str) else tuple(items)
    if not given:
        raise CalibrationError(
            "expected at least one calibration prompt (pipeline) or call (module), got none; "
            "pass a few prompts like those you will use"
        )
    model = denoiser_of(target)
    require_weights_in_place(model)
    if model is target:
        return _module_denoiser(model, given)
    return _pipeline_denoiser(target, model, given, dict(pipe_kwargs or {}))


def denoiser_of(target: object) -> nn.Module:
    """The module whose attention is rewritten: ``target`` itself, or the transformer of a pipeline.

    Raises:
        UnsupportedInputError: if target is neither a module nor a pipeline with one transformer.
    """
    if isinstance(target, nn.Module):
        return target
    transformer = getattr(target, "transformer", None)
    if not isinstance(transformer, nn.Module) or not callable(target):
        raise UnsupportedInputError(
            "expected a diffusers pipeline with a `transformer`, or a torch.nn.Module with the "
            f"kwargs of its calls, got {type(target).__name__}"
        )
    if isinstance(getattr(target, "transformer_2", None), nn.Module):
        raise UnsupportedInputError(
            f"expected a pipeline with one denoiser, {type(target).__name__} has two (transformer "
            "and transformer_2); optimize each as a module: optimize(pipe.transformer, calls)"
        )
    return transformer


def load_pipeline(name: str) -> Any:
    """Load a diffusers pipeline from a folder or a Hugging Face id.

    Raises:
        UnsupportedInputError: if there is none, or diffusers cannot load it.
    """
    from diffusers import DiffusionPipeline

    try:
        return DiffusionPipeline.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UnsupportedInputError(
            f"expected a folder or Hugging Face id of a diffusers pipeline, got {name!r}: {error}"
        ) from error


def load_transformer(folder: Path) -> nn.Module:
    """Load one transformer from a folder with a ``config.json``.

    A folder without weights gives random ones: sites, layouts and times do not depend on them.

    Raises:
        UnsupportedInputError: if diffusers cannot load it.
    """
    import diffusers

    try:
        name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["_class_name"]
        kind: Any = getattr(diffusers, name)
        if any(folder.glob("*.safetensors*")) or any(folder.glob("*.bin*")):
            return kind.from_pretrained(folder).eval()
        return kind.from_config(kind.load_config(folder)).eval()
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UnsupportedInputError(
            f"expected {folder} to hold a transformer of diffusers, with its class in config.json "
            f"as _class_name, got {type(error).__name__}: {error}"
        ) from error


def first_call(
    denoiser: Denoiser, steps: int = USUAL_STEPS
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments of the first forward of the model.

    Args:
        denoiser: a module's calls are its first call's arguments already.
        steps: to ask a pipeline for.

    Raises:
        UnsupportedInputError: if the pipeline never calls its transformer.
    """
    if not denoiser.makes_video:
        return (), dict(denoiser.items[0])

    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _FirstCallSeen(args, kwargs)

    hook = denoiser.model.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        denoiser.run(denoiser.items[0], 0, steps)
    except _FirstCallSeen as seen:
        return seen.call_args, seen.call_kwargs
    finally:
        hook.remove()
    raise UnsupportedInputError(
        f"expected the pipeline to call its {type(denoiser.model).__name__}, it never did"
    )


def require_finite(tensor: torch.Tensor, what: str) -> torch.Tensor:
    """Return ``tensor``, or raise :class:`NonFiniteOutputError` naming ``what``."""
    if not torch.isfinite(tensor).all():
        raise NonFiniteOutputError(
            f"expected finite numbers in {what}, got NaN or infinity; check the weights, the dtype "
            "(fp16 overflows) and the inputs"
        )
    return tensor


def output_tensor(output: object) -> torch.Tensor:
    """The tensor in what a denoiser returns: itself, the first of a tuple, or ``.sample``."""
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    output = getattr(output, "sample", output)
    if not isinstance(output, torch.Tensor):
        raise UnsupportedInputError(
            "expected the model to return a tensor, a tuple of them or .sample, "
            f"got {type(output).__name__}"
        )
    return output


def _module_denoiser(model: nn.Module, calls: Sequence[Item]) -> Denoiser:
    for index, call in enumerate(calls):
        if not isinstance(call, Mapping):
            raise CalibrationError(
                "expected a dict of forward kwargs for every calibration call of a module, "
                f"call {index} is {type(call).__name__}"
            )

    def run(call: Item, _seed: int, _steps: int) -> torch.Tensor:
        with torch.no_grad():
            output = output_tensor(model(**call)).detach().clone()
        return require_finite(output, f"the output of {type(model).__name__}")

    return Denoiser(model, tuple(calls), run, makes_video=False)


def _pipeline_denoiser(
    pipe: Any, model: nn.Module, prompts: Sequence[Item], pipe_kwargs: dict[str, Any]
) -> Denoiser:
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise CalibrationError(
                f"expected prompts to be strings, prompt {index} is {type(prompt).__name__}"
            )
    accepted = inspect.signature(pipe.__call__).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
    unknown = sorted(set(pipe_kwargs) - set(accepted))
    if unknown and not takes_any:
        raise CalibrationError(f"{type(pipe).__name__} takes no argument {', '.join(unknown)}")
    if own := sorted(OWN_ARGUMENTS & set(pipe_kwargs)):
        raise CalibrationError(
            f"expected pipeline arguments without {', '.join(own)}, which every run gets its own "
            "of: give prompts as such, Config(calib_steps=...) and Config(seed=...)"
        )

    def run(prompt: Item, seed: int, steps: int) -> torch.Tensor:
        generator = torch.Generator("cpu").manual_seed(seed)
        output = pipe(
            prompt=prompt,
            num_inference_steps=steps,
            generator=generator,
            **{"output_type": "np", **pipe_kwargs},
        )
        return require_finite(_first_video(output, pipe), f"the video of {type(pipe).__name__}")

    return Denoiser(model, tuple(prompts), run, makes_video=True)


def _first_video(output: object, pipe: object) -> torch.Tensor:
    """The first video of a pipeline's output, ``[frames, height, width, 3]`` in 0..1."""
    frames = getattr(output, "frames", None)
    if frames is None:
        images = getattr(output, "images", None)
        frames = images if getattr(images, "ndim", 0) == 5 else None  # Open-Sora-Plan
    if frames is None:
        raise UnsupportedInputError(
            f"expected a video pipeline (its output has .frames), {type(pipe).__name__} "
            f"returned {type(output).__name__}; image pipelines have no frames to sparsify"
        )
    video = torch.as_tensor(frames[0])
    return video / 255 if video.dtype == torch.uint8 else video


def config_value(model: nn.Module, name: str) -> Any:
    """An entry of a model's configuration; None if it has none of that name."""
    config = getattr(model, "config", None)
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def config_hash(model: nn.Module) -> str:
    """SHA-256 of a model's configuration, or of its parameter names and shapes if it has none."""
    config = getattr(model, "config", None)
    if isinstance(config, Mapping):
        described: Any = {
            key: str(value) for key, value in config.items() if not key.startswith("_")
        }
    else:
        described = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
