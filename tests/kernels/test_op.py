"""The operator as models and torch.compile call it: strides, dynamic shapes, autograd, autocast."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from evdit_opt.errors import MaskError, UnsupportedInputError
from evdit_opt.grid import TokenLayout, VideoGrid
from evdit_opt.kernels import tile_attention
from evdit_opt.masks import Rule, TileMask
from tests.kernels.oracle import KINDS, oracle, strided

LAYOUT = TokenLayout(VideoGrid(5, 3, 4), prefix=3, suffix=2)
MASK = Rule(2, 0, "balanced").mask(5)
HEADS = (4, 2, 2)


def inputs(kind: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    tensors = strided(kind, 2, LAYOUT.seq_len, HEADS, 16)
    return [x.to(dtype).requires_grad_() for x in tensors]


def padding(kind: str) -> Tensor | None:
    if kind == "none":
        return None
    mask = torch.ones(2, 1, 1, LAYOUT.seq_len, dtype=torch.bool)
    mask[1, ..., -2:] = False
    return mask if kind == "bool" else torch.where(mask, 0.0, -1e4)


@pytest.mark.parametrize("attn_mask", ["none", "bool", "float"])
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: str, attn_mask: str) -> None:
    op = torch.ops.evdit.tile_attention.default
    arguments = (padding(attn_mask), *MASK.segments(), 5, 12, 3, 2, None, "auto")
    torch.library.opcheck(op, (*inputs(kind), *arguments))


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck_backward(kind: str) -> None:
    q, k, v = (x.detach() for x in inputs(kind))
    out, lse = tile_attention(q, k, v, MASK, LAYOUT, return_lse=True)
    arguments = (None, *MASK.segments(), 5, 12, 3, 2, None)
    op = torch.ops.evdit.tile_attention_backward.default
    torch.library.opcheck(op, (torch.randn_like(out), q, k, v, out, lse, *arguments))


@pytest.mark.parametrize(
    ("kind", "dynamic"), [("transposed", False), ("transposed", True), ("packed", False)]
)
def test_compiles_whole_forward_and_backward(kind: str, dynamic: bool) -> None:
    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = tile_attention(q * 1.5, k, v + 1.0, MASK, LAYOUT)  # as the model's q: transposed
        return out.transpose(1, 2).flatten(2) * 2.0  # [batch, seq, heads * head_dim]

    tensors = inputs(kind)
    eager = block(*tensors)
    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic)(*tensors)
    torch.testing.assert_close(compiled, eager)
    for mine, theirs in zip(
        torch.autograd.grad(compiled.square().sum(), tensors),
        torch.autograd.grad(eager.square().sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_last_dim_not_contiguous() -> None:
    q, k, v = (torch.randn(1, 2, 16, LAYOUT.seq_len).transpose(2, 3) for _ in range(3))
    expected, _ = oracle(q, k, v, MASK, LAYOUT)
    for function in (tile_attention, torch.compile(tile_attention, fullgraph=True)):
        torch.testing.assert_close(function(q, k, v, MASK, LAYOUT), expected.float())


def test_another_mask_recompiles_and_is_used() -> None:
    counter = CompileCounter()
    compiled = torch.compile(tile_attention, backend=counter, fullgraph=True)
    q, k, v = (x.detach() for x in inputs("transposed"))
    masks = [MASK, Rule(1).mask(5), TileMask.full(5), MASK]
    for mask in masks:
        expected, _ = oracle(q, k, v, mask, LAYOUT)
        out = compiled(q, k, v, mask, LAYOUT)
        torch.testing.assert_close(out, expected.float())
    assert counter.frame_count == 3


def test_more_tokens_reuse_a_dynamic_graph() -> None:
    counter = CompileCounter()
    compiled = torch.compile(tile_attention, backend=counter, fullgraph=True, dynamic=True)
    for height in (3, 4, 6):
        layout = TokenLayout(VideoGrid(5, height, 4), prefix=3)
        q, k, v = strided("transposed", 1, layout.seq_len, HEADS, 16)
        expected, _ = oracle(q, k, v, MASK, layout)
        torch.testing.assert_close(compiled(q, k, v, MASK, layout), expected.float())
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    def call(*tensors: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return tile_attention(*tensors, MASK, LAYOUT)

    tensors = inputs("transposed")
    expected = tile_attention(*(x.to(dtype) for x in tensors), MASK, LAYOUT)
    for function in (call, torch.compile(call, fullgraph=True)):
        out = function(*tensors)
        assert out.dtype == dtype
        assert torch.equal(out, expected)
        out.float().sum().backward()
        assert tensors[0].grad is not None
        assert tensors[0].grad.dtype == torch.float32


def test_checkpointing() -> None:
    q, k, v = inputs("transposed")
    plain = torch.autograd.grad(tile_attention(q, k, v, MASK, LAYOUT).square().sum(), (q, k, v))
    out = checkpoint(lambda *x: tile_attention(*x, MASK, LAYOUT), q, k, v, use_reentrant=False)
    for mine, theirs in zip(torch.autograd.grad(out.square().sum(), (q, k, v)), plain, strict=True):
        assert torch.equal(mine, theirs)


def test_lse_carries_no_gradient() -> None:
    out, lse = tile_attention(*inputs("transposed"), MASK, LAYOUT, return_lse=True)
    assert out.requires_grad
    assert not lse.requires_grad


def test_tangents_are_an_error_not_dropped() -> None:
    q, k, v = (x.detach() for x in inputs("transposed"))

    def call(q: Tensor) -> Tensor:
        return tile_attention(q, k, v, MASK, LAYOUT, impl="reference")

    with pytest.raises(UnsupportedInputError, match=r"without tangents.* torch\.func\.jvp"):
        torch.func.jvp(call, (q,), (q,))
    with forward_ad.dual_level(), pytest.raises(UnsupportedInputError, match="without tangents"):
        torch.ops.evdit.tile_attention(
            forward_ad.make_dual(q, q), k, v, None, *MASK.segments(), 5, 12, 3, 2, None, "auto"
        )


def test_importing_loads_no_triton() -> None:
    code = "import sys, evdit_opt.kernels; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


Q = torch.zeros(2, 4, LAYOUT.seq_len, 16)
K = torch.zeros(2, 2, LAYOUT.seq_len, 16)


@pytest.mark.parametrize(
    ("q", "k", "options", "error", "message"),
    [
        (Q[0], K, {}, MaskError, r"expected q, k, v \[batch, heads, seq, head_dim\]"),
        (Q, K[:1], {}, MaskError, "equal batch"),
        (Q, K[:, :, 1:], {}, MaskError, "equal batch, seq"),
        (Q[:, :3], K, {}, MaskError, "multiple of those of k, got 3 and 2"),
        (Q[:, :, 1:], K[:, :, 1:], {}, MaskError, r"= 3 \+ 5 \* 12 \+ 2 = 65, got 64"),
        (Q.half(), K, {}, UnsupportedInputError, "of one dtype"),
        (Q.int(), K.int(), {}, UnsupportedInputError, "of one dtype, float32"),
        (Q, K, {"impl": "fastest"}, MaskError, "impl to be one of auto, static, ref"),
        (Q, K, {"attn_mask": torch.ones(65, 65, dtype=torch.bool)}, MaskError, "key-padding"),
        (Q, K, {"attn_mask": torch.ones(2, 1, 65, 65)}, MaskError, "depends on the query"),
        (Q, K, {"attn_mask": torch.ones(2, 1, 1, 65, dtype=torch.int64)},
         UnsupportedInputError, "bool"),
        (Q.double(), K.double(), {"impl": "triton"}, UnsupportedInputError, "impl='triton'"),
    ],
)  # fmt: skip
def test_errors(
    q: Tensor, k: Tensor, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    """One clear error each: when it runs, and when it is traced, by the fake kernel."""
    with pytest.raises(error, match=message):
        tile_attention(q, k, k, MASK, LAYOUT, **options)
    q, k = q.to("meta"), k.to("meta")
    if "attn_mask" in options:
        options = {**options, "attn_mask": options["attn_mask"].to("meta")}
    with pytest.raises(error, match=message):
        tile_attention(q, k, k, MASK, LAYOUT, **options)


def test_errors_of_compiled_calls_say_the_same() -> None:
    compiled = torch.compile(tile_attention, fullgraph=True)
    with pytest.raises(torch._dynamo.exc.TorchRuntimeError, match="expected seq = prefix"):
        compiled(Q[:, :, 1:], K[:, :, 1:], K[:, :, 1:], MASK, LAYOUT)


ROW_1_EMPTY = ((0, 0, 5, 2, 0, 5, 3, 0, 5, 4, 0, 5), (0.0,) * 4)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("segments", "message"),
    [
        (ROW_1_EMPTY, "at least one kept tile in every row, row 1 has none"),
        (((0, 0, 6), (0.0,)), "within 5 frames"),
        (((0, 0), (0.0,)), "3 integers per weight"),
        (((0, 0, 5), (float("nan"),)), "-inf or finite numbers in a tile mask, row 0 has NaN"),
        (((0, 0, 5), (float("inf"),)), "-inf or finite numbers in a tile mask, row 0 has NaN"),
    ],
)
def test_lists_that_are_no_mask_are_an_error(
    segments: tuple[tuple[int, ...], tuple[float, ...]], message: str, device: str
) -> None:
    q, k = Q.to(device), K.to(device)
    with pytest.raises(MaskError, match=message):
        torch.ops.evdit.tile_attention(q, k, k, None, *segments, 5, 12, 3, 2, None, "auto")


@pytest.mark.parametrize("impl", ["auto", "reference", "decomposed", "masked"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_an_additive_mask_must_not_hold(value: float, impl: str) -> None:
    padding = torch.zeros(1, 1, 1, LAYOUT.seq_len)
    padding[..., 0] = -float("inf")  # hides a key, as it should
    tile_attention(Q, K, K, MASK, LAYOUT, attn_mask=padding, impl=impl)
    padding[..., 7] = value
    for function in (tile_attention, torch.compile(tile_attention, backend="aot_eager")):
        with pytest.raises(MaskError, match=r"finite numbers or -inf in attn_mask, got NaN or"):
            function(Q, K, K, MASK, LAYOUT, attn_mask=padding, impl=impl)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_less_than_no_text_is_an_error(device: str) -> None:
    q, k = Q.to(device), K.to(device)
    with pytest.raises(MaskError, match=r"expected seq = prefix .* = -3 \+ 5 \* 12 \+ 8 = 65"):
        torch.ops.evdit.tile_attention(q, k, k, None, *MASK.segments(), 5, 12, -3, 8, None, "auto")


def test_tensors_on_two_devices_are_an_error() -> None:
    with pytest.raises(UnsupportedInputError, match=r"on one device, got \['cpu', 'meta'"):
        tile_attention(Q, K.to("meta"), K.to("meta"), MASK, LAYOUT)


def test_a_mask_of_other_frames_is_an_error() -> None:
    with pytest.raises(MaskError, match="expected a mask of 5 frames for this layout, got 6"):
        tile_attention(Q, K, K, Rule().mask(6), LAYOUT)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_head_dim_out_of_range_is_an_error(device: str) -> None:
    wide = torch.zeros(1, 1, LAYOUT.seq_len, 257, device=device)
    with pytest.raises(UnsupportedInputError, match=r"head_dim in 1\.\.256, got 257"):
        tile_attention(wide, wide, wide, MASK, LAYOUT)
