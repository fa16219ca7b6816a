"""What the operator can compute. Causal, dropout and masks: see test_swap_attention."""

import torch
import torch.nn.functional as F

from evdit_opt.passes.check_attention import unsupported
from evdit_opt.passes.graph import read_attention
from tests.passes.graph_builder import GraphBuilder


def test_tensors_of_other_shapes_are_refused() -> None:
    build = GraphBuilder()
    flat = build.input("l_q_", 2, 24, 8)
    q = build.input("l_q4_", 1, 2, 24, 8)
    wide = build.input("l_v_", 1, 2, 24, 16)
    unbatched = build.call(F.scaled_dot_product_attention, flat, flat, flat)
    uneven = build.call(F.scaled_dot_product_attention, q, q, wide)
    fine = build.call(F.scaled_dot_product_attention, q, q, q)
    assert "3 dimensions" in unsupported(read_attention(unbatched))
    assert "head_dim 16 for v and 8" in unsupported(read_attention(uneven))
    assert unsupported(read_attention(fine)) == ""


def test_a_mask_without_heads_is_refused() -> None:
    build = GraphBuilder()
    q, mask = build.input("l_q_", 1, 2, 24, 8), build.input("l_m_", 24, 24, dtype=torch.bool)
    call = build.call(F.scaled_dot_product_attention, q, q, q, attn_mask=mask)
    assert "(24, 24)" in unsupported(read_attention(call))
