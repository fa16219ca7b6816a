import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evdit_opt.errors import MaskError
from evdit_opt.grid import TokenLayout, VideoGrid
from evdit_opt.masks import DROPPED, MAX_FRAMES, MAX_STRENGTH, Rule, TileMask, block_density

FRAMES = st.integers(1, 64)
SPANNED = {
    "references": st.integers(0, 70),  # more than there are frames, too
    "window": st.integers(0, 6),
    "spacing": st.sampled_from(["paper", "centred"]),
}
SIMPLE = st.builds(Rule, weighting=st.sampled_from(["none", "balanced"]), **SPANNED)
FITTED = st.builds(
    Rule, weighting=st.just("fitted"), strength=st.floats(0, MAX_STRENGTH), **SPANNED
)
RULES = SIMPLE | FITTED
LAYOUTS = st.builds(
    TokenLayout,
    grid=st.builds(VideoGrid, st.integers(1, 9), st.integers(1, 3), st.integers(1, 3)),
    prefix=st.integers(0, 5),
    suffix=st.integers(0, 5),
)

# Table 1 of arXiv 2502.06155: frames, references, sparsity in percent as printed, and frame-exact.
TABLE_1 = [
    (8, 4, "17.60", "18.75"),
    (8, 3, "29.88", "31.25"),
    (8, 2, "45.47", "46.88"),
    (8, 1, "64.38", "65.63"),
    (24, 12, "21.51", "22.92"),
    (24, 8, "40.30", "41.67"),
    (24, 6, "51.88", "53.13"),
    (24, 4, "64.98", "65.97"),
    (24, 3, "72.05", "72.92"),
]


def second_reading(rule: Rule, frames: int) -> list[list[float]]:
    """Weights of all tiles, 0 for a dropped one, from the definition and not from the code."""
    references: set[int] = set()
    if rule.references and rule.spacing == "paper":
        step = -(-frames // min(rule.references, frames))
        references = {frame for frame in range(frames) if frame % step == 0}
    elif rule.references:
        part = frames / min(rule.references, frames)
        references = {int((n + 0.5) * part + 1e-9) for n in range(min(rule.references, frames))}
    weights = []
    for i in range(frames):
        band = {j for j in range(frames) if i - rule.window <= j <= i + rule.window}
        kept = set(range(frames)) if i in references else band | references
        row = [1.0 if j in kept else 0.0 for j in range(frames)]
        if rule.weighting != "none" and references and i not in references:
            for j in references:
                row[j] = (1 + (frames - len(kept)) / len(references)) ** rule.strength
        weights.append(row)
    return weights


@pytest.mark.parametrize(("frames", "references", "blocks", "exact"), TABLE_1)
def test_table_1_to_the_printed_digit(
    frames: int, references: int, blocks: str, exact: str
) -> None:
    mask = Rule(references).mask(frames)
    layout = TokenLayout(VideoGrid(frames, 45, 80))
    assert f"{100 * (1 - block_density(mask, layout, block=128)):.2f}" == blocks
    assert 100 * (1 - mask.density) == pytest.approx(float(exact), abs=0.005 + 1e-9)
    closed_form = ((frames - references) ** 2 - (frames - references)) / frames**2
    assert 1 - mask.density == pytest.approx(closed_form)
    assert Rule(references).describe(frames) == f"{references}:{frames - references}"


@given(RULES, FRAMES)
def test_a_mask_is_its_definition(rule: Rule, frames: int) -> None:
    weights = torch.tensor(rule.mask(frames).rows, dtype=torch.float64).exp()
    torch.testing.assert_close(
        weights, torch.tensor(second_reading(rule, frames), dtype=torch.float64), rtol=1e-6, atol=0
    )


@given(RULES, LAYOUTS)
def test_the_expanded_mask_is_exact_for_every_token(rule: Rule, layout: TokenLayout) -> None:
    frames, tokens = layout.grid.frames, layout.grid.tokens_per_frame
    frame_of = [-1] * layout.prefix
    frame_of += [frame for frame in range(frames) for _ in range(tokens)]
    frame_of += [-1] * layout.suffix
    weights = second_reading(rule, frames)
    expected = [[1.0 if i < 0 or j < 0 else weights[i][j] for j in frame_of] for i in frame_of]
    expanded = rule.mask(frames).expand(layout)
    assert expanded.shape == (layout.seq_len, layout.seq_len)
    torch.testing.assert_close(expanded.exp(), torch.tensor(expected), rtol=1e-5, atol=0)


@given(RULES, LAYOUTS)
def test_densities_count_what_is_kept(rule: Rule, layout: TokenLayout) -> None:
    mask = rule.mask(layout.grid.frames)
    kept = mask.expand(layout) != DROPPED
    assert mask.token_density(layout) == pytest.approx(kept.double().mean().item())
    video = slice(layout.prefix, layout.prefix + layout.grid.tokens)
    assert mask.density == pytest.approx(kept[video, video].double().mean().item())
    assert block_density(mask, layout, block=1) == pytest.approx(kept.double().mean().item())
    assert block_density(mask, layout, block=3) >= mask.token_density(layout) - 1e-6


@given(FITTED, FRAMES)
def test_a_strength_of_0_is_no_weighting_and_of_1_the_balanced_one(rule: Rule, frames: int) -> None:
    for strength, same in ((0.0, "none"), (1.0, "balanced")):
        simple = replace(rule, weighting=same, strength=1.0)
        assert replace(rule, strength=strength).mask(frames) == simple.mask(frames)


@given(SIMPLE, FRAMES)
def test_balanced_keeps_the_total_count_of_frames(rule: Rule, frames: int) -> None:
    if rule.weighting == "none" or rule.references == 0:
        return
    totals = rule.mask(frames).bias.double().exp().sum(1)
    torch.testing.assert_close(totals, torch.full_like(totals, frames), rtol=1e-6, atol=0)


@given(RULES, FRAMES)
def test_every_rule_fits_every_length(rule: Rule, frames: int) -> None:
    mask = rule.mask(frames)
    kept = mask.bias != DROPPED
    assert mask.frames == frames
    assert kept.diagonal().all()
    assert torch.equal(kept, kept.T)
    assert len(rule.reference_frames(frames)) <= rule.references
    if rule.references >= frames:
        assert mask.is_dense
    assert rule.describe(frames)


@given(RULES, FRAMES)
def test_segments_and_json_round_trip(rule: Rule, frames: int) -> None:
    mask = rule.mask(frames)
    intervals, weights = mask.segments()
    assert TileMask.from_segments(frames, intervals, weights) == mask
    assert TileMask.from_json(mask.to_json()) == mask
    assert TileMask.from_bias(mask.bias) == mask


def test_kept_tiles_grow_linearly_with_the_frames() -> None:
    lengths = [32, 64, 128, 256, 512]
    kept = [Rule(2, window=1).mask(frames).density * frames**2 for frames in lengths]
    slope = math.log(kept[-1] / kept[0]) / math.log(lengths[-1] / lengths[0])
    assert slope == pytest.approx(1.0, abs=0.05)


def test_full_is_dense() -> None:
    assert TileMask.full(5).is_dense
    assert TileMask.full(5).density == 1.0
    assert not Rule(1, weighting="balanced").mask(4).is_dense


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ((), "1 to 4096 frames in a tile mask, got 0"),
        (((0.0, 0.0),), "square"),
        (((math.nan,),), "NaN"),
        (((math.inf,),), "inf"),
        (((DROPPED, DROPPED), (0.0, 0.0)), "row 0 has none"),
    ],
    ids=["empty", "not-square", "nan", "plus-inf", "empty-row"],
)
def test_an_impossible_mask_is_refused(rows: tuple[tuple[float, ...], ...], match: str) -> None:
    with pytest.raises(MaskError, match=match):
        TileMask(rows)


