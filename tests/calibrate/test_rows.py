"""Sampled rows of the attention map are those of a dense softmax."""

import pytest
import torch

from evdit_opt.calibrate import rows as rows_module
from evdit_opt.calibrate.rows import attention_rows, sample_rows
from evdit_opt.grid import TokenLayout, VideoGrid


@pytest.mark.parametrize("max_elements", [1, 1 << 22], ids=["head by head", "all at once"])
@pytest.mark.parametrize("masked", [False, True], ids=["all keys", "padding"])
@pytest.mark.parametrize("heads", [(3, 3), (4, 2), (2, 1)], ids=str)
def test_rows_are_those_of_the_dense_map(monkeypatch, heads, masked, max_elements) -> None:
    monkeypatch.setattr(rows_module, "MAX_ELEMENTS", max_elements)
    layout = TokenLayout(VideoGrid(6, 3, 5), prefix=3, suffix=7)
    torch.manual_seed(0)
    q = torch.randn(2, heads[0], layout.seq_len, 8, dtype=torch.float64)
    k = torch.randn(2, heads[1], layout.seq_len, 8, dtype=torch.float64)
    mask = torch.rand(2, 1, 1, layout.seq_len) < 0.7 if masked else None
    sample = sample_rows(layout, torch.Generator().manual_seed(1))
    assert len(sample.frames) == len(sample.positions) == 4
    got = torch.cat(list(attention_rows(q, k, layout, sample, mask, 0.4)), 1)
    logits = q @ k.repeat_interleave(heads[0] // heads[1], 1).transpose(2, 3) * 0.4
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    dense = logits.softmax(-1)
    for i, frame in enumerate(sample.frames.tolist()):
        for j, position in enumerate(sample.positions.tolist()):
            row = dense[:, :, layout.frame_slice(frame)][:, :, position]
            torch.testing.assert_close(got[:, :, i, j], row, rtol=1e-12, atol=1e-15)


def test_a_small_clip_is_looked_at_whole() -> None:
    layout = TokenLayout(VideoGrid(3, 1, 2))
    sample = sample_rows(layout, torch.Generator().manual_seed(0))
    assert sample.frames.tolist() == [0, 1, 2]
    assert sample.positions.tolist() == [0, 1]


def test_keys_that_are_all_hidden_get_nothing() -> None:
    layout = TokenLayout(VideoGrid(2, 1, 2))
    q = torch.randn(1, 1, 4, 8)
    sample = sample_rows(layout, torch.Generator().manual_seed(0))
    (rows,) = attention_rows(q, q, layout, sample, torch.zeros(1, 1, 1, 4, dtype=torch.bool))
    assert rows.eq(0).all()
