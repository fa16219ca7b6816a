"""Latents and captions to train on: safetensors shards, and what fills them.

A shard is written whole or not at all, so an interrupted encoding goes on after the last one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice, zip_longest
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch

from evdit_opt.errors import DistillationError
from evdit_opt.whole_file import whole_file

__all__ = [
    "LatentShards",
    "Sample",
    "SkipClip",
    "StoredTexts",
    "teacher_latents",
    "write_shards",
    "write_stream",
]

logger = logging.getLogger(__name__)

TEXT = "text."
"""Tensors of a shard whose names begin so are arguments of the denoiser, a row for each clip."""


class Sample(NamedTuple):
    """What one clip of the data is.

    Attributes:
        latent: [channels, frames, height, width], any dtype, as the denoiser takes it.
        caption: its text.
        text: that text as the denoiser takes it, tensors [1, ...] by argument; none: it is
            encoded again by every run.
    """

    latent: torch.Tensor
    caption: str
    text: Mapping[str, torch.Tensor] = MappingProxyType({})


class SkipClip(Exception):
    """Raised by what makes a sample: leave this one out, for the reason given."""


def write_shards(
    folder: Path,
    count: int,
    make: Callable[[int], Sample | tuple[torch.Tensor, str]],
    per_shard: int = 16,
    made_of: Mapping[str, str] | None = None,
    sources: Sequence[str] | None = None,
) -> None:
    """Write ``count`` latents with their captions; what is there already is kept.

    Args:
        folder: of the shards.
        count: how many.
        make: ``make(n)`` gives the n-th, or its latent and caption, or raises `SkipClip`.
        per_shard: latents a file; the last one may hold fewer.
        made_of: what the latents depend on. Shards that were made of something else are refused.
        sources: what each one is made of. Shards with others are refused too.

    Raises:
        DistillationError: shards of something else in the folder, or a damaged one, or the disk is
            full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    origin = json.dumps({"per_shard": per_shard, **(made_of or {})}, sort_keys=True)
    for begin in range(0, count, per_shard):
        path = folder / f"{begin:08d}.safetensors"
        numbers = range(begin, min(begin + per_shard, count))
        theirs = None if sources is None else [sources[number] for number in numbers]
        if path.exists() and _tried(path, origin, theirs) == len(numbers):
            continue
        _write_shard(path, numbers, make, {"made_of": origin, "sources": json.dumps(theirs)})
    if sources is not None:
        for path in folder.glob("*.safetensors"):
            if int(path.stem) >= count:
                raise DistillationError(
                    f"expected latents of {count} clips in {folder}, {path.name} holds later ones; "
                    "remove it, or choose another folder"
                )


