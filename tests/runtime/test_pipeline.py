"""A whole optimized pipeline: LoRA files, VAE tiling and slicing, dtypes, offloading."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from torch import Tensor, nn

import evdit_opt
from evdit_opt.apply import report
from evdit_opt.demo.tinywan import (
    build_autoencoder,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
)
from evdit_opt.grid import TokenLayout, VideoGrid
from evdit_opt.masks import Rule
from evdit_opt.models import config_hash
from tests.models.masked import masked_attention
from tests.models.toy_dit import make_plan
from tests.often import often
from tests.runtime.pair import APART, REORDERED, ROUNDED, WAN, far

peft = pytest.importorskip("peft")

GRID = VideoGrid(5, 4, 4)
CALL = {
    "prompt": "a red circle moves right",
    "num_frames": 9,
    "height": 32,
    "width": 32,
    "max_sequence_length": 16,
    "guidance_scale": 2.0,
    "num_inference_steps": 2,
    "output_type": "pt",
}
RULES = {"blocks.0.attn1": Rule(1)}


def pipeline() -> WanPipeline:
    torch.manual_seed(0)
    transformer = build_transformer(width=32, layers=1)
    nn.init.normal_(transformer.proj_out.weight, std=0.2)  # zero would hide what attention computes
    pipe = WanPipeline(
        tokenizer=build_tokenizer(),
        text_encoder=build_text_encoder().eval(),
        vae=build_autoencoder().eval(),
        transformer=transformer.eval(),
        scheduler=build_scheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def video(pipe: WanPipeline, **call: Any) -> Tensor:
    frames = pipe(**CALL, **call, generator=torch.Generator().manual_seed(0)).frames
    return frames.double()


def masked(pipe: WanPipeline, order: str) -> Tensor:
    with masked_attention(pipe.transformer, RULES, TokenLayout(GRID), order):
        return video(pipe)


def lora(folder: Path) -> None:
    """A LoRA file, as users download them."""
    pipe = pipeline()
    torch.manual_seed(5)
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.transformer.add_adapter(config)
    weights = peft.get_peft_model_state_dict(pipe.transformer)
    WanPipeline.save_lora_weights(folder, transformer_lora_layers=weights)


Change = Callable[[WanPipeline, Path], Any]
CHANGES: dict[str, Change] = {
    "to_bfloat16": lambda pipe, _: pipe.to(torch.bfloat16),
    "vae_tiling": lambda pipe, _: pipe.vae.enable_tiling(16, 16, 8, 8),
    "vae_slicing": lambda pipe, _: pipe.vae.enable_slicing(),
    "lora": lambda pipe, folder: pipe.load_lora_weights(folder),
    "model_cpu_offload": lambda pipe, _: pipe.enable_model_cpu_offload(device="cpu"),
    "group_offload": lambda pipe, _: pipe.enable_group_offload(
        torch.device("cpu"), offload_type="leaf_level"
    ),
}


@pytest.mark.parametrize("change", often(set(CHANGES) - {"vae_tiling", "vae_slicing"}, CHANGES))
def test_an_optimized_pipeline_after(change: Change, tmp_path: Path) -> None:
    lora(tmp_path)
    fast, plain = pipeline(), pipeline()
    transformer = fast.transformer
    plan = make_plan(transformer, dict(RULES), source=WAN.grid_source(), grid=GRID)
    plan = replace(plan, model_config_hash=config_hash(transformer))
    evdit_opt.apply_plan(fast, plan, inner="eager")
    for pipe in (fast, plain):
        change(pipe, tmp_path)

    right, *others = (masked(plain, order) for order in ("", "backwards", "rotated"))
    eps = torch.finfo(plain.transformer.dtype).eps
    bound = REORDERED * max(far(other, right) for other in others) + ROUNDED * eps * far(right)
    assert far(video(fast), right) <= bound
    assert far(video(plain), right) > APART * bound
    assert report(transformer).rewritten == tuple(RULES)
