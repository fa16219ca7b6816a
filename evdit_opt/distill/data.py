"""Latents and captions to train on: safetensors shards, and what fills them.

A shard is written whole or not at all, so an interrupted encoding goes on after the last one.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evdit_opt.errors import DistillationError

__all__ = ["LatentShards", "teacher_latents", "write_shards"]

logger = logging.getLogger(__name__)


def write_shards(
    folder: Path,
    count: int,
    make: Callable[[int], tuple[torch.Tensor, str]],
    per_shard: int = 16,
    made_of: Mapping[str, str] | None = None,
) -> None:
    """Write ``count`` latents with their captions; what is there already is kept.

    Args:
        folder: of the shards.
        count: how many.
        make: ``make(n)`` gives the n-th latent [channels, frames, height, width], any dtype, as
            the denoiser takes it, and its caption.
        per_shard: latents a file; the last one may hold fewer.
        made_of: what the latents depend on. Shards that were made of something else are refused.

    Raises:
        DistillationError: shards of something else in the folder, or the disk is full.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    origin = json.dumps({"per_shard": per_shard, **(made_of or {})}, sort_keys=True)
    for begin in range(0, count, per_shard):
        path = folder / f"{begin:08d}.safetensors"
        numbers = range(begin, min(begin + per_shard, count))
        if path.exists():
            with safe_open(path, "pt") as file:
                known = file.metadata()
            if known["made_of"] != origin:
                raise DistillationError(
                    f"expected {path} to be made of {origin}, it is of {known['made_of']}; "
                    "choose another folder"
                )
            if len(json.loads(known["captions"])) == len(numbers):
                continue
        pairs = [make(number) for number in numbers]
        partial = path.with_name(path.name + ".partial")
        try:
            save_file(
                {"latents": torch.stack([latent.cpu() for latent, _ in pairs])},
                partial,
                {"captions": json.dumps([text for _, text in pairs]), "made_of": origin},
            )
            os.replace(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise DistillationError(
                f"expected to write {path}: {error}; {begin} latents are kept, make room and "
                "start again"
            ) from error


class LatentShards:
    """Latents on disk by number; a shard is read when it is first needed, and stays mapped.

    Raises:
        DistillationError: no shards, or one that cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.captions: list[str] = []
        self._where: list[tuple[Any, int]] = []
        for path in sorted(folder.glob("*.safetensors")):
            try:
                file = safe_open(path, "pt")
                captions = json.loads(file.metadata()["captions"])
                rows = file.get_slice("latents").get_shape()[0]
            except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
                raise DistillationError(
                    f"expected latents and captions in {path}, cannot read them: {error}; remove "
                    "the file and encode again"
                ) from error
            if rows != len(captions):
                raise DistillationError(
                    f"expected a caption for each of {rows} latents in {path}, got {len(captions)}"
                )
            self.captions += captions
            self._where += [(file, row) for row in range(rows)]
        if not self._where:
            raise DistillationError(f"expected *.safetensors with latents in {folder}, found none")

    def __len__(self) -> int:
        return len(self._where)

    def take(self, numbers: Sequence[int]) -> torch.Tensor:
        """[len(numbers), channels, frames, height, width] float32."""
        rows = [
            (file.get_slice("latents"), row) for file, row in map(self._where.__getitem__, numbers)
        ]
        return torch.cat([latents[row : row + 1] for latents, row in rows]).float()

    def shuffled(self, number: int, seed: int) -> int:
        """Which latent a sample of the training is: another permutation every epoch."""
        epoch, position = divmod(number, len(self))
        return int(np.random.default_rng((seed, epoch)).permutation(len(self))[position])


@torch.no_grad()
def teacher_latents(
    pipe: Any,
    prompts: Sequence[str],
    folder: Path,
    *,
    count: int,
    steps: int,
    seed: int,
    call: Mapping[str, Any],
) -> None:
    """Data from prompts alone: latents that the teacher makes, each prompt in turn.

    Args:
        pipe: the teacher, whose ``output_type="latent"`` is what its denoiser takes.
        prompts: captions.
        folder: of the shards.
        count: how many latents; the n-th has the noise of seed + n.
        steps: of a clip.
        seed: of the first one's noise.
        call: further arguments of every call.
    """

    def make(number: int) -> tuple[torch.Tensor, str]:
        prompt = prompts[number % len(prompts)]
        made = pipe(
            prompt,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed + number),
            output_type="latent",
            **call,
        )
        logger.debug("latent %d of %d", number + 1, count)
        return made.frames[0].float(), prompt

    described = {"seed": str(seed), "steps": str(steps), "call": _text(call)}
    write_shards(folder, count, make, made_of={**described, "prompts": _text(prompts)})


def _text(value: Mapping[str, Any] | Iterable[str]) -> str:
    if isinstance(value, Mapping):
        return json.dumps({key: str(item) for key, item in value.items()}, sort_keys=True)
    return json.dumps(list(value))
