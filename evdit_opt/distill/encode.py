"""A folder of videos becomes latents and text as a pipeline's denoiser takes them, once.

A latent is the mode of the autoencoder's distribution, shifted and scaled as its configuration
says. Whether that is what the pipeline does is not taken on trust: what the pipeline gives its own
decoder for a latent has to come back as that latent.
"""

from __future__ import annotations

import inspect
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evdit_opt.distill.conditions import Conditions
from evdit_opt.distill.data import LatentShards, Sample, SkipClip, write_shards
from evdit_opt.distill.videos import CaptionedVideo, check_clip, list_videos, read_clip
from evdit_opt.errors import DistillationError, VideoError
from evdit_opt.models import config_hash

__all__ = ["Encoder", "VideoCheck", "VideoData", "check_videos", "encode_videos", "latent_scale"]

logger = logging.getLogger(__name__)

PROMPT = "a video"
"""For what does not depend on the text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoData:
    """Videos to train on.

    Attributes:
        videos: a folder, laid out as videos.py says.
        rate: frames a second to sample them at; None: frame after frame.
    """

    videos: Path
    rate: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.videos, Path):
            raise DistillationError(f"expected videos to be a pathlib.Path, got {self.videos!r}")
        if self.rate is not None and not 0 < self.rate < float("inf"):
            raise DistillationError(f"expected rate above 0 or none, got {self.rate!r}")


def latent_scale(vae: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What an autoencoder's latents are made of unit size with: ``(z - shift) * scale``.

    Returns:
        shift and scale, float32 ``[channels, 1, 1, 1]`` or ``[1, 1, 1, 1]``.

    Raises:
        DistillationError: its configuration does not say.
    """
    config = getattr(vae, "config", {})
    mean, std = config.get("latents_mean"), config.get("latents_std")
    factor, shift = config.get("scaling_factor"), config.get("shift_factor")
    if mean is not None and std is not None:
        scale = (1.0 if factor is None else factor) / torch.tensor(std, dtype=torch.float32)
        return torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1, 1), scale.view(-1, 1, 1, 1)
    if factor is not None:
        numbers = torch.tensor([shift or 0.0, factor], dtype=torch.float32)
        return numbers[0].view(1, 1, 1, 1), numbers[1].view(1, 1, 1, 1)
    raise DistillationError(
        f"expected latents_mean and latents_std, or scaling_factor, in the configuration of "
        f"{type(vae).__name__}, found neither; encode the videos yourself, with "
        "evdit_opt.distill.data.write_stream, and give their folder as latents"
    )


class Encoder:
    """A pipeline's own autoencoder, from pixels to what its denoiser takes.

    Args:
        pipe: a diffusers video pipeline with a ``vae``.
        call: arguments of its calls.

    Attributes:
        frames, height, width: of a clip in pixels.
        conditions: of a prompt, whose shape is that of a latent.

    Raises:
        DistillationError: the size is not known, or the pipeline scales latents in another way.
    """

    def __init__(self, pipe: Any, call: Mapping[str, Any]) -> None:
        self.pipe = pipe
        self.vae: Any = getattr(pipe, "vae", None)
        if self.vae is None or not hasattr(self.vae, "encode"):
            raise DistillationError(
                f"expected {type(pipe).__name__} to have an autoencoder (vae) to encode videos"
            )
        usual = inspect.signature(pipe.__call__).parameters
        sizes = [
            call.get(name, usual[name].default if name in usual else None)
            for name in ("num_frames", "height", "width")
        ]
        if not all(type(size) is int for size in sizes):
            raise DistillationError(
                f"expected num_frames, height and width of a call of {type(pipe).__name__}, got "
                f"{sizes}; set them under call"
            )
        self.frames, self.height, self.width = sizes
        self.call = {**call, "guidance_scale": 1.0}
        self.shift, self.scale = latent_scale(self.vae)
        self.conditions = Conditions(pipe, [PROMPT], self.call)
        self._check_scale()

    @torch.no_grad()
    def latent(self, pixels: np.ndarray) -> torch.Tensor:
        """The latent of a clip.

        Args:
            pixels: [frames, height, width, 3] uint8.

        Returns:
            [channels, latent frames, latent height, latent width] float32.

        Raises:
            DistillationError: it is not of the size that the denoiser takes.
        """
        video = torch.from_numpy(pixels).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        device = getattr(self.pipe, "_execution_device", self.vae.device)
        found = self.vae.encode(video.to(device, self.vae.dtype)).latent_dist.mode()[0]
        latent = (found.float().cpu() - self.shift) * self.scale
        if tuple(latent.shape) != self.conditions.shape:
            raise DistillationError(
                f"expected a latent {list(self.conditions.shape)}, as "
                f"{type(self.pipe).__name__}'s denoiser takes it, {self.frames} frames of "
                f"{self.height} x {self.width} became {list(latent.shape)}; set num_frames, height "
                "and width to what the pipeline makes"
            )
        return latent

    def _check_scale(self) -> None:
        """Let the pipeline take one step, and see what it decodes."""
        once = {**self.call, "num_inference_steps": 1, "prompt": PROMPT}

        def run(output: str) -> Any:
            return self.pipe(
                **once, output_type=output, generator=torch.Generator().manual_seed(0)
            ).frames

        latents = run("latent").float().cpu()
        seen: list[torch.Tensor] = []

        def decode(given: torch.Tensor, *_: Any, **__: Any) -> Any:
            seen.append(given)
            raise _SeenError

        self.vae.decode = decode
        try:
            run("pt")
        except _SeenError:
            pass
        finally:
            del self.vae.decode
            free = getattr(self.pipe, "maybe_free_model_hooks", None)
            if free is not None:
                free()  # as the call would have done at its end
        given = seen[0].float().cpu() if seen else torch.empty(0)
        back = (given - self.shift) * self.scale if given.shape == latents.shape else given
        # The pipeline's products and sums, then ours, in the precision of the autoencoder.
        largest = max(float(latents.abs().max()), float((self.shift * self.scale).abs().max()))
        allowed = 8 * torch.finfo(self.vae.dtype).eps * largest
        if given.shape != latents.shape or float((back - latents).abs().max()) > allowed:
            raise DistillationError(
                f"expected {type(self.pipe).__name__} to decode latents that were scaled as the "
                f"configuration of its {type(self.vae).__name__} says, it does something else; "
                "encode the videos yourself, with evdit_opt.distill.data.write_stream, and give "
                "their folder as latents"
            )