@pytest.mark.parametrize(
    "arguments",
    [
        {"references": -1},
        {"references": True},
        {"references": 2.0},
        {"references": MAX_FRAMES + 1},
        {"window": -1},
        {"weighting": "heavy"},
        {"spacing": "random"},
        {"strength": 0.5},
        {"weighting": "balanced", "strength": 2.0},
        {"weighting": "fitted", "strength": -0.1},
        {"weighting": "fitted", "strength": MAX_STRENGTH + 0.1},
        {"weighting": "fitted", "strength": math.nan},
        {"weighting": "fitted", "strength": 2},
        {"weighting": "fitted", "strength": "1.0"},
    ],
    ids=str,
)
def test_an_impossible_rule_is_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(MaskError, match="expected Rule"):
        Rule(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("frames", [0, -1, MAX_FRAMES + 1])
def test_an_impossible_length_is_refused(frames: int) -> None:
    with pytest.raises(MaskError, match="expected 1 to 4096 frames"):
        Rule().mask(frames)


@pytest.mark.parametrize(
    ("intervals", "weights"),
    [((0, 0, 1), ()), ((0, 0, 3), (0.0,)), ((0, 1, 1), (0.0,)), ((2, 0, 1), (0.0,))],
    ids=["counts-differ", "past-the-end", "empty", "no-such-row"],
)
def test_impossible_segments_are_refused(
    intervals: tuple[int, ...], weights: tuple[float, ...]
) -> None:
    with pytest.raises(MaskError, match="expected"):
        TileMask.from_segments(2, intervals, weights)


def test_a_mask_for_other_frames_is_refused() -> None:
    layout = TokenLayout(VideoGrid(4, 2, 2))
    for use in (Rule(1).mask(5).expand, Rule(1).mask(5).token_density):
        with pytest.raises(MaskError, match="expected a mask of 4 frames"):
            use(layout)
