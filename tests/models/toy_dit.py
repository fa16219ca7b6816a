"""A video transformer of a few lines, quick to trace, for what does not depend on a real model."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from evdit_opt.grid import TokenLayout, VideoGrid
from evdit_opt.masks import Rule
from evdit_opt.passes.grid_source import GridSource
from evdit_opt.plan import CalibrationRecord, Plan, SiteLayout, SitePlan

GRID = VideoGrid(4, 2, 3)
TEXT = 5
SOURCE = GridSource(kind="patch", input="hidden_states", patch=(1, 2, 2), dims=(2, 3, 4))


class Attention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))

    def forward(self, hidden_states: Tensor, context: Tensor | None = None) -> Tensor:
        context = hidden_states if context is None else context
        q, k, v = (
            project(x).unflatten(2, (2, -1)).transpose(1, 2)
            for project, x in ((self.q, hidden_states), (self.k, context), (self.v, context))
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self, dim: int, attention: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.attn1, self.attn2 = attention(dim), attention(dim)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = x + self.attn1(x)
        return x + self.attn2(x, text)


class ToyDiT(nn.Module):
    """Video tokens only, with cross-attention to text. ``breaks``: Dynamo cannot trace it whole."""

    def __init__(
        self,
        layers: int = 2,
        dim: int = 16,
        breaks: bool = False,
        attention: Callable[[int], nn.Module] = Attention,
    ) -> None:
        super().__init__()
        self.breaks, self.checkpoint = breaks, False
        self.embed = nn.Conv3d(4, dim, (1, 2, 2), stride=(1, 2, 2))
        self.text = nn.Linear(8, dim)
        self.blocks = nn.ModuleList(Block(dim, attention) for _ in range(layers))

    def forward(self, hidden_states: Tensor, text: Tensor) -> Tensor:
        x = self.embed(hidden_states).flatten(2).transpose(1, 2)
        context = self.text(text)
        for block in self.blocks:
            if self.breaks:
                torch._dynamo.graph_break()
            if self.checkpoint:
                x = checkpoint(block, x, context, use_reentrant=False)
            else:
                x = block(x, context)
        return x


def toy(layers: int = 2, breaks: bool = False) -> ToyDiT:
    torch.manual_seed(0)
    return ToyDiT(layers, breaks=breaks).eval()


def toy_inputs(grid: VideoGrid = GRID, text: int = TEXT) -> dict[str, Any]:
    torch.manual_seed(1)
    latents = torch.randn(1, 4, grid.frames, 2 * grid.height, 2 * grid.width)
    return {"hidden_states": latents, "text": torch.randn(1, text, 8)}


def toy_rules(layers: int = 2) -> dict[str, Rule]:
    """A different rule in each layer."""
    rules = (Rule(1), Rule(0, window=1), Rule(2, weighting="balanced"), Rule(1, spacing="centred"))
    return {f"blocks.{n}.attn1": rules[n % 4] for n in range(layers)}


def make_plan(
    model: nn.Module,
    rules: dict[str, Rule | None],
    *,
    source: GridSource = SOURCE,
    grid: VideoGrid = GRID,
    prefix: int = 0,
    suffix: int = 0,
    layouts: Mapping[str, TokenLayout] | None = None,
    min_tokens: int = 0,
    fullgraph: bool = True,
    way: Literal["mark", "scope"] = "mark",
) -> Plan:
    """A plan that says what a test wants; nothing was calibrated."""
    usual = TokenLayout(grid, prefix, suffix)
    layouts = layouts or {}
    sites = tuple(
        SitePlan(
            name=name,
            rule=rule,
            reason="chosen by a test",
            layout=SiteLayout(
                prefix=layouts.get(name, usual).prefix, suffix=layouts.get(name, usual).suffix
            ),
            density=1.0 if rule is None else 0.5,
            way=way,
        )
        for name, rule in rules.items()
    )
    return Plan(
        model_class=type(model).__name__,
        model_config_hash="test",
        sites=sites,
        grid=grid,
        grid_source=source,
        min_tokens=min_tokens,
        fullgraph=fullgraph,
        calibration=CalibrationRecord(
            prompts_hash="test", prompt_count=1, steps=1, seed=0, threshold=0.1
        ),
    )
