"""FlexAttention's view of a tile mask: its blocks, and what it refuses."""

import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from evdit_opt.errors import UnsupportedInputError
from evdit_opt.grid import TokenLayout, VideoGrid
from evdit_opt.kernels import flex, tile_attention
from evdit_opt.kernels.geometry import Geometry
from evdit_opt.masks import DROPPED, Rule, TileMask
from tests.kernels.oracle import masks, strided

CPU = torch.device("cpu")


@st.composite
def geometries(draw: st.DrawFn) -> tuple[TileMask, Geometry]:
    frames = draw(st.integers(1, 7))
    geometry = Geometry(
        frames=frames,
        tokens=draw(st.sampled_from([1, 50, 64, 127, 128, 129, 256])),
        prefix=draw(st.sampled_from([0, 3, 128])),
        suffix=draw(st.sampled_from([0, 77])),
    )
    return draw(masks(frames)), geometry


@given(geometries())
@settings(max_examples=60)
def test_blocks_are_those_of_the_token_mask(drawn: tuple[TileMask, Geometry]) -> None:
    mask, geometry = drawn
    layout = TokenLayout(
        VideoGrid(geometry.frames, geometry.tokens, 1), geometry.prefix, geometry.suffix
    )
    kept = mask.expand(layout) != DROPPED
    seq = geometry.seq_len
    expected = create_block_mask(lambda b, h, i, j: kept[i, j], 1, 1, seq, seq, device="cpu")
    mine = flex.make_block_mask(*mask.segments(), geometry, CPU)
    assert mine.shape == expected.shape
    assert torch.equal(mine.to_dense(), expected.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(mine, name), getattr(expected, name)), name
    rows, columns = (torch.arange(seq)[:, None], torch.arange(seq)[None])
    assert torch.equal(mine.mask_mod(torch.tensor(0), torch.tensor(0), rows, columns), kept)


def test_another_mask_of_the_same_shape_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []

    def count(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        graphs.append(gm)
        return gm.forward

    monkeypatch.setattr(flex, "COMPILER", count)
    flex._compiled.cache_clear()
    layout = TokenLayout(VideoGrid(5, 40, 1))
    q, k, v = strided("transposed", 1, layout.seq_len, (2, 2, 2), 16)
    for rule in (Rule(1), Rule(2), Rule(0, 1)):
        tile_attention(q, k, v, rule.mask(5), layout, impl="flex")
    assert len(graphs) == 1
    flex._compiled.cache_clear()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"impl": "flex"}, "CUDA device for impl='flex', got cpu.*log-sum-exp"),
        ({"impl": "flex_flash"}, "CUDA device for impl='flex_flash'"),
    ],
)
def test_what_it_cannot_do_is_an_error(options: dict[str, str], message: str) -> None:
    layout = TokenLayout(VideoGrid(2, 4, 1))
    x = torch.zeros(1, 1, 8, 16)
    for function in (tile_attention, torch.compile(tile_attention, backend="eager")):
        with pytest.raises((UnsupportedInputError, RuntimeError), match=message):
            function(x, x, x, Rule(1).mask(2), layout, **options)


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="it is installed")
def test_flash_attn_must_be_installed() -> None:
    x = torch.empty(1, 1, 8, 16, device="meta")
    with pytest.raises(UnsupportedInputError, match="flash-attn 4"):
        flex.check(x, "FLASH")