def write_stream(
    folder: Path, samples: Iterable[Sample | tuple[torch.Tensor, str]], per_shard: int = 16
) -> None:
    """Write the latents of an iterator; started again with an equal one, it goes on.

    What is on disk already is taken from the iterator too, and dropped.

    Args:
        folder: of the shards.
        samples: as many as there are, or their latents and captions.
        per_shard: latents a file; the last one may hold fewer.

    Raises:
        DistillationError: as `write_shards`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    origin = json.dumps({"per_shard": per_shard}, sort_keys=True)
    stream, begin = iter(samples), 0
    while held := list(islice(stream, per_shard)):
        path = folder / f"{begin:08d}.safetensors"
        captions = [Sample(*sample).caption for sample in held]
        if not path.exists() or _tried(path, origin, captions) != len(held):
            made = {"made_of": origin, "sources": json.dumps(captions)}
            _write_shard(path, range(len(held)), held.__getitem__, made, begin)
        begin += len(held)


def _tried(path: Path, origin: str, sources: Sequence[str] | None) -> int:
    """How many clips a shard was made of; it is refused if they are others."""
    known = _open(path).metadata()
    if known["made_of"] != origin:
        raise DistillationError(
            f"expected {path} to be made of {origin}, it is of {known['made_of']}; "
            "choose another folder"
        )
    skipped = json.loads(known.get("skipped", "[]"))
    tried = len(json.loads(known["captions"])) + len(skipped)
    theirs = json.loads(known.get("sources", "null"))
    if sources is not None and theirs != list(sources[:tried]):
        pairs = zip_longest(theirs or (), sources)
        changed = next(f"{old!r}, now {new!r}" for old, new in pairs if old != new)
        raise DistillationError(
            f"expected {path} to be made of the clips given, it is of others ({changed}); remove "
            "it to encode its clips again, or choose another folder"
        )
    for reason in skipped:
        logger.warning("left out: %s", reason)
    return tried


def _write_shard(
    path: Path,
    numbers: Sequence[int],
    make: Callable[[int], Sample | tuple[torch.Tensor, str]],
    metadata: dict[str, str],
    before: int = 0,
) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    samples: list[Sample] = []
    skipped: list[str] = []
    for number in numbers:
        try:
            samples.append(Sample(*make(number)))
        except SkipClip as reason:
            logger.warning("left out: %s", reason)
            skipped.append(str(reason))
    tensors = {}
    if samples:
        tensors["latents"] = torch.stack([sample.latent.cpu() for sample in samples])
        for name in samples[0].text:
            tensors[TEXT + name] = torch.cat([sample.text[name].cpu() for sample in samples])
    metadata |= {
        "captions": json.dumps([sample.caption for sample in samples]),
        "skipped": json.dumps(skipped),
    }
    try:
        with whole_file(path) as partial:
            save_file(tensors, partial, metadata)
    except (OSError, SafetensorError) as error:
        raise DistillationError(
            f"expected to write {path}: {error}; {before + numbers[0]} latents are kept, make room "
            "and start again"
        ) from error


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise DistillationError(
            f"expected latents and captions in {path}, cannot read them: {error}; remove the file "
            "and encode again"
        ) from error


class StoredTexts(Mapping[str, dict[str, torch.Tensor]]):
    """Captions whose text is on disk, as the denoiser takes it; read when it is asked for."""

    def __init__(self) -> None:
        self._where: dict[str, tuple[Any, int]] = {}

    def add(self, file: Any, captions: Sequence[str]) -> None:
        """Know the captions of one more shard."""
        self._where |= {caption: (file, row) for row, caption in enumerate(captions)}

    def __getitem__(self, caption: str) -> dict[str, torch.Tensor]:
        file, row = self._where[caption]
        names = [name for name in file.keys() if name.startswith(TEXT)]
        return {name[len(TEXT) :]: file.get_slice(name)[row : row + 1] for name in names}

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


class LatentShards:
    """Latents on disk by number; a shard is read when it is first needed, and stays mapped.

    Attributes:
        captions: by number.
        texts: those of them that need no text encoder any more.
        skipped: a line for each clip that was left out.
        shapes: of the latents, one if all are of one size.

    Raises:
        DistillationError: no shards, or one that cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError

        self.captions: list[str] = []
        self.texts = StoredTexts()
        self.skipped: list[str] = []
        self.shapes: set[tuple[int, ...]] = set()
        self._where: list[tuple[Any, int]] = []
        for path in sorted(folder.glob("*.safetensors")):
            file = _open(path)
            try:
                names = set(file.keys())
                captions = json.loads(file.metadata()["captions"])
                self.skipped += json.loads(file.metadata().get("skipped", "[]"))
                shape = file.get_slice("latents").get_shape() if captions else [0]
            except (KeyError, TypeError, ValueError, SafetensorError) as error:
                raise DistillationError(
                    f"expected latents and captions in {path}, cannot read them: {error}; remove "
                    "the file and encode again"
                ) from error
            rows = shape[0]
            if rows != len(captions):
                raise DistillationError(
                    f"expected a caption for each of {rows} latents in {path}, got {len(captions)}"
                )
            if rows:
                self.shapes.add(tuple(shape[1:]))
            self.captions += captions
            self._where += [(file, row) for row in range(rows)]
            if any(name.startswith(TEXT) for name in names):
                self.texts.add(file, captions)
        if not self._where:
            left = f"; left out: {'; '.join(self.skipped[:5])}" if self.skipped else ""
            raise DistillationError(
                f"expected *.safetensors with latents in {folder}, found none{left}"
            )

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

    def make(number: int) -> Sample:
        prompt = prompts[number % len(prompts)]
        made = pipe(
            prompt,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed + number),
            output_type="latent",
            **call,
        )
        logger.debug("latent %d of %d", number + 1, count)
        return Sample(made.frames[0].float(), prompt)

    described = {"seed": str(seed), "steps": str(steps), "call": _text(call)}
    write_shards(folder, count, make, made_of={**described, "prompts": _text(prompts)})


def _text(value: Mapping[str, Any] | Iterable[str]) -> str:
    if isinstance(value, Mapping):
        return json.dumps({key: str(item) for key, item in value.items()}, sort_keys=True)
    return json.dumps(list(value))
