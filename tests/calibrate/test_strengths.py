"""Errors of fitted strengths: against the operator, and where the right strength is known."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad

from evdit_opt.calibrate import site_record
from evdit_opt.calibrate.candidates import candidate_rules
from evdit_opt.calibrate.site_record import SiteRecord
from evdit_opt.calibrate.stage import dense_attention, sparse_attention
from evdit_opt.calibrate.strengths import STRENGTHS, FittedRules, unfitted
from evdit_opt.config import Config
from evdit_opt.grid import TokenLayout, VideoGrid
from evdit_opt.masks import MAX_STRENGTH, Rule

CONFIG = Config(references=(1, 2), windows=(0,), weightings=("fitted",), spacings=("centred",))
LAYOUTS = st.builds(
    TokenLayout,
    grid=st.builds(VideoGrid, st.integers(2, 9), st.integers(1, 3), st.integers(1, 3)),
    prefix=st.integers(0, 3),
    suffix=st.integers(0, 3),
)
RULES = st.builds(
    Rule,
    references=st.integers(1, 4),
    window=st.integers(0, 2),
    weighting=st.just("fitted"),
    spacing=st.sampled_from(["paper", "centred"]),
    strength=st.sampled_from([0.1, 0.5, 2 / 3, 1.5, MAX_STRENGTH]),
)


def video(layout: TokenLayout, out: torch.Tensor) -> torch.Tensor:
    start = layout.prefix
    return out[:, :, start : start + layout.grid.tokens].unflatten(2, (layout.grid.frames, -1))


@given(LAYOUTS, st.lists(RULES, min_size=1, max_size=4, unique=True), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_errors_are_those_of_the_operator(layout, rules, seed):
    torch.manual_seed(seed)
    q, k, v = torch.randn(3, 2, 2, layout.seq_len, 8).unbind()
    # Sharp enough for shares near 0 and 1 to occur.
    q = q * 4.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(site_record, "POSITIONS", 10**6)
        patch.setattr(site_record, "FITTED_POSITIONS", 10**6)
        site = SiteRecord(layout, rules)
        site.add(q, k, v)
    exact = [x.double() for x in (q, k, v)]
    dense = video(layout, dense_attention(*exact, None, None))
    eps = torch.finfo(torch.float32).eps
    for found, rule in zip(site.errors(), rules, strict=True):
        plain, sparse = (
            video(layout, sparse_attention(one, layout, *exact, None, None, "reference"))
            for one in (unfitted(rule), rule)
        )
        error = sparse - dense
        # The error is the sum of two vectors, up to ``span`` long, which may cancel. The second one
        # is a step between two outputs, made longer by at most the ratio of the weights.
        span = float((plain - dense).norm() + (sparse - plain).norm()) ** 2
        longer = max(1.0, layout.grid.frames ** (rule.strength - 1))
        for got, wanted, scale in (
            (found.output, error, dense),
            (found.temporal, error.diff(dim=2), dense.diff(dim=2)),
        ):
            scale = float(scale.square().sum())
            slack = 64 * eps * longer * (span + float(dense.square().sum())) / scale
            relative = float(wanted.square().sum()) / scale
            assert got**2 == pytest.approx(relative, rel=1e-4, abs=slack)


def repeating(references: int, strength: float) -> tuple[TokenLayout, list[torch.Tensor]]:
    """Attention in which the references stand for others with just this strength.

    All frames hold the same keys and values, so the tiles of a row repeat, but for the own one. The
    logits of what a row drops are lower by such a constant that its total weight is that of the
    balanced weight to the power of the strength.
    """
    layout = TokenLayout(VideoGrid(9, 4, 5), suffix=3)
    frames, tokens = layout.grid.frames, layout.grid.tokens_per_frame
    kept = Rule(references, spacing="centred").reference_frames(frames)
    ratio = (frames - references - 1) / references
    constant = math.log(((1 + ratio) ** strength - 1) / ratio) if strength else -1e4
    torch.manual_seed(0)
    q = torch.randn(1, 2, layout.seq_len, 8)
    k, v = (torch.randn(1, 2, 1, tokens, 8).repeat(1, 1, frames, 1, 1) for _ in range(2))
    # As many numbers more as there are frames: number i is seen by the queries of frame i only.
    seen = torch.zeros(frames, tokens, frames)
    for frame in range(frames):
        if frame not in kept:
            seen[frame] = constant
        seen[frame, :, frame] = torch.randn(tokens)
    k = torch.cat([k, seen.expand(1, 2, -1, -1, -1)], -1).flatten(2, 3)
    own = torch.eye(frames).repeat_interleave(tokens, 0)
    q = torch.cat([q, pad(own, (0, 0, 0, 3)).expand(1, 2, -1, -1)], -1)
    k, v = pad(k, (0, 0, 0, 3)), pad(v.flatten(2, 3), (0, frames, 0, 3))
    k[:, :, -3:, :8], v[:, :, -3:, :8] = torch.randn(2, 1, 2, 3, 8)
    return layout, [q, k, v]


@pytest.mark.parametrize("references", [1, 2])
@pytest.mark.parametrize("strength", STRENGTHS)
def test_a_known_strength_is_found(references, strength):
    layout, (q, k, v) = repeating(references, strength)
    site = SiteRecord(layout, candidate_rules(CONFIG, layout.grid.frames))
    site.add(q, k, v, scale=1.0)
    found = sorted(
        (c for c in site.errors() if c.rule.references == references), key=lambda c: c.output
    )
    best = found[0].rule
    names = {0.0: "none", 1.0: "balanced"}
    assert best.weighting == names.get(strength, "fitted")
    assert best.weighting != "fitted" or best.strength == strength
    assert len(found) == len(STRENGTHS)
    # The others are far off, and it is exact: what is left is rounding, see above.
    assert found[0].output < 2e-3 < 1e-2 < found[1].output


def test_rules_without_a_strength_have_no_part_in_it():
    assert FittedRules((Rule(2), Rule(1, weighting="balanced"), Rule(0, 1)), 8).bases == ()
    fitted = [Rule(2, weighting="fitted", strength=s) for s in (0.5, 0.75)]
    assert FittedRules(fitted, 8).bases == (Rule(2), Rule(2, weighting="balanced"))
