"""Merging the attention over two sets of keys is attention over both."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from evdit_opt.kernels.merge import merge


def attention(logits: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    lse = torch.logsumexp(logits, -1)
    weights = (logits - lse.masked_fill(lse.isneginf(), 0.0).unsqueeze(-1)).exp()
    return weights @ v, lse


@given(st.integers(1, 9), st.integers(1, 9), st.floats(0.1, 200.0), st.integers(0, 99))
def test_two_parts_are_the_whole(first: int, second: int, spread: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    keys = first + second
    logits = spread * torch.randn(4, keys, generator=generator, dtype=torch.float64)
    v = torch.randn(keys, 3, generator=generator, dtype=torch.float64)
    whole, lse = attention(logits, v)
    parts = attention(logits[:, :first], v[:first]), attention(logits[:, first:], v[first:])
    for may_be_empty in (False, True):
        out, other = (tuple(map(torch.clone, part)) for part in parts)  # one is overwritten
        got, got_lse = merge(*out, *other, may_be_empty)
        # A few roundings of numbers as large as the logits, which the exponential turns into
        # relative errors of the weights.
        largest = logits.abs().max().item()
        tolerance = 16 * torch.finfo(torch.float64).eps * max(1.0, largest)
        assert (got - whole).abs().max() <= tolerance * v.abs().max()
        assert (got_lse - lse).abs().max() <= tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_empty_part_changes_nothing(dtype: torch.dtype) -> None:
    out, lse = torch.randn(5, 3).to(dtype), torch.randn(5)
    empty, none = torch.zeros(5, 3, dtype=dtype), torch.full((5,), -math.inf)
    for parts in ((out, lse, empty, none), (empty, none, out, lse)):
        got, got_lse = merge(*map(torch.clone, parts), may_be_empty=True)
        assert got.dtype == lse.dtype
        torch.testing.assert_close(got.to(dtype), out, rtol=0, atol=0)
        torch.testing.assert_close(got_lse, lse)
    got, got_lse = merge(empty, none, empty, none, may_be_empty=True)
    assert got.count_nonzero() == 0
    assert got_lse.isneginf().all()
