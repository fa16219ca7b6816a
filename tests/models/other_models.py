"""Models that attend over the video alone, in other styles than Wan."""

from typing import Any

import torch

from tests.models.case import (
    ARGUMENTS,
    Case,
    Shape,
    latents,
    layers,
    merged,
    padded,
    patches,
    timestep,
    tokens,
)


def ltx(shape: Shape) -> dict[str, Any]:
    return {
        "in_channels": 8,
        "out_channels": 8,
        "num_attention_heads": shape.heads,
        "attention_head_dim": 8,
        "cross_attention_dim": 8 * shape.heads,
        "num_layers": shape.layers,
        "caption_channels": 16,
    }


def call_ltx(shape: Shape) -> dict[str, Any]:
    grid = shape.grid
    return {
        "hidden_states": tokens(shape, grid.tokens, 8),
        "timestep": timestep(shape),
        "encoder_hidden_states": tokens(shape, grid.tokens, 16),  # as many as the video has
        "encoder_attention_mask": padded(shape, grid.tokens, 3),
        "num_frames": grid.frames,
        "height": grid.height,
        "width": grid.width,
    }


def ltx2(shape: Shape) -> dict[str, Any]:
    return merged(
        ltx(shape),
        patch_size=1,
        patch_size_t=1,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=shape.heads,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=4 * shape.heads,
        qk_norm="rms_norm_across_heads",
        rope_double_precision=False,
    )


def call_ltx2(shape: Shape) -> dict[str, Any]:
    sound = shape.grid.tokens  # as many as the video has
    return merged(
        call_ltx(shape),
        timestep=torch.full((shape.batch,), 300.0),
        audio_hidden_states=tokens(shape, sound, 4),
        audio_encoder_hidden_states=tokens(shape, shape.grid.tokens, 16),
        audio_num_frames=sound,
        fps=25.0,
    )


def allegro(shape: Shape) -> dict[str, Any]:
    return {
        "num_attention_heads": shape.heads,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": shape.layers,
        "cross_attention_dim": 8 * shape.heads,
        "sample_width": 8,
        "sample_height": 6,
        "sample_frames": 6,
        "caption_channels": 24,
    }


def call_allegro(shape: Shape) -> dict[str, Any]:
    video = latents(shape, 4)
    return {
        "hidden_states": video,
        "timestep": timestep(shape),
        "encoder_hidden_states": tokens(shape, shape.text, 24)[:, None],
        "attention_mask": torch.ones_like(video[:, 0], dtype=torch.bool),
        "encoder_attention_mask": padded(shape, shape.text, 2),
    }


def cosmos(shape: Shape) -> dict[str, Any]:
    return {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": shape.heads,
        "attention_head_dim": 12,
        "num_layers": shape.layers,
        "mlp_ratio": 2,
        "text_embed_dim": 16,
        "adaln_lora_dim": 4,
        "max_size": (8, 32, 32),
        "patch_size": (1, 2, 2),
        "rope_scale": (2.0, 1.0, 1.0),
        "concat_padding_mask": False,  # its resizing needs torchvision
        "extra_pos_embed_type": "learnable",
    }


def call_cosmos(shape: Shape) -> dict[str, Any]:
    return {
        "hidden_states": latents(shape, 4),
        "timestep": timestep(shape),
        "encoder_hidden_states": tokens(shape, shape.text, 16),
        "fps": 30,
    }


def every_other(shape: Shape) -> tuple[str, ...]:
    return tuple(f"blocks.{2 * n + 1}.attn" for n in range(shape.layers))


def sana_wm(shape: Shape) -> dict[str, Any]:
    # Every other layer attends by softmax, the rest by a linear recurrence.
    return {
        "in_channels": 4,
        "num_layers": 2 * shape.layers,
        "hidden_size": 24 * shape.heads,
        "num_attention_heads": shape.heads,
        "patch_size": (1, 1, 1),
        "softmax_every_n": 2,
        "linear_head_dim": 24,
        "caption_channels": 16,
        "chunk_plucker_channels": 6,
        "mlp_ratio": 1.0,
    }


