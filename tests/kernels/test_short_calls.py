"""Short eager calls go around the operator, and nobody can tell but by the time."""

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from evdit_opt.errors import MaskError, UnsupportedInputError
from evdit_opt.grid import TokenLayout, VideoGrid
from evdit_opt.kernels import short_calls, tile_attention
from evdit_opt.masks import Rule, TileMask
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


def test_query_heads_that_share_a_key_head() -> None:
    tensors = inputs(heads=(4, 2, 2))
    assert torch.equal(tile_attention(*tensors, MASK, LAYOUT), operator(*tensors))
    assert not is_called(*tensors)


def test_a_mask_without_weights_in_half_precision() -> None:
    """Its numbers take two bytes each here, and four in the operator."""
    mask = Rule(2, 1).mask(5)
    tensors = [x.bfloat16() for x in inputs()]
    expected = torch.ops.evdit.tile_attention(
        *tensors, None, *mask.segments(), 5, 12, 3, 2, None, "masked"
    )[0]
    assert torch.equal(tile_attention(*tensors, mask, LAYOUT), expected)


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


def test_only_the_first_call_of_a_kind_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(short_calls, "_calls", {})
    tensors = inputs()
    with mock.patch.object(short_calls, "check_inputs", wraps=short_calls.check_inputs) as check:
        first = tile_attention(*tensors, MASK, LAYOUT)
        again = tile_attention(*(x.clone() for x in tensors), MASK, LAYOUT)
        same = tile_attention(*tensors, TileMask(MASK.rows), LAYOUT)
    assert check.call_count == 1
    assert torch.equal(first, again)
    assert torch.equal(first, same)


def _changed(name: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[list[Any], dict[str, Any]]:
    """A call that differs from ``(q, k, v, MASK, LAYOUT)`` in one thing."""
    return {
        "scale": ([q, k, v, MASK, LAYOUT], {"scale": 0.2}),
        "mask": ([q, k, v, Rule(1).mask(5), LAYOUT], {}),
        "layout": ([q, k, v, MASK, TokenLayout(VideoGrid(5, 4, 3), prefix=2, suffix=3)], {}),
        "dtype": ([q.double(), k.double(), v.double(), MASK, LAYOUT], {}),
        "batch": ([q[:1], k[:1], v[:1], MASK, LAYOUT], {}),
        "key heads": ([q, k[:, :1], v[:, :1], MASK, LAYOUT], {}),
        "strides of q": ([q.contiguous(), k, v, MASK, LAYOUT], {}),
        "gaps in v": ([q, k, v.mT.contiguous().mT, MASK, LAYOUT], {}),
    }[name]


@pytest.mark.parametrize(
    "name",
    ["scale", "mask", "layout", "dtype", "batch", "key heads", "strides of q", "gaps in v"],
)
def test_what_is_remembered_is_of_this_kind(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(short_calls, "_calls", {})
    tensors = inputs()
    tile_attention(*tensors, MASK, LAYOUT)
    arguments, options = _changed(name, *tensors)
    out = tile_attention(*arguments, **options)
    assert len(short_calls._calls) == 2
    monkeypatch.setattr(short_calls, "_calls", {})
    alone = tile_attention(*arguments, **options)
    assert torch.equal(out, alone)
    assert out.stride() == alone.stride()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda q, k, v: (q[:, :, 1:], k, v), MaskError),
        (lambda q, k, v: (q, k[:1], v[:1]), MaskError),
        (lambda q, k, v: (q, k, v.double()), UnsupportedInputError),
        (lambda q, k, v: (q[0], k[0], v[0]), MaskError),
        (lambda q, k, v: (q, k.to("meta"), v), UnsupportedInputError),
        (lambda q, k, v: (q.int(), k.int(), v.int()), UnsupportedInputError),
    ],
    ids=["length", "batch", "dtype", "dimensions", "device", "integers"],
)
def test_bad_input_is_an_error_every_time(change: Any, error: type[Exception]) -> None:
    """After a good call, too: an error is never remembered, nor taken for what is."""
    tensors = inputs()
    tile_attention(*tensors, MASK, LAYOUT)
    for _ in range(2):
        with pytest.raises(error):
            tile_attention(*change(*tensors), MASK, LAYOUT)


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(short_calls, "_calls", {})
    monkeypatch.setattr(short_calls, "MAX_CALLS", 2)
    tensors = inputs()
    for scale in (0.1, 0.2, 0.3):
        tile_attention(*tensors, MASK, LAYOUT, scale=scale)
    assert [kind[2] for kind in short_calls._calls] == [0.2, 0.3]
