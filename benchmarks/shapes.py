"""The attention of real video models, as shapes, and the masks that are tried on them."""

from dataclasses import dataclass

from evdit_opt.grid import TokenLayout, VideoGrid
from evdit_opt.masks import Rule, TileMask

__all__ = ["MODELS", "SMALL", "TINY", "Shape"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """One self-attention over a video, and the rules that are measured on it.

    Attributes:
        name: model, length and resolution.
        frames: latent frames.
        tokens: tokens of one frame.
        heads: attention heads.
        head_dim: width of a head.
        rules: in the order of their importance.
        prefix: text tokens before the video.
        suffix: text tokens after the video.
    """

    name: str
    frames: int
    tokens: int
    heads: int
    head_dim: int
    rules: tuple[Rule, ...]
    prefix: int = 0
    suffix: int = 0

    @property
    def layout(self) -> TokenLayout:
        """Where frames and text lie."""
        return TokenLayout(
            VideoGrid(self.frames, self.tokens, 1), prefix=self.prefix, suffix=self.suffix
        )

    def masks(self) -> dict[str, TileMask]:
        """Name of a rule -> its mask."""
        return {rule.describe(self.frames): rule.mask(self.frames) for rule in self.rules}

    def dense_flops(self) -> float:
        """Floating-point operations of one dense forward pass: two matrix products."""
        return 4.0 * self.heads * self.head_dim * self.layout.seq_len**2


USUAL = (Rule(2), Rule(1), Rule(4), Rule(0, window=1), Rule(2, weighting="balanced"))

# The order is that in which a suite with little time measures them. The rules without window on
# Open-Sora-Plan are the nine masks of Efficient-vDiT's Table 1 (arXiv 2502.06155).
MODELS = (
    Shape(
        name="Open-Sora-Plan-1.2 93 frames 720p", frames=24, tokens=3600, heads=24, head_dim=96,
        rules=(Rule(3), Rule(4), Rule(6), Rule(8), Rule(12), Rule(1, window=1),
               Rule(3, weighting="balanced")),
    ),
    Shape(
        name="Open-Sora-Plan-1.2 29 frames 720p", frames=8, tokens=3600, heads=24, head_dim=96,
        rules=(Rule(2), Rule(1), Rule(3), Rule(4), Rule(0, window=1)),
    ),
    Shape(
        name="Wan2.1-1.3B 480p", frames=21, tokens=1560, heads=12, head_dim=128, rules=USUAL,
    ),
    Shape(
        name="HunyuanVideo 720p", frames=33, tokens=3600, heads=24, head_dim=128, suffix=256,
        rules=USUAL,
    ),
    Shape(
        name="Wan2.1-14B 720p", frames=21, tokens=3600, heads=40, head_dim=128, rules=USUAL,
    ),
    Shape(
        name="CogVideoX-5B 480p", frames=13, tokens=1350, heads=48, head_dim=64, prefix=226,
        rules=USUAL,
    ),
)  # fmt: skip

# Where launches and copies cost as much as the arithmetic.
SMALL = tuple(
    Shape(
        name=f"small {frames} x {tokens}", frames=frames, tokens=tokens, heads=4, head_dim=64,
        rules=(Rule(1), Rule(2, weighting="balanced"), Rule(2, window=1)),
    )
    for frames, tokens in ((8, 16), (4, 64), (8, 32), (8, 64), (16, 30), (16, 60), (8, 128))
)  # fmt: skip

# To see that the scripts work, anywhere.
TINY = (
    Shape(
        name="tiny", frames=5, tokens=30, heads=2, head_dim=16, prefix=7,
        rules=(Rule(1), Rule(2, weighting="balanced")),
    ),
    Shape(name="tiny without text", frames=4, tokens=33, heads=2, head_dim=16, rules=(Rule(1),)),
)  # fmt: skip
