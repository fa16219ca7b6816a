"""Sampled parts: the same numbers as the operator's, for every mask, at the sampled positions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evdit_opt.calibrate import parts as parts_module
from evdit_opt.calibrate.parts import tile_parts
from evdit_opt.grid import TokenLayout, VideoGrid
from evdit_opt.kernels import tile_attention
from evdit_opt.masks import Rule

RULES = (Rule(1), Rule(2, weighting="balanced"), Rule(0), Rule(1, 1), Rule(2, spacing="centred"))


@st.composite
def cases(draw):
    frames = draw(st.integers(1, 6))
    layout = TokenLayout(
        VideoGrid(frames, draw(st.integers(1, 4)), draw(st.integers(1, 5))),
        prefix=draw(st.sampled_from([0, 3])),
        suffix=draw(st.sampled_from([0, 5])),
    )
    heads, kv_heads = draw(st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]))
    batch, head_dim = draw(st.integers(1, 2)), draw(st.sampled_from([4, 16, 24]))
    torch.manual_seed(draw(st.integers(0, 99)))
    shape = (batch, heads, layout.seq_len, head_dim)
    q = torch.randn(shape, dtype=torch.float64)
    k, v = torch.randn(2, batch, kv_heads, layout.seq_len, head_dim, dtype=torch.float64)
    mask = None
    if draw(st.booleans()):
        mask = torch.rand(batch, 1, 1, layout.seq_len) < 0.7
    positions = torch.randperm(layout.grid.tokens_per_frame)[: draw(st.integers(1, 3))]
    return q, k, v, layout, mask, positions


@given(cases(), st.sampled_from([1, 1 << 24]))
@settings(max_examples=60)
def test_every_mask_is_a_choice_of_parts(case, max_elements):
    q, k, v, layout, attn_mask, positions = case
    frames = layout.grid.frames
    masks = [rule.mask(frames) for rule in RULES]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts_module, "MAX_ELEMENTS", max_elements)  # head by head, or all at once
        found = list(tile_parts(q, k, v, layout, positions, attn_mask))
    bias = torch.stack([mask.bias for mask in masks])
    got = torch.cat([part.combine(bias) for part in found], 2)
    video = slice(layout.prefix, layout.prefix + layout.grid.tokens)
    for mask, own in zip(masks, got, strict=True):
        out = tile_attention(q, k, v, mask, layout, attn_mask=attn_mask, impl="reference")
        right = out[:, :, video].unflatten(2, (frames, -1))[:, :, :, positions]
        torch.testing.assert_close(own.double(), right, rtol=1e-5, atol=2e-6)  # float32 sums


@given(cases())
@settings(max_examples=30)
def test_mass_is_where_dense_attention_looks(case):
    q, k, v, layout, attn_mask, positions = case
    frames = layout.grid.frames
    groups = q.shape[1] // k.shape[1]
    logits = q @ k.repeat_interleave(groups, 1).transpose(2, 3) * q.shape[-1] ** -0.5
    if attn_mask is not None:
        logits = logits.masked_fill(~attn_mask, -torch.inf)
    weights = logits.softmax(-1).nan_to_num(0.0)
    video = slice(layout.prefix, layout.prefix + layout.grid.tokens)
    rows = weights[:, :, video].unflatten(2, (frames, -1))[:, :, :, positions]
    tiles = rows[..., video].unflatten(-1, (frames, -1)).sum(-1)
    text = rows.sum(-1, keepdim=True) - tiles.sum(-1, keepdim=True)
    right = torch.cat([tiles, text], -1) if layout.text_tokens else tiles
    got = torch.cat([part.mass() for part in tile_parts(q, k, v, layout, positions, attn_mask)])
    torch.testing.assert_close(got.double(), right.mean((0, 3)), rtol=1e-4, atol=1e-5)
