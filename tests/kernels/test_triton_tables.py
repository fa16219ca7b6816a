"""The tables of the fused kernels cover every kept pair of tokens once, and nothing else."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evdit_opt.grid import TokenLayout, VideoGrid
from evdit_opt.kernels.geometry import Geometry
from evdit_opt.kernels.triton_tables import TILE_COLUMNS, Tables, make_tables
from evdit_opt.masks import MAX_FRAMES, Rule, TileMask
from tests.kernels.oracle import masks

CPU = torch.device("cpu")


def tables_of(mask: TileMask, geometry: Geometry, block: int, transposed: bool) -> Tables:
    make = make_tables.__wrapped__  # without keeping thousands of tables
    return make(*mask.segments(), geometry, block, CPU, transposed)


def meetings(tables: Tables, seq: int, block: int) -> np.ndarray:
    """How each token meets each: NaN if it does not, the weight if once. # [seq, seq]

    Fails where a pair meets twice, a token has no tile or two, or a class is not one.
    """
    met = np.full((seq, seq), np.nan)
    tiles = tables.tiles.tolist()
    ranges = tables.ranges.tolist()
    weights = tables.weights.tolist()
    assert sorted(token for start, stop, *_ in tiles for token in range(start, stop)) == [
        *range(seq)
    ]
    costs = []
    for n, (start, stop, first, last, class_start, class_size) in enumerate(tiles):
        assert 0 < stop - start <= block
        assert class_start <= n < class_start + class_size
        assert {tuple(tile[4:]) for tile in tiles[class_start : class_start + class_size]} == {
            (class_start, class_size)
        }
        for (begin, end), weight in zip(ranges[first:last], weights[first:last], strict=True):
            assert begin < end
            assert np.isnan(met[start:stop, begin:end]).all()
            met[start:stop, begin:end] = weight
        costs.append(sum(end - begin for begin, end in ranges[first:last]))
    assert costs == sorted(costs, reverse=True)
    return met


def expected(mask: TileMask, geometry: Geometry) -> np.ndarray:
    grid = VideoGrid(geometry.frames, geometry.tokens, 1)
    layout = TokenLayout(grid, prefix=geometry.prefix, suffix=geometry.suffix)
    return np.where(np.isneginf(full := mask.expand(layout).numpy()), np.nan, full)


def check(mask: TileMask, geometry: Geometry, block: int) -> None:
    kept = expected(mask, geometry)
    by_query = tables_of(mask, geometry, block, transposed=False)
    by_key = tables_of(mask, geometry, block, transposed=True)
    np.testing.assert_array_equal(meetings(by_query, geometry.seq_len, block), kept)
    np.testing.assert_array_equal(meetings(by_key, geometry.seq_len, block), kept.T)
    weighted = bool(np.nansum(np.abs(kept)))
    assert by_query.is_weighted == by_key.is_weighted == weighted


@pytest.mark.parametrize("frames", range(1, 13))
def test_every_rule_up_to_twelve_frames(frames: int) -> None:
    every = {
        Rule(references, window, weighting, spacing).mask(frames)
        for references, window, weighting, spacing in itertools.product(
            range(frames + 1), range(frames), ("none", "balanced"), ("paper", "centred")
        )
    }
    for mask in every:
        check(mask, Geometry(frames=frames, tokens=3, prefix=2, suffix=1), block=2)
        check(mask, Geometry(frames=frames, tokens=1, prefix=0, suffix=0), block=2)


@given(
    st.integers(1, 9).flatmap(masks), st.integers(1, 9), st.integers(0, 5), st.integers(0, 5),
    st.integers(1, 12),
)  # fmt: skip
def test_any_mask(mask: TileMask, tokens: int, prefix: int, suffix: int, block: int) -> None:
    geometry = Geometry(frames=mask.frames, tokens=tokens, prefix=prefix, suffix=suffix)
    check(mask, geometry, block)


@pytest.mark.parametrize("transposed", [False, True], ids=["queries", "keys"])
@pytest.mark.parametrize("tokens", [1, 7, 1350, 1560, 3600])
def test_frames_of_real_models(tokens: int, transposed: bool) -> None:
    """Token by token at the borders of frames, where blocks of 128 do not fit."""
    mask = Rule(2, 1, "balanced").mask(7)
    geometry = Geometry(frames=7, tokens=tokens, prefix=226, suffix=77)
    tables = tables_of(mask, geometry, 128, transposed)
    ranges = tables.ranges.tolist()
    seq, text = geometry.seq_len, 226
    frame = np.full(seq, -1)
    frame[text : text + 7 * tokens] = np.repeat(np.arange(7), tokens)
    table = np.zeros((8, 8))
    table[:7, :7] = np.array(mask.rows).T if transposed else np.array(mask.rows)
    borders = {text + i * tokens + offset for i in range(8) for offset in (-1, 0)}
    for token in sorted(borders | {0, seq - 1}):
        (tile,) = [t for t in tables.tiles.tolist() if t[0] <= token < t[1]]
        assert tile[1] - tile[0] <= 128
        met = np.full(seq, -np.inf)
        for (start, stop), weight in zip(
            ranges[tile[2] : tile[3]], tables.weights[tile[2] : tile[3]].tolist(), strict=True
        ):
            assert np.isneginf(met[start:stop]).all()
            met[start:stop] = weight
        np.testing.assert_array_equal(met, table[frame[token]][frame])


def test_a_key_that_no_query_sees_has_no_range() -> None:
    mask = TileMask(((0.0, -math.inf), (0.0, -math.inf)))
    geometry = Geometry(frames=2, tokens=4, prefix=0, suffix=0)
    tiles = tables_of(mask, geometry, 4, transposed=True).tiles.tolist()
    assert [tile[:4] for tile in tiles] == [[0, 4, 0, 1], [4, 8, 1, 1]]


def test_the_papers_mask() -> None:
    geometry = Geometry(frames=4, tokens=100, prefix=8, suffix=0)
    tables = tables_of(Rule(1).mask(4), geometry, 128, transposed=False)
    assert tables.tiles.shape == (4, TILE_COLUMNS)
    # Text and the reference frame are one run of tokens that sees everything; the others see 208.
    assert tables.tiles.tolist() == [
        [0, 108, 0, 1, 0, 1], [108, 208, 1, 2, 1, 3],
        [208, 308, 2, 4, 1, 3], [308, 408, 4, 6, 1, 3],
    ]  # fmt: skip
    frames_2_and_3 = [[0, 108], [208, 308], [0, 108], [308, 408]]
    assert tables.ranges.tolist() == [[0, 408], [0, 208], *frames_2_and_3]


def test_the_size_does_not_grow_with_the_pairs() -> None:
    geometry = Geometry(frames=128, tokens=3600, prefix=0, suffix=256)
    tables = tables_of(Rule(4).mask(128), geometry, 128, transposed=False)
    assert tables.tiles.shape[0] < geometry.seq_len / 128 + 128 + 2
    assert tables.ranges.shape[0] < 6 * 128
    assert MAX_FRAMES * 3600 < 2**31  # tokens are counted in 32 bits
