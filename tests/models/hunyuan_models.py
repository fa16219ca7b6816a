"""The HunyuanVideo family: text behind the video, with padding in three different ways."""

from typing import Any

import torch

from tests.models.case import (
    DOUBLE_AND_SINGLE,
    PADDING,
    Case,
    Shape,
    latents,
    layers,
    merged,
    padded,
    patches,
    text,
    timestep,
    tokens,
)
from tests.models.wan_models import history


def hunyuan(shape: Shape) -> dict[str, Any]:
    return {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": shape.heads,
        "attention_head_dim": 10,
        "num_layers": shape.layers,
        "num_single_layers": shape.layers,
        "num_refiner_layers": 1,
        "patch_size": 1,
        "patch_size_t": 1,
        "guidance_embeds": True,
        "text_embed_dim": 16,
        "pooled_projection_dim": 8,
        "rope_axes_dim": (2, 4, 4),
    }


def call_hunyuan(shape: Shape) -> dict[str, Any]:
    return {
        "hidden_states": latents(shape, 4, patch=1),
        "timestep": timestep(shape),
        "encoder_hidden_states": tokens(shape, shape.text, 16),
        "encoder_attention_mask": padded(shape, shape.text, PADDING),
        "pooled_projections": torch.randn(shape.batch, 8),
        "guidance": torch.full((shape.batch,), 6.0),
    }


def hunyuan_i2v(shape: Shape) -> dict[str, Any]:
    return merged(
        hunyuan(shape),
        in_channels=9,
        guidance_embeds=False,
        image_condition_type="latent_concat",
    )


def call_hunyuan_i2v(shape: Shape) -> dict[str, Any]:
    call = merged(call_hunyuan(shape), hidden_states=latents(shape, 9, patch=1))
    del call["guidance"]
    return call


IMAGE_TOKENS, GLYPH_TOKENS = 3, 4


def hunyuan15(shape: Shape) -> dict[str, Any]:
    return {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": shape.heads,
        "attention_head_dim": 8,
        "num_layers": shape.layers,
        "num_refiner_layers": 1,
        "mlp_ratio": 2.0,
        "patch_size": 1,
        "patch_size_t": 1,
        "text_embed_dim": 16,
        "text_embed_2_dim": 8,
        "image_embed_dim": 6,
        "rope_axes_dim": (2, 2, 4),
        "target_size": 16,
        "task_type": "t2v",
    }


def call_hunyuan15(shape: Shape) -> dict[str, Any]:
    return {
        "hidden_states": latents(shape, 4, patch=1),
        "timestep": timestep(shape).float(),
        "encoder_hidden_states": tokens(shape, shape.text, 16),
        "encoder_hidden_states_2": tokens(shape, GLYPH_TOKENS, 8),
        "encoder_attention_mask": padded(shape, shape.text, PADDING, torch.float32),
        "encoder_attention_mask_2": padded(shape, GLYPH_TOKENS, PADDING, torch.float32),
        "image_embeds": torch.zeros(shape.batch, IMAGE_TOKENS, 6),  # text to video
    }


def hunyuan15_text(shape: Shape) -> int:
    return shape.text + GLYPH_TOKENS + IMAGE_TOKENS


def framepack(shape: Shape) -> dict[str, Any]:
    return merged(
        hunyuan(shape),
        patch_size=2,
        image_condition_type=None,
        has_image_proj=True,
        image_proj_dim=16,
        has_clean_x_embedder=True,
    )


FRAMEPACK = (
    ("latents_clean", 2, (1, 2, 2)),
    ("latents_history_2x", 2, (2, 4, 4)),
    ("latents_history_4x", 4, (4, 8, 8)),
)


def call_framepack(shape: Shape) -> dict[str, Any]:
    call = merged(
        call_hunyuan(shape),
        hidden_states=latents(shape, 4),
        image_embeds=tokens(shape, IMAGE_TOKENS, 16),
        indices_latents=torch.arange(shape.grid.frames).float(),
    )
    for name, frames, _ in FRAMEPACK:
        call[name] = torch.cat([latents(shape, 4)] * 2, 2)[:, :, :frames]
        call[f"indices_{name}"] = torch.arange(frames).float()
    return call


def framepack_history(shape: Shape) -> int:
    return sum(history(shape, frames, patch) for _, frames, patch in FRAMEPACK)


def framepack_text(shape: Shape) -> int:
    # A single sample has its padding cut off, several keep it behind a mask.
    return IMAGE_TOKENS + shape.text - (PADDING if shape.batch == 1 else 0)


HUNYUAN_CASES = (
    Case(
        "hunyuan",
        "HunyuanVideoTransformer3DModel",
        hunyuan,
        call_hunyuan,
        DOUBLE_AND_SINGLE,
        patches(1, 1, 1),
        suffix=text,
        tokens="text behind the video, its padding behind a key mask",
    ),
    Case(
        "hunyuan_i2v",
        "HunyuanVideoTransformer3DModel",
        hunyuan_i2v,
        call_hunyuan_i2v,
        DOUBLE_AND_SINGLE,
        patches(1, 1, 1),
        suffix=text,
        tokens="text behind the video, its padding behind a key mask",
    ),
    Case(
        "hunyuan15",
        "HunyuanVideo15Transformer3DModel",
        hunyuan15,
        call_hunyuan15,
        layers("transformer_blocks.{}.attn"),
        patches(1, 1, 1),
        suffix=hunyuan15_text,
        fullgraph=False,
        tokens="image, glyphs and text behind the video; a mask that hides padded rows as well",
    ),
    Case(
        "framepack",
        "HunyuanVideoFramepackTransformer3DModel",
        framepack,
        call_framepack,
        DOUBLE_AND_SINGLE,
        patches(1, 2, 2),
        prefix=framepack_history,
        suffix=framepack_text,
        tokens="history at three patch sizes before the video, image and text behind it",
    ),
)
