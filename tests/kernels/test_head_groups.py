"""A mask per group of heads: each group is what it would be alone."""

import pytest
import torch
from torch import Tensor

from evdit_opt.errors import MaskError
from evdit_opt.grid import TokenLayout, VideoGrid
from evdit_opt.kernels import tile_attention
from evdit_opt.masks import Rule, TileMask
from tests.kernels.fused import require_interpreter
from tests.kernels.oracle import KINDS, oracle, strided
from tests.tolerance import assert_close_to_fp64

LAYOUT = TokenLayout(VideoGrid(5, 9, 1), prefix=3)
MASKS = (Rule(1).mask(5), TileMask.full(5), Rule(2, 0, "balanced").mask(5))

CALLS = [("auto", kind, heads) for kind in KINDS for heads in (0, 1, 6)] + [
    (impl, "packed", heads)
    for impl in ("reference", "decomposed", "masked", "triton")
    for heads in (0, 6)
]


def inputs(kind: str = "transposed") -> list[Tensor]:
    torch.manual_seed(0)
    return list(strided(kind, 2, LAYOUT.seq_len, (6, 3, 3), 16))


def group_oracle(tensors: list[Tensor], padding: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    """out and lse of the three groups of two query heads and one key head, side by side."""
    q, k, v = tensors
    parts = []
    for n, mask in enumerate(MASKS):
        heads = slice(2 * n, 2 * n + 2)
        own = padding if padding is None or padding.shape[1] == 1 else padding[:, heads]
        one = (q[:, heads], k[:, n : n + 1], v[:, n : n + 1])
        parts.append(oracle(*one, mask, LAYOUT, None, own, dtype=dtype))
    return [torch.cat(x, dim=1) for x in zip(*parts, strict=True)]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("impl", "kind", "padding_heads"), CALLS)
def test_every_group_has_its_mask(impl: str, kind: str, padding_heads: int) -> None:
    if impl == "triton":
        require_interpreter()
    tensors = inputs(kind)
    padding = None
    if padding_heads:
        padding = torch.rand(2, padding_heads, 1, LAYOUT.seq_len) < 0.7
    out, lse = tile_attention(
        *tensors, MASKS, LAYOUT, attn_mask=padding, impl=impl, return_lse=True
    )
    exact, exact_lse = group_oracle(tensors, padding, torch.float64)
    eager, eager_lse = group_oracle(tensors, padding, torch.float32)
    assert_close_to_fp64(out, exact, eager, "out")
    assert_close_to_fp64(lse, exact_lse, eager_lse.float(), "lse")
    assert out.stride() == torch.empty_like(tensors[0]).stride()
    assert lse.is_contiguous()


def test_compiled_whole_with_gradients() -> None:
    tensors = [x.requires_grad_() for x in inputs("packed")]
    wide = [x.detach().double().requires_grad_() for x in tensors]
    true = torch.autograd.grad(group_oracle(wide, None, torch.float64)[0].square().sum(), wide)
    for function in (tile_attention, torch.compile(tile_attention, fullgraph=True)):
        out = function(*tensors, MASKS, LAYOUT)
        grads = torch.autograd.grad(out.square().sum(), tensors)
        for mine, exact in zip(grads, true, strict=True):
            torch.testing.assert_close(mine.double(), exact, rtol=1e-4, atol=1e-5)


def test_autocast_decides_the_dtype() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert tile_attention(*inputs(), MASKS, LAYOUT).dtype == torch.bfloat16


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("masks", [(), MASKS[:2]], ids=["none", "two for three heads"])
def test_groups_that_do_not_fit_are_an_error(masks: tuple[TileMask, ...], device: str) -> None:
    with pytest.raises(MaskError, match="into equal groups, got "):
        tile_attention(*(x.to(device) for x in inputs()), masks, LAYOUT)
