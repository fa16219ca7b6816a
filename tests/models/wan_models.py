"""Wan and the models built on it: video tokens only, or behind a history of other latents."""

from typing import Any

import torch

from tests.models.case import Case, Shape, latents, layers, merged, patches, timestep, tokens

SELF = layers("blocks.{}.attn1")
IMAGE_MODEL_TEXT = 512  # WanAttnProcessor takes what exceeds 512 tokens to be the image


def wan(shape: Shape) -> dict[str, Any]:
    return {
        "patch_size": (1, 2, 2),
        "num_attention_heads": shape.heads,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 32,
        "ffn_dim": 32,
        "num_layers": shape.layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 32,
    }


def call_wan(shape: Shape) -> dict[str, Any]:
    return {
        "hidden_states": latents(shape, 4),
        "timestep": timestep(shape),
        "encoder_hidden_states": tokens(shape, shape.text, 16),
    }


def wan_i2v(shape: Shape) -> dict[str, Any]:
    return merged(wan(shape), image_dim=8, added_kv_proj_dim=12 * shape.heads)


def call_wan_i2v(shape: Shape) -> dict[str, Any]:
    return merged(
        call_wan(shape),
        encoder_hidden_states=tokens(shape, IMAGE_MODEL_TEXT, 16),
        encoder_hidden_states_image=tokens(shape, shape.text, 8),
    )


def wan_vace(shape: Shape) -> dict[str, Any]:
    control = list(range(shape.layers))
    return merged(wan(shape), vace_layers=control, vace_in_channels=12)


def call_wan_vace(shape: Shape) -> dict[str, Any]:
    return merged(call_wan(shape), control_hidden_states=latents(shape, 12))


def wan_animate(shape: Shape) -> dict[str, Any]:
    return merged(
        wan(shape),
        in_channels=12,
        latent_channels=4,
        image_dim=16,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=shape.layers,  # one face adapter
    )


def call_wan_animate(shape: Shape) -> dict[str, Any]:
    posed = shape.grid.frames - 1
    return merged(
        call_wan(shape),
        hidden_states=latents(shape, 12),
        encoder_hidden_states_image=tokens(shape, 5, 16),
        pose_hidden_states=latents(shape, 4)[:, :, 1:],
        face_pixel_values=torch.randn(shape.batch, 3, 4 * posed - 3, 16, 16),
    )


def wan_animate2(shape: Shape) -> dict[str, Any]:
    return {
        "patch_size": (1, 2, 2),
        "text_len": 16,
        "in_dim": 36,
        "dim": 24 * shape.heads,
        "ffn_dim": 32,
        "freq_dim": 32,
        "text_dim": 16,
        "out_dim": 16,
        "num_heads": shape.heads,
        "num_layers": shape.layers,
        "cross_attn_norm": True,
        "use_img_emb": False,
    }


def call_wan_animate2(shape: Shape) -> dict[str, Any]:
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    grid = shape.grid
    return {
        "hidden_states": list(latents(shape, 16)),
        "timestep": torch.ones(shape.batch),
        "encoder_hidden_states": list(tokens(shape, shape.text, 16)),
        "condition_latents": list(latents(shape, 20)),
        "kv_cache": WanAnimate2KVCache(shape.layers),
        "kv_cache_mode": "extract",
        "seq_len": grid.tokens,
        "offset_grid_sizes": torch.tensor([[grid.frames, grid.height, grid.width]]),
    }


def chronoedit(shape: Shape) -> dict[str, Any]:
    return merged(wan(shape), rope_temporal_skip_len=8)


def anyflow(shape: Shape) -> dict[str, Any]:
    config = merged(wan(shape), gate_value=0.25, deltatime_type="r")
    del config["qk_norm"]
    return config


def call_anyflow(shape: Shape) -> dict[str, Any]:
    frames = shape.grid.frames
    return merged(
        call_wan(shape),
        hidden_states=latents(shape, 4).transpose(1, 2),
        timestep=torch.full((shape.batch, frames), 500.0),
        r_timestep=torch.full((shape.batch, frames), 250.0),
    )


