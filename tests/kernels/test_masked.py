"""The masked implementation's limit, and that it holds the mask once."""

import pytest
import torch

from evdit_opt.errors import UnsupportedInputError
from evdit_opt.grid import TokenLayout, VideoGrid
from evdit_opt.kernels import masked, tile_attention
from evdit_opt.masks import Rule


def test_long_sequences_are_refused() -> None:
    layout = TokenLayout(VideoGrid(2, masked.MAX_SEQ // 2, 1), suffix=1)
    x = torch.zeros(1, 1, layout.seq_len, 8)
    with pytest.raises(UnsupportedInputError, match=r"at most 2048 tokens.*got 2049"):
        tile_attention(x, x, x, Rule(1).mask(2), layout, impl="masked")


def test_the_expanded_mask_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = TokenLayout(VideoGrid(3, 5, 1), prefix=2)
    x = torch.randn(1, 2, layout.seq_len, 8)
    masked.pair_bias.cache_clear()
    for _ in range(3):
        tile_attention(x, x, x, Rule(1, weighting="balanced").mask(3), layout, impl="masked")
    assert masked.pair_bias.cache_info().misses == 1
