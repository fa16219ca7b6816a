"""Video models without 3D self-attention that could be rewritten: each must be left alone."""

from typing import Any

import torch

from tests.models.case import Case, Shape, latents, timestep, tokens


def latte(shape: Shape) -> dict[str, Any]:
    return {
        "sample_size": 8,
        "video_length": shape.grid.frames,
        "num_layers": shape.layers,
        "patch_size": 2,
        "attention_head_dim": 4,
        "num_attention_heads": shape.heads,
        "caption_channels": 8,
        "in_channels": 4,
        "cross_attention_dim": 4 * shape.heads,
        "out_channels": 8,
        "attention_bias": True,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
    }


def call_latte(shape: Shape) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(shape.batch, 4, shape.grid.frames, 8, 8),
        "timestep": timestep(shape),
        "encoder_hidden_states": tokens(shape, shape.text, 8),
        "enable_temporal_attentions": True,
    }


def cosmos3(shape: Shape) -> dict[str, Any]:
    return {
        "head_dim": 6,
        "hidden_act": "relu2",
        "hidden_size": 12,
        "intermediate_size": 24,
        "latent_channel": 2,
        "latent_patch_size": 1,
        "num_attention_heads": 2,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": 1,
        "patch_latent_dim": 2,
        "qk_norm_for_text": False,
        "rms_norm_eps": 1e-5,
        "rope_axes_dim": [1, 1, 1],
        "rope_theta": 1e8,
        "vocab_size": 32,
    }


def call_cosmos3(shape: Shape) -> dict[str, Any]:
    grid = shape.grid
    length = shape.text + grid.tokens
    video = torch.arange(shape.text, length)
    size = (grid.frames, grid.height, grid.width)
    return {
        "input_ids": torch.arange(shape.text),
        "text_indexes": torch.arange(shape.text),
        "position_ids": torch.zeros(3, length, dtype=torch.long),
        "und_len": shape.text,
        "sequence_length": length,
        "vision_tokens": [torch.randn(1, 2, *size)],
        "vision_token_shapes": [size],
        "vision_sequence_indexes": video,
        "vision_mse_loss_indexes": video,
        "vision_timesteps": torch.ones(grid.tokens),
        "vision_noisy_frame_indexes": [torch.arange(grid.frames)],
    }


def sana_video(shape: Shape) -> dict[str, Any]:
    return {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": shape.heads,
        "attention_head_dim": 12,
        "num_layers": shape.layers,
        "num_cross_attention_heads": shape.heads,
        "cross_attention_head_dim": 12,
        "cross_attention_dim": 12 * shape.heads,
        "caption_channels": 16,
        "sample_size": 8,
        "patch_size": (1, 2, 2),
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 32,
    }


def call_sana_video(shape: Shape) -> dict[str, Any]:
    return {
        "hidden_states": latents(shape, 4),
        "timestep": timestep(shape),
        "encoder_hidden_states": tokens(shape, shape.text, 16),
    }


def kandinsky6_sr(shape: Shape) -> dict[str, Any]:
    return {
        "in_visual_dim": 4,
        "out_visual_dim": 4,
        "time_dim": 16,
        "patch_size": (1, 1, 1),
        "model_dim": 16 * shape.heads,
        "ff_dim": 32,
        "num_visual_blocks": shape.layers,
        "axes_dims": (4, 6, 6),
        "nabla_window": (3, 1, 1),
    }


def call_kandinsky6_sr(shape: Shape) -> dict[str, Any]:
    size = (shape.grid.frames, 16, 8)  # multiples of 8
    return {
        "hidden_states": torch.randn(shape.batch, *size, 9),
        "timestep": timestep(shape),
    }


LEFT_ALONE_CASES = (
    Case(
        "latte",
        "LatteTransformer3DModel",
        latte,
        call_latte,
        refused="folded into the batch",
    ),
    Case(
        "cosmos3",
        "Cosmos3OmniTransformer",
        cosmos3,
        call_cosmos3,
        refused="expected a 5-D video latent",
    ),
    Case(
        "sana_video",
        "SanaVideoTransformer3DModel",
        sana_video,
        call_sana_video,
        refused="cross-attention",
    ),
    Case(
        "kandinsky6_sr",
        "Kandinsky6SRTransformer3DModel",
        kandinsky6_sr,
        call_kandinsky6_sr,
        refused="flex_attention",
    ),
)
