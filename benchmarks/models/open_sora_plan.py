"""The denoiser of Open-Sora-Plan v1.2, the model of the Efficient-vDiT paper, written anew.

``OpenSoraT2V-ROPE-L/122``: 32 layers, 24 heads x 96, patch 1x2x2 by a 2D convolution per frame,
AdaLN-single, 3D rotary positions, cross-attention to mT5. The names of its parameters are those of
the public checkpoint, and what it computes is what the public code computes, bit for bit
(docs/open_sora_plan.md). Like that code, its attention branches on the *values* of the mask between
the projections and the SDPA, so Dynamo cannot trace it whole.

Learned from https://github.com/PKU-YuanGroup/Open-Sora-Plan at v1.2.0 (adb2a20a3d77),
opensora/models/diffusion/opensora/{modeling_opensora,modules,rope}.py; nothing is copied. Left
out: images beside the video, sequence parallelism, NPUs, down-samplers, learned-size positions.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["FULL", "SMALL", "OpenSoraConfig", "OpenSoraT2V", "open_sora_call"]

HIDDEN = -10000.0
"""What is added to the logits of a masked key: not -inf, so a row of them is no NaN."""


@dataclass(frozen=True, kw_only=True)
class OpenSoraConfig:
    """Sizes of the model.

    Attributes:
        num_layers: transformer blocks.
        num_attention_heads: heads of every attention.
        attention_head_dim: size of a head, a multiple of 6 (three axes, two halves).
        in_channels: latent channels, in and out.
        caption_channels: channels of the text encoder.
        patch_size: latent pixels per token, each way.
        patch_size_t: latent frames per token.
        interpolation_scale: rotary positions are divided by it, (time, height, width).
    """

    num_layers: int = 32
    num_attention_heads: int = 24
    attention_head_dim: int = 96
    in_channels: int = 4
    caption_channels: int = 4096
    patch_size: int = 2
    patch_size_t: int = 1
    interpolation_scale: tuple[float, float, float] = (1.0, 1.5, 2.0)

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.num_attention_heads * self.attention_head_dim


FULL = OpenSoraConfig()
"""OpenSoraT2V-ROPE-L/122 with the 720p position scales of the public training scripts."""

SMALL = OpenSoraConfig(
    num_layers=3, num_attention_heads=2, attention_head_dim=12, caption_channels=16
)


class OpenSoraT2V(nn.Module):
    """Latent video and text in, predicted noise out; same forward arguments as the public class."""

    def __init__(self, config: OpenSoraConfig = FULL) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.pos_embed = PatchEmbed(config)
        self.adaln_single = AdaLayerNormSingle(width)
        self.caption_projection = CaptionProjection(config.caption_channels, width)
        self.transformer_blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / math.sqrt(width))
        self.proj_out = nn.Linear(width, config.patch_size**2 * config.in_channels)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = False,
        **_unused: Any,
    ) -> tuple[Tensor]:
        """Denoise.

        Args:
            hidden_states: latents ``[batch, channels, frames, height, width]``.
            timestep: ``[batch]``.
            encoder_hidden_states: text ``[batch, 1, tokens, caption_channels]``.
            attention_mask: 1 where there is video, ``[batch, frames, height, width]`` in latent
                pixels; 0 where there is padding.
            encoder_attention_mask: 1 where there is text, ``[batch, 1, tokens]``.
            return_dict: must be False.

        Returns:
            A tuple of the predicted noise, shaped like ``hidden_states``.
        """
        assert not return_dict, "this model returns a tuple"
        dtype, patch = self.proj_out.weight.dtype, self.config.patch_size
        batch, _, frames, height, width = hidden_states.shape
        grid = (frames, height // patch, width // patch)
        if attention_mask is not None:
            attention_mask = self._bias(attention_mask)
        if encoder_attention_mask is not None:
            encoder_attention_mask = (1 - encoder_attention_mask.to(dtype)) * HIDDEN

        x = self.pos_embed(hidden_states.to(dtype))
        modulation, embedded = self.adaln_single(timestep.expand(batch), dtype)
        text = self.caption_projection(encoder_hidden_states.squeeze(1))
        for block in self.transformer_blocks:
            x = block(x, attention_mask, text, encoder_attention_mask, modulation, grid)

        shift, scale = (self.scale_shift_table + embedded[:, None]).chunk(2, dim=1)
        x = self.proj_out(self.norm_out(x) * (1 + scale) + shift)
        x = x.reshape(batch, *grid, patch, patch, -1).permute(0, 6, 1, 2, 4, 3, 5)
        return (x.reshape(batch, -1, frames, height, width),)

    def _bias(self, mask: Tensor) -> Tensor:
        """Latent pixels kept, as an additive bias over tokens ``[batch, 1, tokens]``."""
        dtype, size = self.proj_out.weight.dtype, self.config.patch_size
        kept = F.max_pool3d(mask.to(dtype).unsqueeze(1), (1, size, size))
        return (1 - kept.flatten(2).bool().to(dtype)) * HIDDEN


class PatchEmbed(nn.Module):
    """A 2D convolution per frame; tokens are frame-major."""

    def __init__(self, config: OpenSoraConfig) -> None:
        super().__init__()
        size = config.patch_size
        self.proj = nn.Conv2d(config.in_channels, config.width, size, stride=size)

    def forward(self, latents: Tensor) -> Tensor:
        batch = latents.shape[0]
        frames = self.proj(latents.transpose(1, 2).flatten(0, 1))  # [batch * frames, c, h, w]
        return frames.flatten(2).transpose(1, 2).unflatten(0, (batch, -1)).flatten(1, 2)


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward, the first and the last modulated."""

    def __init__(self, config: OpenSoraConfig) -> None:
        super().__init__()
        width = config.width
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn1 = Attention(config, rotary=True)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn2 = Attention(config, rotary=False)
        self.ff = FeedForward(width)
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / math.sqrt(width))

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        text: Tensor,
        text_mask: Tensor | None,
        modulation: Tensor,
        grid: tuple[int, int, int],
    ) -> Tensor:
        table = self.scale_shift_table + modulation.unflatten(1, (6, -1))
        shift, scale, gate, shift_ff, scale_ff, gate_ff = table.chunk(6, dim=1)
        x = x + gate * self.attn1(self.norm1(x) * (1 + scale) + shift, mask=mask, grid=grid)
        x = x + self.attn2(x, context=text, mask=text_mask)
        return x + gate_ff * self.ff(self.norm2(x) * (1 + scale_ff) + shift_ff)


