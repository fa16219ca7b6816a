"""Attention as people write it without diffusers; each fits ``ToyDiT(attention=...)``."""

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

HEADS = 2


class Spelled(nn.Module, ABC):
    """Projections of its own, products and softmax in its own way.

    ``bias`` is for the reference run of a test: what to add to the scores.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.bias: Tensor | None = None
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.dropout = nn.Dropout(0.1)  # inactive unless somebody trains

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        return self.out(self.attend(self.q(x), self.k(context), self.v(context)))

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention as this flavour spells it; all ``[batch, seq, dim]``."""

    def biased(self, scores: Tensor) -> Tensor:
        return scores if self.bias is None else scores + self.bias


class Einsum(Spelled):
    """[batch, seq, heads, dim] throughout, rotary positions in between."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(2, (HEADS, -1)) for x in (q, k, v))
        if q.shape == k.shape:
            q, k = rotate(q), rotate(k)
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
        weights = self.dropout(self.biased(scores).softmax(dim=-1))
        return torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2)


class Matmul(Spelled):
    """[batch, heads, seq, dim], scores in float32, all keys shown by an additive mask."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(2, (HEADS, -1)).transpose(1, 2) for x in (q, k, v))
        scores = torch.matmul(q, k.transpose(-2, -1)) * q.shape[-1] ** -0.5
        scores = scores + torch.zeros(k.shape[0], 1, 1, k.shape[2], dtype=q.dtype)
        weights = F.softmax(self.biased(scores).float(), dim=-1).type_as(q)
        return torch.matmul(self.dropout(weights), v).transpose(1, 2).flatten(2)


class HeadsInTheBatch(Spelled):
    """Heads folded into the batch, as diffusers did it before SDPA."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (self.fold(x) for x in (q, k, v))
        empty = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype)
        scale = q.shape[-1] ** -0.5
        scores = torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=scale)
        out = torch.bmm(self.biased(scores).softmax(dim=-1), v)
        return out.reshape(-1, HEADS, *out.shape[1:]).transpose(1, 2).flatten(2)

    @staticmethod
    def fold(x: Tensor) -> Tensor:
        return x.unflatten(2, (HEADS, -1)).transpose(1, 2).flatten(0, 1)


class FlashLayout(Spelled):
    """einops, and a function that takes [batch, seq, heads, dim], as xformers does."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (rearrange(x, "b s (h d) -> b s h d", h=HEADS) for x in (q, k, v))
        out = memory_efficient_attention(q, k, v, self.bias)
        return rearrange(out, "b s h d -> b s (h d)")


class NormalisedApart(Spelled):
    """Every projection normalises its input itself, the same way."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = self.q(normalise(x)), self.k(normalise(context)), self.v(normalise(context))
        return self.out(self.attend(q, k, v))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(2, (HEADS, -1)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, self.bias).transpose(1, 2).flatten(2)


class PackedModule(nn.Module):
    """``nn.MultiheadAttention``, which returns weights that nobody reads."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.bias: Tensor | None = None
        self.attention = nn.MultiheadAttention(dim, HEADS, batch_first=True)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        return self.attention(x, context, context, attn_mask=self.bias)[0]


class LooksAtModuleWeights(PackedModule):
    """The same, and somebody reads them."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        out, weights = self.attention(x, context, context)
        return out + weights.amax(-1, keepdim=True)


class BareModule(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` itself in the block, handed its input three times."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, HEADS, batch_first=True)
        self.bias: Tensor | None = None

    def forward(self, query: Tensor, key: Tensor | None = None, **_: object) -> Tensor:  # type: ignore[override]
        key = query if key is None else key
        return super().forward(query, key, key, need_weights=False, attn_mask=self.bias)[0]


class Functional(nn.Module):
    """``F.multi_head_attention_forward`` with weights of its own, [seq, batch, channels]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.bias: Tensor | None = None
        self.weight = nn.Parameter(torch.randn(3 * dim, dim) / dim**0.5)
        self.offset = nn.Parameter(torch.randn(3 * dim) / dim**0.5)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        attended, _ = F.multi_head_attention_forward(
            x.transpose(0, 1),
            context.transpose(0, 1),
            context.transpose(0, 1),
            x.shape[2],
            HEADS,
            self.weight,
            self.offset,
            None,
            None,
            False,
            0.0,
            self.out.weight,
            self.out.bias,
            training=self.training,
            attn_mask=self.bias,
        )
        return attended.transpose(0, 1)


class LooksAtWeights(Spelled):
    """Uses its attention weights once more, so no operator can keep them to itself."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(2, (HEADS, -1)).transpose(1, 2) for x in (q, k, v))
        weights = (q @ k.mT).softmax(-1)
        return (weights @ v + weights.amax(-1, keepdim=True)).transpose(1, 2).flatten(2)


class Causal(Spelled):
    """Nobody sees the future."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(2, (HEADS, -1)).transpose(1, 2) for x in (q, k, v))
        future = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
        scores = (q @ k.mT).masked_fill(future, float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class OneProjection(nn.Module):
    """q, k and v from one einsum with a packed weight, as ports from JAX have it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.bias: Tensor | None = None
        self.weight = nn.Parameter(torch.randn(3, dim, HEADS, dim // HEADS) / dim**0.5)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (
            torch.einsum("bsc,chd->bhsd", source, weight)
            for source, weight in zip((x, context, context), self.weight.unbind(), strict=True)
        )
        scores = torch.einsum("bhid,bhjd->bhij", q * q.shape[-1] ** -0.5, k)
        scores = scores if self.bias is None else scores + self.bias
        return torch.einsum("bhij,bhjd->bihd", scores.softmax(-1), v).flatten(2)


def normalise(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def rotate(x: Tensor) -> Tensor:
    """Rotary positions, ``[batch, seq, heads, dim]``."""
    angles = torch.arange(x.shape[1])[:, None] * torch.arange(1, x.shape[3] // 2 + 1)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


def memory_efficient_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None
) -> Tensor:
    q, k, v = (x.permute(0, 2, 1, 3) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, bias).permute(0, 2, 1, 3)


FLAVOURS = (
    Einsum,
    Matmul,
    HeadsInTheBatch,
    FlashLayout,
    NormalisedApart,
    PackedModule,
    BareModule,
    Functional,
    OneProjection,
)
