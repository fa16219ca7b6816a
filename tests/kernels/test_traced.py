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
    wanted = [[(0, 2), (6, 8)], [(2, 6), (8, 9)], [(1, 3)], [(0, 2), (6, 8)]]
    x = torch.randn(2, 3, 9, 4).transpose(2, 3).contiguous().transpose(2, 3)
    taken = traced.take_reordered(wanted)
    parts = [taken(x, ranges) for ranges in wanted]
    for part, ranges in zip(parts, wanted, strict=True):
        assert torch.equal(part, take(x, ranges))
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 2  # the copy, and x
    fewer = [[(0, 2), (6, 8)], [(2, 5), (8, 9)]]  # one token short: the copy has it all the same
    taken = traced.take_reordered(fewer)
    for ranges in fewer:
        assert torch.equal(taken(x, ranges), take(x, ranges))
        assert taken(x, ranges).untyped_storage().nbytes() == x.untyped_storage().nbytes()
    taken, other = traced.take_reordered(wanted), torch.randn(2, 3, 9, 4)
    assert torch.equal(taken(other, wanted[0]), take(other, wanted[0]))