def anyflow_far(shape: Shape) -> dict[str, Any]:
    return merged(anyflow(shape), compressed_patch_size=(1, 4, 4), full_chunk_limit=3)


def call_anyflow_far(shape: Shape) -> dict[str, Any]:
    return merged(call_anyflow(shape), chunk_partition=[2, shape.grid.frames - 2])


def helios(shape: Shape) -> dict[str, Any]:
    config = merged(
        wan(shape),
        rope_dim=(4, 4, 4),
        has_multi_term_memory_patch=True,
        guidance_cross_attn=True,
        zero_history_timestep=True,
        is_amplify_history=False,
    )
    del config["rope_max_seq_len"]
    return config


HISTORY = (("long", 4, (4, 8, 8)), ("mid", 2, (2, 4, 4)), ("short", 1, (1, 2, 2)))


def call_helios(shape: Shape) -> dict[str, Any]:
    call = merged(call_wan(shape), indices_hidden_states=frame_numbers(shape, shape.grid.frames))
    for name, frames, _ in HISTORY:
        call[f"latents_history_{name}"] = latents(shape, 4)[:, :, :frames]
        call[f"indices_latents_history_{name}"] = frame_numbers(shape, frames)
    return call


def frame_numbers(shape: Shape, frames: int) -> torch.Tensor:
    return torch.arange(frames).float().expand(shape.batch, -1)


def helios_history(shape: Shape) -> int:
    return sum(history(shape, frames, patch) for _, frames, patch in HISTORY)


def history(shape: Shape, frames: int, patch: tuple[int, int, int]) -> int:
    """Tokens of that many latent frames, padded to whole patches."""
    sizes = (frames, 2 * shape.grid.height, 2 * shape.grid.width)
    count = 1
    for size, step in zip(sizes, patch, strict=True):
        count *= -(-size // step)
    return count


TIMES_FIRST = patches(1, 2, 2, dims=(1, 3, 4))

WAN_CASES = (
    Case("wan", "WanTransformer3DModel", wan, call_wan, SELF, patches(1, 2, 2)),
    Case("wan_i2v", "WanTransformer3DModel", wan_i2v, call_wan_i2v, SELF, patches(1, 2, 2)),
    Case(
        "wan_vace",
        "WanVACETransformer3DModel",
        wan_vace,
        call_wan_vace,
        layers("vace_blocks.{}.attn1", "blocks.{}.attn1"),
        patches(1, 2, 2),
    ),
    Case(
        "wan_animate",
        "WanAnimateTransformer3DModel",
        wan_animate,
        call_wan_animate,
        SELF,
        patches(1, 2, 2),
    ),
    Case(
        "wan_animate2",
        "WanAnimate2Transformer3DModel",
        wan_animate2,
        call_wan_animate2,
        refused="expected a 5-D video latent",
        fullgraph=False,
    ),
    Case("skyreels", "SkyReelsV2Transformer3DModel", wan, call_wan, SELF, patches(1, 2, 2)),
    Case(
        "chronoedit", "ChronoEditTransformer3DModel", chronoedit, call_wan, SELF, patches(1, 2, 2)
    ),
    Case("anyflow", "AnyFlowTransformer3DModel", anyflow, call_anyflow, SELF, TIMES_FIRST),
    Case(
        "anyflow_far",
        "AnyFlowFARTransformer3DModel",
        anyflow_far,
        call_anyflow_far,
        refused="flex_attention with a block mask",
    ),
    Case(
        "helios",
        "HeliosTransformer3DModel",
        helios,
        call_helios,
        SELF,
        patches(1, 2, 2),
        prefix=helios_history,
        tokens="history at three patch sizes before the video",
    ),
    Case("helios_nohist", "HeliosTransformer3DModel", helios, call_wan, SELF, patches(1, 2, 2)),
)
