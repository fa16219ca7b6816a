"""What TinyWan's latents are: the eight strongest linear features of 2 x 4 x 4 pixel blocks.

An autoencoder of this size, trained freely for some minutes, invents codes in which one colour
looks different in every frame (the causal convolutions need 20 frames to settle), and the
transformer then has to learn all of them. So the code is fixed first, by principal components; the
autoencoder's encoder and decoder are trained to speak it, and the transformer can be trained at the
same time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from evdit_opt.demo.clips import draw_clip, sample_clip
from evdit_opt.demo.tinywan import LATENT_SHAPE


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearCode:
    """An affine map from blocks of 96 pixel values to 8 channels."""

    mean: np.ndarray  # [96]
    basis: np.ndarray  # [8, 96], rows include the scale

    def encode(self, video: np.ndarray) -> np.ndarray:
        """Latents [8, 17, 20, 20] of a clip [33, 80, 80, 3] in 0..1."""
        codes = (blocks(video) - self.mean) @ self.basis.T  # [frames, height, width, channels]
        return np.ascontiguousarray(codes.transpose(3, 0, 1, 2))


def blocks(video: np.ndarray) -> np.ndarray:
    """Cut [33, 80, 80, 3] into blocks [17, 20, 20, 96]; the first frame is doubled."""
    doubled = np.concatenate([video[:1], video])  # [34, 80, 80, 3]
    _, frames, height, width = LATENT_SHAPE
    cut = doubled.reshape(frames, 2, height, 4, width, 4, 3)
    return cut.transpose(0, 2, 4, 1, 3, 5, 6).reshape(frames, height, width, -1)


def fit(clips: int = 64) -> LinearCode:
    """Principal components of the first clips, half whitened: the strongest has variance 1.

    Half whitening (each feature is divided by the square root of its deviation) keeps colour and
    place stronger than fine edges, so that they are decided first when noise is removed.
    """
    samples = np.concatenate(
        [
            blocks(draw_clip(sample_clip(seed))).reshape(-1, 96)[seed % 7 :: 7]
            for seed in range(clips)
        ]
    )
    mean = samples.mean(axis=0)
    variance, vectors = np.linalg.eigh(np.cov(samples - mean, rowvar=False))
    deviation = np.sqrt(variance[::-1][: LATENT_SHAPE[0]])  # strongest first
    basis = vectors[:, ::-1].T[: LATENT_SHAPE[0]]
    scale = 1 / np.sqrt(deviation * deviation[0])
    return LinearCode(
        mean=mean.astype(np.float32), basis=(basis * scale[:, None]).astype(np.float32)
    )
