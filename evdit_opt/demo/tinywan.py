"""TinyWan: a real `WanPipeline` with small components, and its weights in this package.

All sizes of the model live here. 33 frames of 80 x 80 pixels become 17 x 20 x 20 latents with 8
channels (2x in time, 4x in space), and 17 x 10 x 10 = 1700 tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from evdit_opt.demo.clips import FRAMES, SIZE, VOCABULARY

if TYPE_CHECKING:
    from diffusers import (
        AutoencoderKLWan,
        FlowMatchEulerDiscreteScheduler,
        WanPipeline,
        WanTransformer3DModel,
    )
    from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

WEIGHTS = Path(__file__).parent / "tinywan"
"""The trained pipeline, in the folder layout `WanPipeline.from_pretrained` reads."""

TINYWAN_CALL: dict[str, Any] = {
    "num_frames": FRAMES,
    "height": SIZE,
    "width": SIZE,
    "max_sequence_length": 16,
    "guidance_scale": 2.0,
}
"""Keyword arguments for calling the pipeline at the size it was trained for."""

LATENT_SHAPE = (8, 17, 20, 20)
"""[channels, frames, height, width] of one clip's latents."""
SHIFT = 4.0
"""Timestep shift of the scheduler; training draws its noise levels to match."""


def load_tinywan() -> WanPipeline:
    """Load the embedded pipeline in float32 on the CPU."""
    from diffusers import WanPipeline

    if not (WEIGHTS / "model_index.json").exists():
        raise FileNotFoundError(
            f"expected TinyWan's weights in {WEIGHTS}, found none; "
            "train them with `python -m evdit_opt.demo.train all`"
        )
    pipeline = WanPipeline.from_pretrained(WEIGHTS)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the closed caption vocabulary; prompts end with </s>."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ("<pad>", "</s>", "<unk>", *VOCABULARY)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=32,
    )


def build_text_encoder() -> UMT5EncoderModel:
    """A two-layer UMT5 encoder of width 64, random weights."""
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=3 + len(VOCABULARY),
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def build_autoencoder(
    mean: tuple[float, ...] = (0.0,) * 8, std: tuple[float, ...] = (1.0,) * 8
) -> AutoencoderKLWan:
    """The causal video autoencoder, random weights; mean and std are measured after training."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=8,
        z_dim=8,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, False],
        latents_mean=list(mean),
        latents_std=list(std),
        scale_factor_temporal=2,
        scale_factor_spatial=4,
    )


def build_transformer(width: int = 96, layers: int = 6) -> WanTransformer3DModel:
    """The denoiser, random weights with a zero output projection."""
    import torch
    from diffusers import WanTransformer3DModel

    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=width // 32,
        attention_head_dim=32,
        in_channels=8,
        out_channels=8,
        text_dim=64,
        freq_dim=64,
        ffn_dim=3 * width,
        num_layers=layers,
        cross_attn_norm=True,
        rope_max_seq_len=64,
    )
    torch.nn.init.zeros_(transformer.proj_out.weight)
    torch.nn.init.zeros_(transformer.proj_out.bias)
    return transformer


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The flow-matching Euler sampler of Wan, with TinyWan's shift."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=SHIFT)
