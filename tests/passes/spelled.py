"""Attention written in many ways; Dynamo's graphs of it."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from evdit_opt.passes.graph import copy_graph

BATCH, HEADS, SEQ, DIM = 2, 3, 10, 8
SCALE = 0.3


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v ``[batch, heads, seq, dim]``"""
    torch.manual_seed(0)
    q, k, v = (torch.randn(BATCH, HEADS, SEQ, DIM).to(dtype) for _ in range(3))
    return q, k, v


def padding() -> Tensor:
    """True where a key is none, ``[batch, 1, 1, seq]``."""
    hidden = torch.zeros(BATCH, 1, 1, SEQ, dtype=torch.bool)
    hidden[0, ..., 7:] = hidden[1, ..., 9:] = True
    return hidden


def graph_of(way: Callable[..., Any], dtype: torch.dtype = torch.float32) -> fx.GraphModule:
    """The graph of one way, for the caller to edit."""
    return copy_graph(_traced(way, dtype))


@functools.cache
def _traced(way: Callable[..., Any], dtype: torch.dtype) -> fx.GraphModule:
    return dynamo_graph(way, *inputs(dtype))


def dynamo_graph(fn: Callable[..., Any], *arguments: Any) -> fx.GraphModule:
    """A copy of the graph that Dynamo makes of one call."""
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, _inputs: Any) -> Callable[..., Any]:
        graphs.append(copy_graph(gm))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(fn, backend=backend, fullgraph=True)(*arguments)
    (gm,) = graphs
    return gm


def run(gm: fx.GraphModule, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Run such a graph; Dynamo orders inputs as they are first used."""
    named = {"l_q_": q, "l_k_": k, "l_v_": v}
    (out,) = gm(*(named[node.name] for node in gm.graph.find_nodes(op="placeholder")))
    return out


def matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(torch.matmul(q, k.transpose(-2, -1)) / DIM**0.5, dim=-1) @ v


def scaled_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q * SCALE) @ k.transpose(-1, -2)).softmax(-1) @ v


def scaled_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores = scores.mul_(SCALE)
    return F.softmax(scores, dim=-1).matmul(v)


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("b h i d, b h j d -> b h i j", q, k) * SCALE
    return torch.einsum("bhij,bhjd->bhid", F.softmax(scores, -1), v)


def sequence_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[batch, seq, heads, dim], as flash attention and xformers have it."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    weights = torch.einsum("bihd,bjhd->bhij", q * SCALE, k).softmax(dim=-1)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def keys_in_the_middle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhid,bhjd->bijh", q, k)
    scores = scores.masked_fill(padding().permute(0, 2, 3, 1), float("-inf"))
    return torch.einsum("bhjd,bijh->bhid", v, scores.softmax(2))


def heads_in_the_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)) * SCALE, -1), v)


def fused_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.reshape(-1, SEQ, DIM) for x in (q, k, v))
    empty = torch.empty(len(q), SEQ, SEQ, dtype=q.dtype)
    scores = torch.baddbmm(empty, q, k.transpose(1, 2), beta=0, alpha=SCALE)
    return torch.bmm(scores.softmax(-1), v)


def mask_with_heads_split(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads are merged for the products, split for the mask."""
    q, k, v = (x.reshape(-1, SEQ, DIM) for x in (q, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)).view(BATCH, HEADS, SEQ, SEQ)
    bias = torch.zeros(BATCH, 1, 1, SEQ, dtype=q.dtype).masked_fill(padding(), -1e9)
    scores = scores + bias
    weights = scores.view(BATCH * HEADS, SEQ, SEQ).softmax(-1)
    return torch.bmm(F.dropout(weights, 0.1, training=False), v)


def added_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = torch.linspace(-1, 1, SEQ, dtype=q.dtype)
    return ((q @ k.mT + bias) * SCALE).softmax(-1) @ v


def masked_by_infinity(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.mT).masked_fill(padding(), float("-inf"))
    weights = torch.softmax(scores, -1, dtype=torch.float32)
    return F.dropout(weights.type_as(v), 0.0, training=True) @ v


def masked_by_a_number(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.where(~padding(), q @ k.mT, -1e9)
    return scores.softmax(-1).nan_to_num() @ v


def masked_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = padding()
    scores = (q @ k.mT).masked_fill(hidden, float("-inf"))
    scores = scores + torch.linspace(-1, 1, SEQ, dtype=q.dtype)
    return scores.softmax(-1).masked_fill(hidden, 0.0) @ v


def in_several_steps(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    powers = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (powers / powers.sum(-1, keepdim=True)) @ v


def upcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q.float() @ k.float().transpose(-2, -1) * SCALE
    return scores.softmax(-1).to(v.dtype) @ v


def average_nobody_reads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1)
    weights.mean(1)
    return weights @ v


def one_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q[:, 0] @ k[:, 0].mT).softmax(-1) @ v[:, 0]


WAYS: tuple[Callable[[Tensor, Tensor, Tensor], Tensor], ...] = (
    matmul,
    scaled_queries,
    scaled_in_place,
    einsum,
    sequence_first,
    keys_in_the_middle,
    heads_in_the_batch,
    fused_product,
    mask_with_heads_split,
    added_mask,
    masked_by_infinity,
    masked_by_a_number,
    masked_twice,
    in_several_steps,
    upcast,
    average_nobody_reads,
    one_head,
)
