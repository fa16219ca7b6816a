"""Models whose attention joins the video with text or sound in one sequence."""

from typing import Any

import torch

from evdit_opt.grid import TokenLayout
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


def cogvideox(shape: Shape) -> dict[str, Any]:
    return {
        "num_attention_heads": shape.heads,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 2,
        "text_embed_dim": 8,
        "num_layers": shape.layers,
        "sample_width": 8,
        "sample_height": 6,
        "sample_frames": 21,
        "patch_size": 2,
        "temporal_compression_ratio": 4,
        "max_text_seq_length": shape.text,
        "use_rotary_positional_embeddings": False,
    }


def call_cogvideox(shape: Shape) -> dict[str, Any]:
    return {
        "hidden_states": latents(shape, 4).transpose(1, 2),
        "timestep": timestep(shape),
        "encoder_hidden_states": tokens(shape, shape.text, 8),
    }


def cogvideox15(shape: Shape) -> dict[str, Any]:
    return merged(cogvideox(shape), patch_size_t=2, use_rotary_positional_embeddings=True)


def call_cogvideox15(shape: Shape) -> dict[str, Any]:
    angles = torch.rand(shape.grid.tokens, 8).repeat_interleave(2, 1)
    return merged(
        call_cogvideox(shape),
        hidden_states=latents(shape, 4).transpose(1, 2).repeat_interleave(2, 1),
        image_rotary_emb=(angles.cos(), angles.sin()),
    )


def consisid(shape: Shape) -> dict[str, Any]:
    return merged(
        cogvideox(shape),
        cross_attn_interval=1,
        is_kps=False,
        is_train_face=True,
        cross_attn_dim_head=1,
        cross_attn_num_heads=1,
        LFE_id_dim=2,
        LFE_vit_dim=2,
        LFE_depth=5,
        LFE_dim_head=8,
        LFE_num_heads=2,
        LFE_num_id_token=1,
        LFE_num_querie=1,
        LFE_output_dim=16 * shape.heads * 2 // 3,
        LFE_ff_mult=1,
        LFE_num_scale=1,
    )


def call_consisid(shape: Shape) -> dict[str, Any]:
    return merged(
        call_cogvideox(shape),
        id_vit_hidden=[tokens(shape, 2, 2)],
        id_cond=torch.randn(shape.batch, 2),
    )


def mochi(shape: Shape) -> dict[str, Any]:
    return {
        "patch_size": 2,
        "num_attention_heads": shape.heads,
        "attention_head_dim": 8,
        "num_layers": shape.layers,
        "pooled_projection_dim": 16,
        "in_channels": 4,
        "text_embed_dim": 16,
        "time_embed_dim": 4,
        "max_sequence_length": 16,
    }


def call_mochi(shape: Shape) -> dict[str, Any]:
    length = shape.text + PADDING
    return {
        "hidden_states": latents(shape, 4),
        "timestep": timestep(shape),
        "encoder_hidden_states": tokens(shape, length, 16),
        "encoder_attention_mask": padded(shape, length, PADDING),
    }


def easyanimate(shape: Shape) -> dict[str, Any]:
    return {
        "attention_head_dim": 16,
        "num_attention_heads": shape.heads,
        "in_channels": 4,
        "mmdit_layers": shape.layers,
        "num_layers": shape.layers,
        "out_channels": 4,
        "patch_size": 2,
        "sample_height": 60,
        "sample_width": 90,
        "text_embed_dim": 16,
        "time_embed_dim": 8,
        "time_position_encoding_type": "3d_rope",
        "timestep_activation_fn": "silu",
    }


def call_easyanimate(shape: Shape) -> dict[str, Any]:
    return {
        "hidden_states": latents(shape, 4),
        "timestep": timestep(shape),
        "encoder_hidden_states": tokens(shape, shape.text, 16),
    }


def motif(shape: Shape) -> dict[str, Any]:
    return {
        "in_channels": 9,
        "out_channels": 4,
        "num_attention_heads": shape.heads,
        "attention_head_dim": 12,
        "num_layers": shape.layers,
        "num_single_layers": shape.layers,
        "num_decoder_layers": 0,
        "mlp_ratio": 2.0,
        "patch_size": 1,
        "patch_size_t": 1,
        "text_embed_dim": 16,
        "rope_axes_dim": (4, 4, 4),
    }


def call_motif(shape: Shape) -> dict[str, Any]:
    return {
        "hidden_states": latents(shape, 9, patch=1),
        "timestep": timestep(shape),
        "encoder_hidden_states": tokens(shape, shape.text, 16),
    }


def motif_xattn(shape: Shape) -> dict[str, Any]:
    return merged(
        motif(shape),
        num_single_layers=shape.layers + 1,
        num_decoder_layers=1,
        enable_text_cross_attention_dual=True,
        enable_text_cross_attention_single=True,
    )


def motif_decoder(shape: Shape) -> dict[str, TokenLayout]:
    decoder = f"single_transformer_blocks.{shape.layers}.attn"
    return {decoder: TokenLayout(shape.grid, 0, shape.grid.tokens)}


def joyimage(shape: Shape) -> dict[str, Any]:
    return {
        "patch_size": [1, 2, 2],
        "in_channels": 4,
        "hidden_size": 16 * shape.heads,
        "num_attention_heads": shape.heads,
        "text_dim": 16,
        "num_layers": shape.layers,
        "rope_dim_list": [4, 6, 6],
        "theta": 256,
    }


