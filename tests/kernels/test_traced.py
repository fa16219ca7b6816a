"""What compilers are shown computes the same; that they make few kernels of it: see the pass."""

import torch
from hypothesis import given, settings

from evdit_opt.kernels import traced
from evdit_opt.kernels.geometry import Geometry, take
from tests.kernels.oracle import Case, cases, oracle
from tests.tolerance import assert_close_to_fp64


@given(cases((torch.float32, torch.float64, torch.bfloat16), max_tokens=600))
@settings(max_examples=40)
def test_the_same_output(case: Case) -> None:
    q, k, v, attn_mask = case.tensors()
    grid, layout = case.layout.grid, case.layout
    geometry = Geometry(
        frames=grid.frames, tokens=grid.tokens_per_frame, prefix=layout.prefix,
        suffix=layout.suffix,
    )  # fmt: skip
    scale = case.scale or case.head_dim**-0.5
    out = traced.forward(q, k, v, attn_mask, *case.mask.segments(), geometry, scale)
    exact, _ = oracle(q, k, v, case.mask, layout, scale, attn_mask)
    eager, _ = oracle(q, k, v, case.mask, layout, scale, attn_mask, dtype=case.dtype)
    assert_close_to_fp64(out, exact, eager, "out")
    assert out.stride() == torch.empty_like(q).stride()


def test_one_copy_serves_everything_that_is_taken() -> None:
    wanted = [[(0, 2), (6, 8)], [(2, 6)], [(0, 9)], [(8, 9)], [(0, 2), (6, 8)]]
    x = torch.randn(2, 3, 9, 4).transpose(2, 3).contiguous().transpose(2, 3)
    taken = traced.take_reordered(wanted, 9)
    parts = [taken(x, ranges) for ranges in wanted]
    for part, ranges in zip(parts, wanted, strict=True):
        expected = take(x, ranges)
        if ranges == [(0, 9)]:  # the whole sequence, in the order of its parts
            expected = torch.cat([take(x, part) for part in (wanted[0], [(2, 6)], [(8, 9)])], 2)
        assert torch.equal(part, expected)
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1
    other = torch.randn(2, 3, 9, 4)
    assert torch.equal(taken(other, wanted[0]), take(other, wanted[0]))


def test_what_lies_side_by_side_is_not_copied() -> None:
    x = torch.randn(2, 3, 9, 4)
    in_order = [[(0, 4)], [(4, 9)], [(0, 9)]]
    overlapping = [[(0, 2), (6, 8)], [(1, 3)], [(0, 9)]]  # the copy is of the first one alone
    for wanted, copied in (in_order, []), (overlapping, overlapping[:1]):
        taken = traced.take_reordered(wanted, 9)
        for ranges in wanted:
            part = taken(x, ranges)
            assert torch.equal(part, take(x, ranges))
            in_x = part.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
            assert in_x == (ranges not in copied)
