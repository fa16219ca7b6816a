"""A video transformer with the shapes of Wan2.1-1.3B and no dependency but PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.shapes import Shape
from evdit_opt.masks import Rule
from evdit_opt.passes.grid_source import GridSource
from evdit_opt.plan import CalibrationRecord, Plan, SiteLayout, SitePlan

__all__ = ["VideoDiT", "latents", "plan"]


class SelfAttention(nn.Module):
    def __init__(self, heads: int, dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_q, self.norm_k = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            y.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for y in (self.norm_q(self.q(x)), self.norm_k(self.k(x)), self.v(x))
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, heads: int, dim: int) -> None:
        super().__init__()
        self.attn1 = SelfAttention(heads, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.widen, self.narrow = nn.Linear(dim, 6 * dim), nn.Linear(6 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        return x + self.narrow(F.gelu(self.widen(self.norm2(x)), approximate="tanh"))


class VideoDiT(nn.Module):
    """Patches of ``[batch, 16, frames, height, width]`` latents through ``layers`` blocks."""

    def __init__(self, heads: int, head_dim: int, layers: int) -> None:
        super().__init__()
        dim = heads * head_dim
        self.embed = nn.Conv3d(16, dim, (1, 2, 2), stride=(1, 2, 2))
        self.blocks = nn.ModuleList(Block(heads, dim) for _ in range(layers))

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = self.embed(hidden_states).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return x


def latents(shape: Shape, height: int, dtype: torch.dtype, device: str) -> Tensor:
    """Random latents whose frames have ``height`` rows of patches."""
    size = (1, 16, shape.frames, 2 * height, 2 * shape.tokens // height)
    return torch.randn(size, dtype=dtype, device=device)


def plan(model: VideoDiT, shape: Shape, height: int, rule: Rule) -> Plan:
    """One rule for every layer; nothing was calibrated."""
    density = rule.mask(shape.frames).density
    return Plan(
        model_class=type(model).__name__,
        model_config_hash="benchmark",
        sites=tuple(
            SitePlan(
                name=f"blocks.{n}.attn1", rule=rule, reason="a benchmark", density=density,
                layout=SiteLayout(prefix=0, suffix=0),
            )
            for n in range(len(model.blocks))
        ),
        grid=type(shape.layout.grid)(shape.frames, height, shape.tokens // height),
        grid_source=GridSource(
            kind="patch", input="hidden_states", patch=(1, 2, 2), dims=(2, 3, 4)
        ),
        min_tokens=0,
        fullgraph=True,
        calibration=CalibrationRecord(
            prompts_hash="none", prompt_count=1, steps=1, seed=0, threshold=0.1
        ),
    )  # fmt: skip
