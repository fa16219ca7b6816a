"""flex_attention as Dynamo writes it: taken only where it is plain attention."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from evdit_opt.passes.canonicalize_flex import canonicalize_flex
from evdit_opt.passes.graph import attention_calls, copy_graph, read_attention
from evdit_opt.passes.stand_in import settle

SEQ = 256

# Softmax by blocks and at once round differently; a key that is missing moves the output by 1e-1.
CLOSE = 1e-5


def graph_of(function: Callable[..., Tensor], kv_heads: int = 2) -> tuple[fx.GraphModule, Any]:
    torch.manual_seed(0)
    inputs = [torch.randn(1, heads, SEQ, 16) for heads in (2, kv_heads, kv_heads)]
    kept: list[tuple[fx.GraphModule, Sequence[Any]]] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        kept.append((copy_graph(gm), list(example_inputs)))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        right = torch.compile(function, backend=backend, fullgraph=True)(*inputs)
    ((gm, example_inputs),) = kept
    return gm, (example_inputs, right)


def run(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Tensor:
    gm.recompile()
    with torch.no_grad():
        return gm(*example_inputs)[0]


@pytest.mark.parametrize(
    ("options", "kv_heads"),
    [({}, 2), ({"scale": 0.3}, 2), ({"enable_gqa": True}, 1)],
    ids=["plain", "scale", "fewer heads of k and v"],
)
def test_plain_attention_becomes_the_function(options: dict[str, Any], kv_heads: int) -> None:
    gm, (inputs, right) = graph_of(lambda q, k, v: flex_attention(q, k, v, **options), kv_heads)
    code = gm.code
    stand_ins = list(canonicalize_flex(gm.graph))
    (call,) = attention_calls(gm.graph)
    assert read_attention(call).scale == options.get("scale", 16**-0.5)
    assert (run(gm, inputs) - right).abs().max() < CLOSE
    settle(stand_ins)
    gm.recompile()
    assert gm.code == code


def half(_score: Tensor, *_: Tensor) -> Tensor:
    return _score * 0.5


def near(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q - k).abs() < 9


def first_block() -> BlockMask:
    """Shows the first half of the keys, and has no ``mask_mod`` of its own."""
    count = torch.ones(1, 1, 2, dtype=torch.int32)
    return BlockMask.from_kv_blocks(count, torch.zeros(1, 1, 2, 2, dtype=torch.int32))


@pytest.mark.parametrize(
    "options",
    [
        lambda: {"score_mod": half},
        lambda: {"block_mask": create_block_mask(near, None, None, SEQ, SEQ, "cpu")},
        lambda: {"block_mask": first_block()},
    ],
    ids=["scores", "mask", "blocks"],
)
def test_what_changes_scores_or_hides_keys_stays(options: Callable[[], dict[str, Any]]) -> None:
    given = options()
    gm, _ = graph_of(lambda q, k, v: flex_attention(q, k, v, **given))
    assert list(canonicalize_flex(gm.graph)) == []
    assert "flex_attention" in gm.code


def test_a_logsumexp_that_is_read_stays() -> None:
    def both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = flex_attention(q, k, v, return_lse=True)
        return out + lse[..., None]

    gm, _ = graph_of(both)
    assert list(canonicalize_flex(gm.graph)) == []