def call_joyimage(shape: Shape) -> dict[str, Any]:
    return {
        "hidden_states": latents(shape, 4),
        "timestep": timestep(shape),
        "encoder_hidden_states": tokens(shape, shape.text, 16),
    }


def call_joyimage_plus(shape: Shape) -> dict[str, Any]:
    grid = shape.grid
    boxes = [(1, grid.height, grid.width), (grid.frames - 1, grid.height, grid.width)]
    return merged(
        call_joyimage(shape),
        hidden_states=torch.randn(shape.batch, grid.tokens, 4, 1, 2, 2),
        shape_list=[boxes] * shape.batch,
    )


def minimax_h3(shape: Shape) -> dict[str, Any]:
    return {
        "num_attention_heads": shape.heads,
        "attention_head_dim": 16,
        "hidden_size": 24,
        "num_layers": shape.layers,
        "num_refiner_layers": 1,
        "ffn_dim": 32,
        "in_channels": 4,
        "audio_in_channels": 6,
        "patch_size": (1, 2, 2),
        "text_dim": 8,
        "freq_dim": 8,
        "time_embed_hidden_dim": 24,
        "time_embed_dim": 16,
        "rope_freq_dim": 2,
    }


AUDIO_TOKENS = 5


def call_minimax_h3(shape: Shape) -> dict[str, Any]:
    grid = shape.grid
    ends = (0, shape.text, shape.text + AUDIO_TOKENS, shape.text + AUDIO_TOKENS + grid.tokens)
    rows = torch.arange(ends[3])
    places = torch.cartesian_prod(
        *(torch.arange(size) for size in (grid.frames, grid.height, grid.width))
    )
    tags = torch.tensor([1, 2, 0]).repeat_interleave(torch.tensor(ends).diff())
    return {
        "hidden_states": tokens(shape, grid.tokens, 16),
        "audio_hidden_states": tokens(shape, AUDIO_TOKENS, 6),
        "encoder_hidden_states": tokens(shape, shape.text, 8),
        "timestep": torch.tensor([0.7, 0.3]),
        "timestep_indices": (tags == 2).long(),
        "token_tags": tags,
        "position_ids": torch.cat([torch.zeros(ends[2], 3), places.float()]),
        "text_indices": rows[: ends[1]],
        "audio_indices": rows[ends[1] : ends[2]],
        "video_indices": rows[ends[2] :],
    }


TIMES_FIRST = patches(1, 2, 2, dims=(1, 3, 4))

JOINT_CASES = (
    Case(
        "cogvideox",
        "CogVideoXTransformer3DModel",
        cogvideox,
        call_cogvideox,
        layers("transformer_blocks.{}.attn1"),
        TIMES_FIRST,
        prefix=text,
        tokens="text before the video",
    ),
    Case(
        "cogvideox15",
        "CogVideoXTransformer3DModel",
        cogvideox15,
        call_cogvideox15,
        layers("transformer_blocks.{}.attn1"),
        patches(2, 2, 2, dims=(1, 3, 4)),
        prefix=text,
        tokens="text before the video, two latent frames a patch",
    ),
    Case(
        "consisid",
        "ConsisIDTransformer3DModel",
        consisid,
        call_consisid,
        layers("transformer_blocks.{}.attn1"),
        TIMES_FIRST,
        prefix=text,
        tokens="text before the video",
    ),
    Case(
        "mochi",
        "MochiTransformer3DModel",
        mochi,
        call_mochi,
        layers("transformer_blocks.{}.attn1"),
        patches(1, 2, 2),
        suffix=text,
        tokens="text behind the video, its padding cut off",
    ),
    Case(
        "easyanimate",
        "EasyAnimateTransformer3DModel",
        easyanimate,
        call_easyanimate,
        layers("transformer_blocks.{}.attn1"),
        patches(1, 2, 2),
        prefix=text,
        tokens="text before the video",
    ),
    Case(
        "motif",
        "MotifVideoTransformer3DModel",
        motif,
        call_motif,
        DOUBLE_AND_SINGLE,
        patches(1, 1, 1),
        suffix=text,
        tokens="text behind the video",
    ),
    Case(
        "motif_xattn",
        "MotifVideoTransformer3DModel",
        motif_xattn,
        call_motif,
        DOUBLE_AND_SINGLE,
        patches(1, 1, 1),
        suffix=text,
        unlike=motif_decoder,
        tokens="text behind the video; in the last layer another copy of the video",
    ),
    Case(
        "joyimage",
        "JoyImageEditTransformer3DModel",
        joyimage,
        call_joyimage,
        layers("double_blocks.{}.attn"),
        patches(1, 2, 2),
        suffix=text,
        tokens="text behind the video",
    ),
    Case(
        "joyimage_plus",
        "JoyImageEditPlusTransformer3DModel",
        joyimage,
        call_joyimage_plus,
        layers("double_blocks.{}.attn"),
        suffix=text,
        tokens="text behind the video, which is a list of patches",
    ),
    Case(
        "minimax_h3",
        "MiniMaxH3Transformer3DModel",
        minimax_h3,
        call_minimax_h3,
        layers("transformer_blocks.{}.attn"),
        prefix=lambda shape: shape.text + AUDIO_TOKENS,
        tokens="text and audio before the video, placed by index tensors",
    ),
)
