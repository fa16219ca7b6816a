"""``evdit export``: the denoiser that a name means, at the sizes of its first call, to a file."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evdit_opt.errors import UnsupportedInputError
from evdit_opt.export.steps import export_onnx_steps
from evdit_opt.export.to_onnx import OPSET, export_onnx, require_packages
from evdit_opt.inspection import load_target
from evdit_opt.models import Denoiser, first_call
from evdit_opt.plan import Plan

__all__ = ["Written", "export_named"]


@dataclass(frozen=True)
class Written:
    """What an export left.

    Attributes:
        files: with a table of steps, that comes first. Weights beside a file are not listed.
        text: the same in words.
    """

    files: tuple[Path, ...]
    text: str


def export_named(
    name: str,
    plan: Path,
    out: Path,
    *,
    prompt: str | None = None,
    sizes: Mapping[str, int] | None = None,
    dtype: torch.dtype | None = None,
    opset: int = OPSET,
) -> Written:
    """Write the optimized denoiser of a pipeline as an ONNX model, or as one per mode of its steps.

    Args:
        name: as of ``load_target``.
        plan: a plan file.
        out: the file to write; for a plan with residual reuse as in ``export_onnx_steps``.
        prompt: any prompt.
        sizes: num_frames, height and width.
        dtype: what the model runs in; None: as it was loaded.
        opset: as of ``export_onnx``.

    Raises:
        UnsupportedInputError: if ``out`` cannot be written, or the folder holds no weights.
        EvditError: as ``Plan.load``, ``load_target``, ``export_onnx`` and ``export_onnx_steps``.
    """
    require_packages()
    loaded = Plan.load(plan)
    if not out.parent.is_dir() or out.is_dir():
        raise UnsupportedInputError(f"expected a file to write in a folder there is, got {out}")
    _require_weights(Path(name))
    denoiser = load_target(name, prompt, sizes, None, dtype)
    call = call_of(denoiser)
    if loaded.reuse is None:
        files: tuple[Path, ...] = (export_onnx(denoiser.model, call, out, loaded, opset=opset),)
    else:
        files = export_onnx_steps(denoiser.model, call, out, loaded, opset=opset)
    shapes = ", ".join(
        f"{key} {list(value.shape)}"
        for key, value in call.items()
        if isinstance(value, torch.Tensor)
    )
    return Written(
        files,
        f"{', '.join(map(str, files))}: {type(denoiser.model).__name__}, {len(loaded.rules)} of "
        f"{len(loaded.sites)} sites sparse, mean density {loaded.density:.3f}, ONNX operator set "
        f"{opset}; inputs {shapes}",
    )


def call_of(denoiser: Denoiser) -> dict[str, Any]:
    """The arguments of the first forward by name."""
    args, kwargs = first_call(denoiser)
    names = inspect.signature(denoiser.model.forward).parameters
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _require_weights(path: Path) -> None:
    """A folder without weights is fine to inspect, but nobody wants random ones exported."""
    for folder in (path, path / "transformer"):
        weights = [*folder.glob("*.safetensors*"), *folder.glob("*.bin*")]
        if (folder / "config.json").is_file() and not weights:
            raise UnsupportedInputError(
                f"expected weights beside {folder / 'config.json'}, found none; export from a "
                "folder that holds them, or from module:factory"
            )
