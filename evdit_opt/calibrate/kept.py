"""What unfinished work keeps on disk, so that a killed calibration loses one run at most.

Every finished run of the model is a file, written whole or not at all. The folder says what it was
kept for: a calibration that would not repeat those very runs does not take them up. Measuring where
attention goes keeps its sums the same way.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evdit_opt.calibrate.folder_lock import lock_folder, unlock_folder
from evdit_opt.config import Config
from evdit_opt.errors import CalibrationError, UnsupportedInputError
from evdit_opt.models import Denoiser, config_hash
from evdit_opt.versions import installed_versions
from evdit_opt.whole_file import whole_file

__all__ = ["Kept", "flat", "part", "purpose", "remove_kept"]

PURPOSE = "purpose.json"
RECORDING = "by head"
"""What is recorded of a site; other sums, kept by an earlier version, are not gone on with."""

SEARCHED = frozenset(
    {"threshold", "density", "speedup", "quality", "min_psnr", "min_ssim", "max_flicker_ratio",
     "reuse_memory", "reuse_trend", "reuse_precisions", "max_distinct_rules", "min_tokens", "inner",
     "progress"}
)  # fmt: skip
"""Settings that no finished run depends on: runs under plans are kept by the plan."""


class Kept:
    """Finished runs, in a folder or nowhere.

    Args:
        folder: made with the first run that is kept, in a folder there is; None: nothing is kept.
        purpose: see :func:`purpose`.

    Raises:
        CalibrationError: if the folder was kept for another purpose, cannot be read, or is in the
            hands of another process.
        UnsupportedInputError: if safetensors is not installed.
    """

    def __init__(
        self, folder: Path | None = None, purpose: Mapping[str, str] | None = None
    ) -> None:
        self._folder, self._purpose = folder, dict(purpose or {})
        if folder is None:
            return
        try:
            import safetensors.torch  # noqa: F401
        except ImportError as error:
            raise UnsupportedInputError(
                "expected the package safetensors, in which unfinished work is kept: "
                'pip install "evdit-opt[diffusers]"'
            ) from error
        if folder.exists():
            self._take_up(folder)

    def run(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """What ``make`` returns, or returned when it was last called by this name."""
        kept = self.load(name)
        if kept is not None:
            return kept[0]["result"]
        result = make()
        self.save(name, {"result": result})
        return result

    def save(self, name: str, tensors: Mapping[str, Tensor], facts: object = None) -> None:
        """Keep tensors and JSON by a name, in the place of what was kept by it.

        Raises:
            CalibrationError: if the disk does not take it.
        """
        if self._folder is None:
            return
        from safetensors.torch import save

        own = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        content = save(own, {"facts": json.dumps(facts)})
        try:
            self._folder.mkdir(exist_ok=True)
            self._take_up(self._folder)  # somebody who began at the same time may have been quicker
            _write(self._file(name), content)
        except OSError as error:
            raise CalibrationError(
                f"expected to keep a finished run in {self._folder}: {error}; what is there "
                "already stays, and is gone on with once this is mended"
            ) from error

    def load(self, name: str) -> tuple[dict[str, Tensor], Any] | None:
        """The tensors and the JSON kept by a name; None if there are none.

        Raises:
            CalibrationError: if the file is damaged.
        """
        if self._folder is None or not self._file(name).exists():
            return None
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._file(name), "pt") as file:
                facts = json.loads(file.metadata()["facts"])
                return {key: file.get_tensor(key) for key in file.keys()}, facts
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise CalibrationError(
                f"expected a finished run in {self._file(name)}, it cannot be read: {error}; "
                f"remove {self._folder} to begin anew"
            ) from error

    def _file(self, name: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{name}.safetensors"

    def _take_up(self, folder: Path) -> None:
        self._require_purpose(folder)
        lock_folder(folder)

    def _require_purpose(self, folder: Path) -> None:
        try:
            kept_for = json.loads((folder / PURPOSE).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            if any(path.suffix == ".safetensors" for path in folder.iterdir()):
                raise self._foreign(folder) from error
            _write(folder / PURPOSE, json.dumps(self._purpose).encode())  # new, or killed early
            return
        except (OSError, ValueError) as error:
            raise self._foreign(folder) from error
        if kept_for != self._purpose:
            other = kept_for if isinstance(kept_for, dict) else {}
            names = sorted({*other, *self._purpose})
            differing = [name for name in names if other.get(name) != self._purpose.get(name)]
            raise CalibrationError(
                f"expected {folder} to hold the unfinished work on this model, these prompts and "
                f"settings, it differs in: {', '.join(differing)}; remove it to begin anew"
            )

    @staticmethod
    def _foreign(folder: Path) -> CalibrationError:
        return CalibrationError(
            f"expected unfinished work in {folder}, found something else; give another place for "
            "the result, or remove the folder"
        )


def flat(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """One mapping to keep, of several by name; ``part`` takes them out again."""
    return {f"{name}/{key}": value for name, own in parts.items() for key, value in own.items()}


def part(kept: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The mapping that ``flat`` was given by a name."""
    own = f"{name}/"
    return {key.removeprefix(own): value for key, value in kept.items() if key.startswith(own)}


def remove_kept(folder: Path) -> None:
    """The result is saved: nothing is kept any more."""
    if not folder.exists():
        return
    # Renamed first: half a folder, where this is killed, must not look like an unfinished one.
    going = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(going, ignore_errors=True)
    unlock_folder(folder)
    os.replace(folder, going)
    shutil.rmtree(going)


def purpose(
    target: object, denoiser: Denoiser, config: Config, recording: str = RECORDING
) -> dict[str, str]:
    """What finished runs depend on, as hashes by name.

    Args:
        target: what is run.
        denoiser: of it, with the items.
        config: its settings.
        recording: what is recorded.

    Weights count by a sample of each tensor, so that large models are not read through; a setting
    that is an object counts as it prints.
    """
    model = denoiser.model
    settings = {
        field.name: _described(getattr(config, field.name))
        for field in fields(config)
        if field.name not in SEARCHED
    }
    weights = [[name, *_sampled(value)] for name, value in model.state_dict().items()]
    return {
        "pipeline": type(target).__name__,
        "model": type(model).__name__,
        "model configuration": config_hash(model),
        "weights": _hash(weights),
        "prompts": _hash(_described(denoiser.items)),
        "settings": _hash(settings),
        "recording": recording,
        "versions": _hash(installed_versions()),
    }


def _sampled(tensor: Any) -> list[Any]:
    if not isinstance(tensor, Tensor):
        return [repr(tensor)]
    what = [list(tensor.shape), str(tensor.dtype), tensor.device.type]
    if tensor.device.type == "meta" or type(tensor.data) is not Tensor:
        return what  # offloaded, or of a class that packs numbers its own way
    sample = tensor.detach().reshape(-1)[:: max(1, tensor.numel() // 64)]
    return [*what, _bytes(sample)]


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return [list(value.shape), str(value.dtype), _bytes(value.detach())]
    if hasattr(value, "__array_interface__"):  # arrays and pictures, such as a first frame
        return _described(torch.from_numpy(np.array(value)))
    if isinstance(value, Mapping):
        return {str(key): _described(own) for key, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [_described(own) for own in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)


def _bytes(tensor: Tensor) -> str:
    flat = tensor.reshape(-1).cpu().contiguous()
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _write(path: Path, content: bytes) -> None:
    with whole_file(path) as partial:
        partial.write_bytes(content)
