"""Every implementation equals the definition, for any mask, layout, dtype and strides."""

import dataclasses
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evdit_opt.grid import TokenLayout, VideoGrid
from evdit_opt.kernels import flex, masked, pieces, tile_attention
from evdit_opt.masks import Rule, TileMask
from tests.kernels.fused import poisoned
from tests.kernels.oracle import KINDS, Case, cases, oracle, strided
from tests.tolerance import assert_close_to_fp64

CPU_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def check(case: Case, impl: str, factor: float = 2.0) -> None:
    q, k, v, attn_mask = case.tensors()
    out, lse = tile_attention(
        q, k, v, case.mask, case.layout, scale=case.scale, attn_mask=attn_mask, impl=impl,
        return_lse=True,
    )  # fmt: skip
    exact, exact_lse = oracle(q, k, v, case.mask, case.layout, case.scale, attn_mask)
    eager, eager_lse = oracle(
        q, k, v, case.mask, case.layout, case.scale, attn_mask, dtype=case.dtype
    )
    assert_close_to_fp64(out, exact, eager, "out", factor)
    assert out.stride() == torch.empty_like(q).stride()
    assert lse.is_contiguous()
    assert_close_to_fp64(lse, exact_lse, eager_lse.to(lse.dtype), "lse", factor)


@given(cases(CPU_DTYPES))
@settings(max_examples=60)
def test_auto_is_exact(case: Case) -> None:
    check(case, "auto")


@given(cases((torch.float32, torch.float64), max_tokens=600))
@settings(max_examples=25)
def test_reference_is_exact(case: Case) -> None:
    check(case, "reference")


@given(cases(CPU_DTYPES, max_tokens=1500))
@settings(max_examples=40)
def test_masked_is_exact(case: Case) -> None:
    check(case, "masked")


@given(cases((torch.float32, torch.float64), max_tokens=400))
@settings(max_examples=15)
def test_flex_is_exact(case: Case) -> None:
    """FlexAttention uncompiled: on a CPU its compiled form returns no log-sum-exp."""
    with mock.patch.object(flex, "COMPILER", "eager"):
        check(case, "flex")


@given(cases((torch.float32, torch.float64), max_tokens=900), st.integers(1, 4))
@settings(max_examples=80)
def test_every_block_size_is_exact(case: Case, rows: int) -> None:
    with mock.patch.object(pieces, "rows_per_block", return_value=rows):
        check(case, "decomposed")


@pytest.mark.nightly
@given(cases(CPU_DTYPES), st.integers(1, 4))
@settings(max_examples=1000)
def test_a_thousand_cases(case: Case, rows: int) -> None:
    with mock.patch.object(pieces, "rows_per_block", return_value=rows):
        check(case, "decomposed")
    if case.layout.seq_len <= masked.MAX_SEQ:
        check(case, "masked")


@pytest.mark.parametrize("rows", [1, 2, 9])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_in_every_block_size(dtype: torch.dtype, rows: int) -> None:
    case = Case(
        mask=Rule(2, 1, "balanced").mask(9), layout=TokenLayout(VideoGrid(9, 63, 1), prefix=5),
        batch=1, heads=2, kv_heads=2, head_dim=64, dtype=dtype, kind="transposed", padding="none",
        scale=None, seed=0,
    )  # fmt: skip
    with mock.patch.object(pieces, "rows_per_block", return_value=rows):
        check(case, "decomposed")


