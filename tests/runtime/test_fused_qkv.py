"""``fuse_qkv_projections``: one linear layer for q, k and v."""

import pytest

from tests.runtime.pair import Pair


@pytest.mark.parametrize("when", ["before", "after"])
def test_fused_projections(when: str) -> None:
    pair = Pair()
    if when == "before":
        pair.both(lambda model: model.fuse_qkv_projections())
    pair.apply()
    pair.check()
    if when == "after":
        pair.both(lambda model: model.fuse_qkv_projections())
        pair.check()
    assert pair.fast.blocks[0].attn1.fused_projections
    assert pair.graphs == (1 if when == "before" else 2)
