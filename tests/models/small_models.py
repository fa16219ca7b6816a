"""Six real video transformers, tiny and random."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import nn

from evdit_opt.grid import TokenLayout, VideoGrid
from evdit_opt.masks import Rule
from evdit_opt.passes.grid_source import GridSource

GRID = VideoGrid(6, 3, 4)
TEXT = 7


@dataclass(frozen=True)
class Case:
    """A model to test.

    Attributes:
        name: for test ids.
        build: makes the model.
        call: forward kwargs for a grid (batch 1).
        sites: its 3D self-attentions.
        prefix: text tokens before the video.
        suffix: text tokens after the video.
        source: how the grid is read.
    """

    name: str
    build: Callable[[], nn.Module]
    call: Callable[[VideoGrid], dict[str, Any]]
    sites: tuple[str, ...]
    source: GridSource
    prefix: int = 0
    suffix: int = 0

    def layout(self, grid: VideoGrid = GRID) -> TokenLayout:
        return TokenLayout(grid, self.prefix, self.suffix)

    def model(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        model = self.build().eval()
        # Zero-initialised gates and output layers would hide what attention computes.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.numel() and float(parameter.abs().max()) == 0.0:
                    parameter.normal_(0, 0.2)
        return model

    def inputs(self, grid: VideoGrid = GRID, seed: int = 1) -> dict[str, Any]:
        torch.manual_seed(seed)
        return self.call(grid)


def wan(layers: int = 2) -> nn.Module:
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )


def call_wan(grid: VideoGrid) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 4, grid.frames, 2 * grid.height, 2 * grid.width),
        "timestep": torch.tensor([300]),
        "encoder_hidden_states": torch.randn(1, TEXT, 16),
        "return_dict": False,
    }


def cogvideox() -> nn.Module:
    return diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=8,
        num_layers=2,
        sample_width=8,
        sample_height=6,
        sample_frames=21,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=TEXT,
        use_rotary_positional_embeddings=False,
    )


def call_cogvideox(grid: VideoGrid) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, grid.frames, 4, 2 * grid.height, 2 * grid.width),
        "timestep": torch.tensor([300]),
        "encoder_hidden_states": torch.randn(1, TEXT, 8),
        "return_dict": False,
    }


def hunyuan() -> nn.Module:
    return diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )


def call_hunyuan(grid: VideoGrid) -> dict[str, Any]:
    mask = torch.ones(1, TEXT, dtype=torch.bool)
    mask[:, -2:] = False
    return {
        "hidden_states": torch.randn(1, 4, grid.frames, grid.height, grid.width),
        "timestep": torch.tensor([300]),
        "encoder_hidden_states": torch.randn(1, TEXT, 16),
        "encoder_attention_mask": mask,
        "pooled_projections": torch.randn(1, 8),
        "guidance": torch.tensor([6.0]),
        "return_dict": False,
    }


def ltx() -> nn.Module:
    return diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=2,
        caption_channels=16,
    )


def call_ltx(grid: VideoGrid) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, grid.tokens, 8),
        "timestep": torch.tensor([300]),
        "encoder_hidden_states": torch.randn(1, grid.tokens, 16),  # as many as the video has
        "encoder_attention_mask": torch.ones(1, grid.tokens, dtype=torch.bool),
        "num_frames": grid.frames,
        "height": grid.height,
        "width": grid.width,
        "return_dict": False,
    }


def mochi() -> nn.Module:
    return diffusers.MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=4,
        max_sequence_length=16,
    )


def call_mochi(grid: VideoGrid) -> dict[str, Any]:
    mask = torch.ones(1, TEXT + 3, dtype=torch.bool)
    mask[:, -3:] = False
    return {
        "hidden_states": torch.randn(1, 4, grid.frames, 2 * grid.height, 2 * grid.width),
        "timestep": torch.tensor([300]),
        "encoder_hidden_states": torch.randn(1, TEXT + 3, 16),
        "encoder_attention_mask": mask,
        "return_dict": False,
    }


def allegro() -> nn.Module:
    return diffusers.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=16,
        sample_width=8,
        sample_height=6,
        sample_frames=6,
        caption_channels=24,
    )


def call_allegro(grid: VideoGrid) -> dict[str, Any]:
    size = (1, grid.frames, 2 * grid.height, 2 * grid.width)
    return {
        "hidden_states": torch.randn(1, 4, *size[1:]),
        "timestep": torch.tensor([300]),
        "encoder_hidden_states": torch.randn(1, 1, TEXT, 24),
        "attention_mask": torch.ones(size, dtype=torch.bool),
        "encoder_attention_mask": torch.ones(1, TEXT, dtype=torch.bool),
        "return_dict": False,
    }


def patches(*patch: int, dims: tuple[int, int, int] = (2, 3, 4)) -> GridSource:
    time, height, width = patch
    return GridSource(kind="patch", input="hidden_states", patch=(time, height, width), dims=dims)


CASES = (
    Case("wan", wan, call_wan, ("blocks.0.attn1", "blocks.1.attn1"), patches(1, 2, 2)),
    Case(
        "cogvideox",
        cogvideox,
        call_cogvideox,
        ("transformer_blocks.0.attn1", "transformer_blocks.1.attn1"),
        patches(1, 2, 2, dims=(1, 3, 4)),
        prefix=TEXT,
    ),
    Case(
        "hunyuan",
        hunyuan,
        call_hunyuan,
        ("transformer_blocks.0.attn", "single_transformer_blocks.0.attn"),
        patches(1, 1, 1),
        suffix=TEXT,
    ),
    Case(
        "ltx",
        ltx,
        call_ltx,
        ("transformer_blocks.0.attn1", "transformer_blocks.1.attn1"),
        GridSource(kind="arguments", input="hidden_states", patch=(1, 1, 1), dims=(2, 3, 4)),
    ),
    Case(
        "mochi",
        mochi,
        call_mochi,
        ("transformer_blocks.0.attn1", "transformer_blocks.1.attn1"),
        patches(1, 2, 2),
        suffix=TEXT,
    ),
    Case(
        "allegro",
        allegro,
        call_allegro,
        ("transformer_blocks.0.attn1", "transformer_blocks.1.attn1"),
        patches(1, 2, 2),
    ),
)

RULES = (Rule(1), Rule(0, window=1))
