"""The pieces of a call: every query is in one of them, with as many parts as they say."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evdit_opt.kernels.decomposed import attend_pieces
from evdit_opt.kernels.decomposition import decompose
from evdit_opt.kernels.geometry import Geometry
from evdit_opt.kernels.pieces import pieces_of, rows_per_block
from tests.kernels.oracle import Case, cases


@given(cases((torch.float32,), max_tokens=300))
@settings(max_examples=60)
def test_every_query_is_in_one_piece(case: Case) -> None:
    q, k, v, attn_mask = case.tensors()
    grid = case.layout.grid
    geometry = Geometry(
        frames=grid.frames, tokens=grid.tokens_per_frame, prefix=case.layout.prefix,
        suffix=case.layout.suffix,
    )  # fmt: skip
    plan = decompose(*case.mask.segments(), grid.frames)
    pieces = pieces_of(plan, geometry, q, k.shape[1])
    count = torch.zeros(q.shape[:3])
    for piece in pieces:
        for start, stop in piece.ranges:
            count[piece.batch, piece.heads, start:stop] += 1
    assert torch.equal(count, torch.ones_like(count))

    each = [*attend_pieces(pieces, plan, q, k, v, attn_mask, geometry, 1.0)]
    assert [len(parts) for parts in each] == [len(piece.weights) for piece in pieces]
    for piece, parts in zip(pieces, each, strict=True):
        tokens = sum(stop - start for start, stop in piece.ranges)
        samples, heads = count[piece.batch, piece.heads].shape[:2]
        for out, lse in parts:
            assert out.shape[:3] == lse.shape
            assert out.shape[1] == heads
            assert out.shape[0] * out.shape[2] == samples * tokens


@given(st.integers(1, 9), st.integers(1, 5000), st.sampled_from(["cpu", "cuda"]))
def test_a_block_has_at_least_one_row(frames: int, tokens: int, device: str) -> None:
    geometry = Geometry(frames=frames, tokens=tokens, prefix=0, suffix=0)
    rows = rows_per_block(geometry, device)
    assert rows >= 1
    assert device == "cpu" or rows == frames  # launches cost more than passes over memory
    assert device == "cuda" or rows == 1 or rows * tokens <= 2048
