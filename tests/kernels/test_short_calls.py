"""Short eager calls are one call of PyTorch's, and nobody can tell but by the time."""

from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from evdit_opt.errors import MaskError
from evdit_opt.grid import TokenLayout, VideoGrid
from evdit_opt.kernels import short_calls, tile_attention
from evdit_opt.masks import Rule
from tests.kernels.oracle import KINDS, strided

LAYOUT = TokenLayout(VideoGrid(5, 6, 2), prefix=3, suffix=2)
MASK = Rule(2, 0, "balanced").mask(5)


def inputs(kind: str = "transposed", heads: tuple[int, int, int] = (2, 2, 2)) -> list[Tensor]:
    torch.manual_seed(0)
    return list(strided(kind, 2, LAYOUT.seq_len, heads, 16))


def operator(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    layout = (5, 12, 3, 2)
    return torch.ops.evdit.tile_attention(
        q, k, v, None, *MASK.segments(), *layout, scale, "masked"
    )[0]


def calls_of_sdpa(*tensors: Tensor, impl: str = "auto") -> int:
    with mock.patch.object(
        short_calls, "scaled_dot_product_attention", wraps=scaled_dot_product_attention
    ) as one_call:
        tile_attention(*tensors, MASK, LAYOUT, impl=impl)
    return one_call.call_count


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_in_the_same_strides_as_the_operator(
    kind: str, dtype: torch.dtype, scale: float | None
) -> None:
    tensors = [x.to(dtype) for x in inputs(kind)]
    out = tile_attention(*tensors, MASK, LAYOUT, scale=scale)
    expected = operator(*tensors, scale=scale)
    assert torch.equal(out, expected)
    assert out.stride() == expected.stride()
    assert calls_of_sdpa(*tensors) == 1


def test_a_last_dim_with_gaps_is_left_to_the_operator() -> None:
    tensors = [x.mT.contiguous().mT for x in inputs()]
    assert calls_of_sdpa(*tensors) == 0
    assert torch.equal(tile_attention(*tensors, MASK, LAYOUT), operator(*tensors))


@pytest.mark.parametrize("impl", ["auto", "static", "masked", "decomposed"])
def test_only_what_would_be_one_masked_call(impl: str) -> None:
    assert calls_of_sdpa(*inputs(), impl=impl) == (impl != "decomposed")


def test_the_operator_is_called_where_somebody_looks() -> None:
    q, k, v = inputs()
    assert calls_of_sdpa(q.requires_grad_(), k, v) == 0
    with torch.no_grad():
        assert calls_of_sdpa(q, k, v) == 1
        with torch.autocast("cpu", torch.bfloat16):
            assert calls_of_sdpa(q, k, v) == 0
        assert calls_of_sdpa(*inputs(heads=(4, 2, 2))) == 0
        assert calls_of_sdpa(*(torch.nn.Parameter(x) for x in (q, k, v))) == 0
        graphs = []

        def keep(gm: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
            graphs.append(gm)
            return gm

        torch.compile(tile_attention, backend=keep, fullgraph=True)(q, k, v, MASK, LAYOUT)
    (graph,) = graphs
    targets = [str(node.target) for node in graph.graph.nodes]
    assert any("evdit.tile_attention" in target for target in targets), targets


def test_errors_are_those_of_the_operator() -> None:
    q, k, v = (x[:, :, 1:] for x in inputs())
    with pytest.raises(MaskError, match="expected seq = prefix"):
        tile_attention(q, k, v, MASK, LAYOUT)
    q, k, v = inputs()
    with pytest.raises(MaskError, match="with k and v alike"):
        tile_attention(q, k, v[:, :1], MASK, LAYOUT)
