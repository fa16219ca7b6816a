"""Clips made while a model is trained, so that one sees what it learns."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evdit_opt.distill.videos import check_clip
from evdit_opt.errors import DistillationError

__all__ = ["SampleConfig", "undisturbed", "write_samples"]

KINDS = ("mp4", "gif")


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleConfig:
    """Which clips.

    Attributes:
        every: training steps between them.
        prompts: one clip each.
        seed: of the first prompt's noise; the n-th has seed + n, at every step the same.
        kind: "mp4" or "gif".
        rate: frames a second.
    """

    every: int
    prompts: tuple[str, ...]
    seed: int = 0
    kind: str = "mp4"
    rate: float = 16.0

    def __post_init__(self) -> None:
        if type(self.every) is not int or self.every < 1:
            raise DistillationError(f"expected every to be an integer above 0, got {self.every!r}")
        texts = self.prompts
        if isinstance(texts, str) or not texts or not all(isinstance(text, str) for text in texts):
            raise DistillationError(
                f"expected prompts of samples to be a list of texts, got {texts!r}"
            )
        if self.kind not in KINDS:
            raise DistillationError(f"expected kind {' or '.join(KINDS)}, got {self.kind!r}")
        if not 0 < self.rate < float("inf"):
            raise DistillationError(f"expected rate above 0, got {self.rate!r}")


@contextmanager
def undisturbed() -> Iterator[None]:
    """Whoever draws random numbers in here, those drawn later are as if nobody had."""
    python, numbers = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numbers)


def write_samples(
    pipe: Any, config: SampleConfig, call: Mapping[str, Any], folder: Path, step: int
) -> list[Path]:
    """Let a pipeline make its clips; written whole or not at all.

    Args:
        pipe: a diffusers video pipeline, as it is to be used.
        config: see `SampleConfig`.
        call: further arguments of its calls, ``num_inference_steps`` among them.
        folder: where to write ``step-000100-0.mp4``.
        step: of the training.

    Returns:
        The files, by prompt.

    Raises:
        DistillationError: a clip cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    with undisturbed():
        for number, prompt in enumerate(config.prompts):
            video = pipe(
                prompt,
                generator=torch.Generator().manual_seed(config.seed + number),
                **{**call, "output_type": "np"},
            ).frames[0]
            path = folder / f"step-{step:06d}-{number}.{config.kind}"
            _write(path, np.round(255 * np.clip(video, 0, 1)).astype(np.uint8), config.rate)
            made.append(path)
    return made


def _write(path: Path, video: np.ndarray, rate: float) -> None:
    import imageio.v3 as iio

    partial = path.with_name(f"partial-{path.name}")
    how: dict[str, Any] = {"duration": 1000 / rate, "loop": 0}
    if path.suffix == ".mp4":
        how = {"fps": rate, "codec": "libx264", "macro_block_size": 2}
    try:
        iio.imwrite(partial, video, **how)
        check_clip(partial, len(video))  # ffmpeg may end early without a word
        os.replace(partial, path)
    except (OSError, DistillationError) as error:
        partial.unlink(missing_ok=True)
        raise DistillationError(
            f"expected to write the clip {path}: {error}; make room and start again, or leave "
            "samples out"
        ) from error