class Attention(nn.Module):
    """Self-attention over video with rotary positions, or cross-attention to text without."""

    def __init__(self, config: OpenSoraConfig, rotary: bool) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.rotary_scales = config.interpolation_scale if rotary else None
        self.to_q, self.to_k, self.to_v = (nn.Linear(config.width, config.width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(config.width, config.width), nn.Dropout(0.0)])

    def forward(
        self,
        hidden_states: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        grid: tuple[int, int, int] | None = None,
    ) -> Tensor:
        context = hidden_states if context is None else context
        q, k, v = self.to_q(hidden_states), self.to_k(context), self.to_v(context)
        q, k, v = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        if self.rotary_scales is not None:
            assert grid is not None
            turns = rotary_turns(grid, self.rotary_scales, q.shape[-1] // 3, q.device, q.dtype)
            q, k = rotate(q, turns), rotate(k, turns)
        if mask is not None:
            mask = mask[:, None].expand(-1, self.heads, -1, -1)  # [batch, heads, 1, keys]
        # The branch on data: a mask that hides nothing is dropped, so fused kernels can be used.
        if mask is None or not torch.any(mask.bool()):
            mask = None
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out = self.to_out[0](out.transpose(1, 2).flatten(2))
        return self.to_out[1](out)


def rotary_turns(
    grid: tuple[int, int, int],
    scales: tuple[float, float, float],
    size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[tuple[Tensor, Tensor], ...]:
    """Cosine and sine per axis, each ``[tokens, size]``, for tokens in frame-major order."""
    slowness = 10000.0 ** (torch.arange(0, size, 2, device=device).float() / size)
    frames, height, width = grid
    turns = []
    for axis, (length, scale) in enumerate(zip(grid, scales, strict=True)):
        positions = torch.arange(length, device=device).float() / scale
        # Rounded before the cosine, as the model was trained.
        angles = (positions[:, None] * (1.0 / slowness)).to(dtype)
        shape = [1, 1, 1, -1]
        shape[axis] = length
        angles = angles.reshape(shape).expand(frames, height, width, -1).flatten(0, 2)
        angles = torch.cat([angles, angles], dim=-1)
        turns.append((angles.cos(), angles.sin()))
    return tuple(turns)


def rotate(x: Tensor, turns: tuple[tuple[Tensor, Tensor], ...]) -> Tensor:
    """Turn the thirds of ``x`` ``[batch, heads, tokens, head_dim]`` by time, row and column."""
    turned = []
    for part, (cos, sin) in zip(x.chunk(3, dim=-1), turns, strict=True):
        first, second = part.chunk(2, dim=-1)
        turned.append(part * cos + torch.cat([-second, first], dim=-1) * sin)
    return torch.cat(turned, dim=-1)


class FeedForward(nn.Module):
    """Linear, GELU (tanh), linear; the odd names are those of the checkpoint."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([Gelu(width), nn.Dropout(0.0), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
        return x


class Gelu(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class CaptionProjection(nn.Module):
    """Text features to the width of the model."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(channels, width), nn.Linear(width, width)

    def forward(self, text: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(text), approximate="tanh"))


class AdaLayerNormSingle(nn.Module):
    """The modulation all blocks share, from the timestep."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.emb = nn.ModuleDict({"timestep_embedder": TimestepEmbedder(width)})
        self.linear = nn.Linear(width, 6 * width)

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        embedded = self.emb["timestep_embedder"](timestep, dtype)
        return self.linear(F.silu(embedded)), embedded


class TimestepEmbedder(nn.Module):
    CHANNELS = 256

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(self.CHANNELS, width), nn.Linear(width, width)

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        half = self.CHANNELS // 2
        steps = torch.arange(half, device=timestep.device, dtype=torch.float32)
        angles = timestep[:, None].float() * torch.exp(-math.log(10000.0) * steps / half)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)
        return self.linear_2(F.silu(self.linear_1(waves)))


def open_sora_call(
    config: OpenSoraConfig,
    grid: tuple[int, int, int],
    *,
    text: int = 512,
    batch: int = 1,
    mask: str | None = "ones",
    **where: Any,
) -> dict[str, Any]:
    """Random forward arguments, as the public pipeline makes them.

    Args:
        config: of the model.
        grid: frames, height and width in tokens.
        text: text tokens; the last quarter is padding.
        batch: batch size.
        mask: "ones" (the public pipeline), "padded" (the last rows of pixels are padding), or None.
        where: ``device`` and ``dtype`` of the tensors.
    """
    frames, height, width = grid[0], grid[1] * config.patch_size, grid[2] * config.patch_size
    kept = torch.ones(batch, frames, height, width, **where)
    if mask == "padded":
        kept[:, :, -config.patch_size :] = 0
    text_kept = torch.ones(batch, 1, text, **where)
    text_kept[..., text - text // 4 :] = 0
    return {
        "hidden_states": torch.randn(batch, config.in_channels, frames, height, width, **where),
        "timestep": torch.full((batch,), 300, device=where.get("device")),
        "encoder_hidden_states": torch.randn(batch, 1, text, config.caption_channels, **where),
        "attention_mask": None if mask is None else kept,
        "encoder_attention_mask": text_kept,
    }