IMPLS = ("reference", "decomposed", "masked")
CASE = Case(
    mask=Rule(2, 1, "balanced").mask(6), layout=TokenLayout(VideoGrid(6, 37, 1), 5, 3),
    batch=2, heads=4, kv_heads=2, head_dim=24, dtype=torch.float32, kind="packed", padding="bool",
    scale=None, seed=1,
)  # fmt: skip


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_beside_the_inputs_is_read(kind: str, impl: str) -> None:
    """q, k and v are slices out of NaN; and the same call twice gives the same bits."""
    case = dataclasses.replace(CASE, kind=kind)
    q, k, v, attn_mask = case.tensors()

    def call(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return tile_attention(
            *tensors, case.mask, case.layout, attn_mask=attn_mask, impl=impl, return_lse=True
        )

    expected, again = call(q, k, v), call(q, k, v)
    sliced = call(*(poisoned(x, "cpu") for x in (q, k, v)))
    assert all(map(torch.equal, expected, again))
    for mine, plain in zip(sliced, expected, strict=True):
        torch.testing.assert_close(mine, plain)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_query_without_any_key_gives_zero(impl: str) -> None:
    layout = TokenLayout(VideoGrid(3, 4, 1))
    q, k, v = strided("transposed", 1, 12, (2, 2, 2), 16)
    hidden = torch.ones(1, 1, 1, 12, dtype=torch.bool)
    hidden[..., 4:8] = False  # all that frame 1 keeps
    out, lse = tile_attention(
        q, k, v, Rule(0).mask(3), layout, attn_mask=hidden, impl=impl, return_lse=True
    )
    assert out[:, :, 4:8].count_nonzero() == 0
    assert lse[:, :, 4:8].isneginf().all()
    assert lse[:, :, :4].isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_no_samples_at_all(impl: str) -> None:
    q, k, v = (
        x[:0].requires_grad_() for x in dataclasses.replace(CASE, padding="none").tensors()[:3]
    )
    out, lse = tile_attention(q, k, v, CASE.mask, CASE.layout, impl=impl, return_lse=True)
    out.sum().backward()
    assert (out.shape, lse.shape) == (q.shape, q.shape[:3])


def test_the_full_mask_is_dense_attention() -> None:
    layout = TokenLayout(VideoGrid(3, 5, 7), prefix=2, suffix=3)
    q, k, v = strided("packed", 2, layout.seq_len, (4, 4, 4), 40)
    out = tile_attention(q, k, v, TileMask.full(3), layout)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(out, dense)


@pytest.mark.gpu
@given(cases((torch.float32, torch.float16, torch.bfloat16)))
@settings(max_examples=60)
def test_auto_is_exact_on_cuda(case: Case) -> None:
    check_on_cuda(case, "auto")


@pytest.mark.gpu
@given(cases((torch.float32, torch.float16, torch.bfloat16)))
@settings(max_examples=100)
def test_triton_is_exact_on_cuda(case: Case) -> None:
    check_on_cuda(case, "triton")


@pytest.mark.gpu
@given(cases((torch.float32, torch.float16, torch.bfloat16), max_tokens=1500))
@settings(max_examples=60)
def test_masked_is_exact_on_cuda(case: Case) -> None:
    check_on_cuda(case, "masked")


@pytest.mark.gpu
@given(cases((torch.float16, torch.bfloat16), head_dims=(64, 96, 128)))
@settings(max_examples=10)
def test_flex_is_exact_on_cuda(case: Case) -> None:
    check_on_cuda(case, "flex")


def check_on_cuda(case: Case, impl: str) -> None:
    q, k, v, attn_mask = case.tensors()
    moved = [x.cuda() for x in (q, k, v)]
    out, lse = tile_attention(
        *moved, case.mask, case.layout, scale=case.scale, impl=impl, return_lse=True,
        attn_mask=None if attn_mask is None else attn_mask.cuda(),
    )  # fmt: skip
    exact, exact_lse = oracle(q, k, v, case.mask, case.layout, case.scale, attn_mask)
    eager, eager_lse = oracle(
        q, k, v, case.mask, case.layout, case.scale, attn_mask, dtype=case.dtype
    )
    assert_close_to_fp64(out.cpu(), exact, eager, "out")
    assert_close_to_fp64(lse.cpu(), exact_lse, eager_lse.to(lse.dtype), "lse")
