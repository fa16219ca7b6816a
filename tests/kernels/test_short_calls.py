"""Short eager calls go around the operator, and nobody can tell but by the time."""

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


def is_called(*tensors: Tensor, impl: str = "auto") -> bool:
    """Whether the operator is."""
    packet = torch.ops.evdit.tile_attention
    with mock.patch.object(torch.ops.evdit, "tile_attention", wraps=packet) as seen:
        tile_attention(*tensors, MASK, LAYOUT, impl=impl)
    return seen.called


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
    assert not is_called(*tensors)


def test_a_last_dim_with_gaps() -> None:
    tensors = [x.mT.contiguous().mT for x in inputs()]
    assert torch.equal(tile_attention(*tensors, MASK, LAYOUT), operator(*tensors))


@pytest.mark.parametrize("impl", ["auto", "static", "masked", "decomposed"])
def test_any_choice_is_the_one_that_runs(impl: str) -> None:
    with mock.patch.object(
        short_calls, "scaled_dot_product_attention", wraps=scaled_dot_product_attention
    ) as one_call:
        tile_attention(*inputs(), MASK, LAYOUT, impl=impl)
    assert one_call.call_count == (impl != "decomposed")
    assert not is_called(*inputs(), impl=impl)


def test_the_operator_is_called_where_somebody_looks() -> None:
    q, k, v = inputs()
    assert is_called(q.requires_grad_(), k, v)
    with torch.no_grad():
        assert not is_called(q, k, v)
        with torch.autocast("cpu", torch.bfloat16):
            assert is_called(q, k, v)
        assert is_called(*inputs(heads=(4, 2, 2)))
        assert is_called(*(torch.nn.Parameter(x) for x in (q, k, v)))
        assert is_called(q, k, v, impl="reference")
        graphs = []
        torch._dynamo.reset()  # other tests compile the same function

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