class _SeenError(Exception):
    """The decoder was reached."""


def encode_videos(
    pipe: Any, data: VideoData, folder: Path, call: Mapping[str, Any]
) -> LatentShards:
    """Encode a folder of videos and their captions, or what is left of it.

    Videos that cannot be used are left out; each is named in the log, and in its shard.

    Args:
        pipe: the pipeline that is trained.
        data: see `VideoData`.
        folder: of the shards.
        call: arguments of the pipeline's calls.

    Raises:
        DistillationError: no video can be used, other videos were encoded there before, the disk is
            full, or the pipeline's latents are scaled in a way that is not known.
    """
    found = list_videos(data.videos)
    encoder = Encoder(pipe, call)
    for reason in found.skipped:
        logger.warning("left out: %s", reason)
    write_shards(
        folder,
        len(found.videos),
        _maker(encoder, found.videos, data.rate),
        made_of={
            "autoencoder": config_hash(encoder.vae),
            "call": json.dumps({key: str(value) for key, value in call.items()}, sort_keys=True),
            "size": f"{encoder.frames} {encoder.height} {encoder.width}",
            "rate": str(data.rate),
        },
        sources=[video.identity for video in found.videos],
    )
    shards = LatentShards(folder)
    left = len(found.skipped) + len(shards.skipped)
    logger.info("%d videos of %s are encoded, %d left out", len(shards), data.videos, left)
    return shards


def _maker(
    encoder: Encoder, videos: tuple[CaptionedVideo, ...], rate: float | None
) -> Callable[[int], Sample]:
    wanted = {name: v.shape for name, v in encoder.conditions.text_of(PROMPT).items()}

    def make(number: int) -> Sample:
        video = videos[number]
        try:
            pixels = read_clip(video.path, encoder.frames, encoder.height, encoder.width, rate)
        except VideoError as error:
            raise SkipClip(str(error)) from error
        latent = encoder.latent(pixels)
        if not latent.isfinite().all():
            raise SkipClip(f"expected finite latents of {video.path}, got others")
        text = Conditions(encoder.pipe, [video.caption], encoder.call).text_of(video.caption)
        if {name: value.shape for name, value in text.items()} != wanted:
            raise DistillationError(
                f"expected text of one length for all captions, that of {video.path} differs; pad "
                "it, for example with max_sequence_length"
            )
        return Sample(latent, video.caption, text)

    return make


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoCheck:
    """What a folder of videos would give.

    Attributes:
        usable: videos with captions that can be opened and are long enough.
        skipped: a line for each of the others.
        disk_gib: of the shards.
        seconds: to encode them all, from the second of two clips.
        peak_gib: most memory of the device at once; None on a CPU.
    """

    usable: int
    skipped: tuple[str, ...]
    disk_gib: float
    seconds: float
    peak_gib: float | None


def check_videos(pipe: Any, data: VideoData, call: Mapping[str, Any]) -> VideoCheck:
    """Look at every video, encode one, keep nothing.

    Raises:
        DistillationError: as `encode_videos`.
    """
    found = list_videos(data.videos)
    encoder = Encoder(pipe, call)
    usable, skipped = [], list(found.skipped)
    for video in found.videos:
        try:
            check_clip(video.path, encoder.frames, data.rate)
            usable.append(video)
        except VideoError as error:
            skipped.append(str(error))
    make, sample, seconds = _maker(encoder, tuple(usable), data.rate), None, 0.0
    for number in range(len(usable)):
        begin = time.perf_counter()
        try:
            sample, once = make(number), sample is not None
        except SkipClip as error:  # it opens, and ends before it says
            skipped.append(str(error))
            continue
        seconds = time.perf_counter() - begin
        if once:  # the first one also warms up
            break
    if sample is None:
        raise DistillationError(
            f"expected a video in {data.videos} that can be used, left out all: "
            f"{'; '.join(skipped[:5])}"
        )
    tensors = [sample.latent, *sample.text.values()]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    count = len(found.videos) + len(found.skipped) - len(skipped)
    on_gpu = encoder.vae.device.type == "cuda"
    return VideoCheck(
        usable=count,
        skipped=tuple(skipped),
        disk_gib=size * count / 2**30,
        seconds=seconds * count,
        peak_gib=torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
    )
