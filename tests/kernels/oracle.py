"""Tile attention written from its definition, sharing no code with the package, and its inputs."""

import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from evdit_opt.grid import TokenLayout, VideoGrid
from evdit_opt.masks import Rule, TileMask

HEAD_DIMS = (16, 24, 32, 64, 72, 80, 96, 128)
KINDS = ("contiguous", "transposed", "packed")


def oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: TileMask,
    layout: TokenLayout,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Token by token: the frame of each token decides its bias; then a softmax, in ``dtype``."""
    frame_of = []
    for token in range(layout.seq_len):
        video = token - layout.prefix
        inside = 0 <= video < layout.grid.frames * layout.grid.tokens_per_frame
        frame_of.append(video // layout.grid.tokens_per_frame if inside else -1)
    frame = torch.tensor(frame_of)
    table = torch.zeros(mask.frames + 1, mask.frames + 1, dtype=torch.float64)
    table[:-1, :-1] = torch.tensor(mask.rows, dtype=torch.float64)
    bias = table[frame][:, frame].to(dtype)  # -1 indexes the extra row and column of zeros
    groups = q.shape[1] // k.shape[1]
    keys = torch.stack([k[:, head // groups] for head in range(q.shape[1])], 1).to(dtype)
    values = torch.stack([v[:, head // groups] for head in range(q.shape[1])], 1).to(dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = torch.einsum("bhqd,bhkd->bhqk", q.to(dtype), keys) * scale + bias
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        logits = logits + attn_mask.to(dtype)
    lse = torch.logsumexp(logits.double(), -1)
    # Autograd of a softmax over no key is NaN; such a query gives 0, and has no gradient.
    empty = lse.isneginf().unsqueeze(-1)
    logits = logits.masked_fill(empty, 0.0)
    total = torch.logsumexp(logits.double(), -1, keepdim=True)
    weights = (logits - total.to(dtype)).exp().masked_fill(empty, 0.0)
    return torch.einsum("bhqk,bhkd->bhqd", weights, values), lse


@dataclass(frozen=True, kw_only=True)
class Case:
    """One drawn call; ``tensors()`` makes its inputs."""

    mask: TileMask
    layout: TokenLayout
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    kind: str
    padding: str
    scale: float | None
    seed: int

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q, k, v in the case's strides, and its attn_mask."""
        torch.manual_seed(self.seed)
        heads = (self.heads, self.kv_heads, self.kv_heads)
        q, k, v = strided(self.kind, self.batch, self.layout.seq_len, heads, self.head_dim)
        shape = [(1, 1), (self.batch, 1), (self.batch, self.heads)][self.seed % 3]
        attn_mask = None
        if self.padding != "none":
            attn_mask = torch.rand(*shape, 1, self.layout.seq_len) < 0.6
        if self.padding == "float":
            attn_mask = torch.randn(*shape, 1, self.layout.seq_len)
        return *(x.to(self.dtype) for x in (q, k, v)), attn_mask


def strided(
    kind: str, batch: int, seq: int, heads: tuple[int, int, int], head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v ``[batch, heads, seq, head_dim]`` in the strides that models produce."""
    if kind == "contiguous":
        q, k, v = (torch.randn(batch, h, seq, head_dim) for h in heads)
    elif kind == "transposed":
        q, k, v = (torch.randn(batch, seq, h, head_dim).transpose(1, 2) for h in heads)
    else:
        packed = torch.randn(batch, seq, sum(heads), head_dim)
        q, k, v = (x.transpose(1, 2) for x in packed.split(heads, dim=2))
    return q, k, v


@st.composite
def masks(draw: st.DrawFn, frames: int) -> TileMask:
    """A rule's mask, or any mask at all."""
    if draw(st.booleans()):
        weighting = draw(st.sampled_from(["none", "balanced", "fitted"]))
        rule = Rule(
            references=draw(st.integers(0, 4)),
            window=draw(st.integers(0, 2)),
            weighting=weighting,
            spacing=draw(st.sampled_from(["paper", "centred"])),
            strength=draw(st.floats(0, 2)) if weighting == "fitted" else 1.0,
        )
        return rule.mask(frames)
    tile = st.sampled_from([-math.inf, -math.inf, 0.0, 0.0, 0.5, 1.25])
    rows = draw(st.lists(st.lists(tile, min_size=frames, max_size=frames),
                         min_size=frames, max_size=frames))  # fmt: skip
    for row in rows:
        if all(value == -math.inf for value in row):
            row[draw(st.integers(0, frames - 1))] = 0.0
    return TileMask(tuple(map(tuple, rows)))


@st.composite
def cases(
    draw: st.DrawFn,
    dtypes: tuple[torch.dtype, ...],
    max_frames: int = 9,
    max_tokens: int = 2400,
    head_dims: tuple[int, ...] = HEAD_DIMS,
) -> Case:
    """Any call the op supports, of at most about ``max_tokens`` video tokens."""
    frames = draw(st.integers(1, max_frames))
    tokens = draw(st.sampled_from([1, 2, 3, 7, 13, 30, 63, 67, 100, 131, 257, 300]))
    tokens = min(tokens, max(1, max_tokens // frames))
    kv_heads = draw(st.integers(1, 2))
    return Case(
        mask=draw(masks(frames)),
        layout=TokenLayout(
            VideoGrid(frames, tokens, 1),
            prefix=draw(st.sampled_from([0, 0, 1, 77])),
            suffix=draw(st.sampled_from([0, 0, 5, 33])),
        ),
        batch=draw(st.integers(1, 2)),
        heads=kv_heads * draw(st.integers(1, 2)),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from(head_dims)),
        dtype=draw(st.sampled_from(dtypes)),
        kind=draw(st.sampled_from(KINDS)),
        padding=draw(st.sampled_from(["none", "none", "bool", "float"])),
        scale=draw(st.sampled_from([None, None, 0.3])),
        seed=draw(st.integers(0, 1000)),
    )