def call_sana_wm(shape: Shape) -> dict[str, Any]:
    return {
        "hidden_states": latents(shape, 4, patch=1),
        "timestep": torch.full((shape.batch, 1, shape.grid.frames), 300),
        "encoder_hidden_states": tokens(shape, shape.text, 16)[:, None],
        "mask": padded(shape, shape.text, 2),
    }


def kandinsky5(shape: Shape) -> dict[str, Any]:
    return {
        "in_visual_dim": 4,
        "in_text_dim": 16,
        "in_text_dim2": 8,
        "time_dim": 16,
        "out_visual_dim": 4,
        "patch_size": (1, 2, 2),
        "model_dim": 12 * shape.heads,
        "ff_dim": 32,
        "num_text_blocks": 1,
        "num_visual_blocks": shape.layers,
        "axes_dims": (4, 4, 4),
        "visual_cond": False,
    }


def call_kandinsky5(shape: Shape) -> dict[str, Any]:
    grid = shape.grid
    return {
        "hidden_states": latents(shape, 4).movedim(1, 4),
        "timestep": timestep(shape),
        "encoder_hidden_states": tokens(shape, shape.text, 16),
        "pooled_projections": torch.randn(shape.batch, 8),
        "visual_rope_pos": [torch.arange(size) for size in (grid.frames, grid.height, grid.width)],
        "text_rope_pos": torch.arange(shape.text),
    }


def kandinsky6(shape: Shape) -> dict[str, Any]:
    return merged(kandinsky5(shape), in_audio_dim=6, out_audio_dim=6)


def call_kandinsky6(shape: Shape) -> dict[str, Any]:
    return {
        "hidden_states": latents(shape, 4).movedim(1, 4),
        "timestep": timestep(shape),
        "encoder_hidden_states": tokens(shape, shape.grid.tokens, 16),  # as many as the video has
        "pooled_projections": torch.randn(shape.batch, 8),
        "audio_hidden_states": tokens(shape, 9, 6),
    }


def sana_wm_refiner(shape: Shape) -> dict[str, Any]:
    return ltx2(shape)


def call_sana_wm_refiner(shape: Shape) -> dict[str, Any]:
    grid = shape.grid
    angles = torch.rand(shape.batch, grid.tokens, 4 * shape.heads).repeat_interleave(2, 2)
    return {
        "hidden_states": tokens(shape, grid.tokens, 8),
        "timestep": torch.full((shape.batch, grid.tokens), 300.0),
        "encoder_hidden_states": tokens(shape, shape.text, 16),
        "video_rotary_emb": (angles.cos(), angles.sin()),
    }


LAST = patches(1, 2, 2, dims=(1, 2, 3))

OTHER_CASES = (
    Case(
        "ltx",
        "LTXVideoTransformer3DModel",
        ltx,
        call_ltx,
        layers("transformer_blocks.{}.attn1"),
        ARGUMENTS,
    ),
    Case(
        "ltx2",
        "LTX2VideoTransformer3DModel",
        ltx2,
        call_ltx2,
        layers("transformer_blocks.{}.attn1"),
        ARGUMENTS,
    ),
    Case(
        "allegro",
        "AllegroTransformer3DModel",
        allegro,
        call_allegro,
        layers("transformer_blocks.{}.attn1"),
        patches(1, 2, 2),
    ),
    Case(
        "cosmos",
        "CosmosTransformer3DModel",
        cosmos,
        call_cosmos,
        layers("transformer_blocks.{}.attn1"),
        patches(1, 2, 2),
    ),
    Case(
        "sana_wm", "SanaWMTransformer3DModel", sana_wm, call_sana_wm, every_other, patches(1, 1, 1)
    ),
    Case(
        "kandinsky5",
        "Kandinsky5Transformer3DModel",
        kandinsky5,
        call_kandinsky5,
        layers("visual_transformer_blocks.{}.self_attention"),
        LAST,
    ),
    Case(
        "kandinsky6",
        "Kandinsky6Transformer3DModel",
        kandinsky6,
        call_kandinsky6,
        layers("visual_transformer_blocks.{}.video_dec_block.self_attention"),
        LAST,
    ),
    Case(
        "sana_wm_refiner",
        "SanaWMLTX2RefinerTransformer3DModel",
        sana_wm_refiner,
        call_sana_wm_refiner,
        layers("transformer_blocks.{}.attn1"),
    ),
)
