"""The pass on graphs made by hand: what it rewrites, what it leaves, what it refuses."""

import pytest
import torch

from evdit_opt.errors import LayoutError, PlanMismatchError
from evdit_opt.masks import Rule
from evdit_opt.passes.site_mark import SiteSpec
from evdit_opt.passes.swap_attention import swap_attention
from tests.passes.graph_builder import GraphBuilder, calls

FRAMES, TOKENS = 4, 6
VIDEO = FRAMES * TOKENS
SPEC = SiteSpec(Rule(1))


def start(tokens: int = VIDEO) -> tuple[GraphBuilder, torch.fx.Node]:
    build = GraphBuilder()
    x = build.input("l_x_", 1, tokens, 16)
    build.layer = "blocks.0.attn1"
    return build, x


def test_a_marked_attention_is_rewritten_and_the_mark_goes() -> None:
    build, x = start()
    gm = build.module(build.attend(build.mark(x, SPEC, FRAMES, TOKENS)))

    (outcome,) = swap_attention(gm, build.names, "decomposed")

    assert (outcome.name, outcome.reason) == ("blocks.0.attn1", "")
    assert outcome.density == Rule(1).mask(FRAMES).density
    assert not calls(gm, "mark")
    assert not calls(gm, "scaled_dot_product")
    (op,) = calls(gm, "tile_attention")
    intervals, log_weights = Rule(1).mask(FRAMES).segments()
    assert op.args[4:] == (
        list(intervals),
        list(log_weights),
        FRAMES,
        TOKENS,
        0,
        0,
        None,
        "decomposed",
    )
    gm.graph.lint()


def test_scale_and_key_padding_are_kept() -> None:
    build, x = start()
    padding = build.input("l_mask_", 1, 1, 1, VIDEO, dtype=torch.bool)
    marked = build.mark(x, SPEC, FRAMES, TOKENS)
    gm = build.module(build.attend(marked, attn_mask=padding, scale=0.5))
    swap_attention(gm, build.names, "auto")
    (op,) = calls(gm, "tile_attention")
    assert op.args[3] is padding
    assert op.args[10] == 0.5


def test_each_site_gets_its_own_rule() -> None:
    build, x = start()
    rules = (Rule(1), Rule(0, window=1))
    for number, rule in enumerate(rules):
        build.layer = f"blocks.{number}.attn1"
        x = build.add(x, build.attend(build.mark(x, SiteSpec(rule), FRAMES, TOKENS)))
    gm = build.module(x)
    outcomes = swap_attention(gm, build.names, "auto")
    assert [o.name for o in outcomes] == ["blocks.0.attn1", "blocks.1.attn1"]
    assert [op.args[4] for op in calls(gm, "tile_attention")] == [
        list(rule.mask(FRAMES).segments()[0]) for rule in rules
    ]


def test_cross_attention_in_the_marked_module_is_left_alone_though_text_is_as_long() -> None:
    build, x = start()
    text = build.input("l_text_", 1, VIDEO, 16)
    marked = build.mark(x, SPEC, FRAMES, TOKENS)
    gm = build.module(build.attend(marked), build.attend(marked, text))
    swap_attention(gm, build.names, "auto")
    assert len(calls(gm, "tile_attention")) == 1
    assert len(calls(gm, "scaled_dot_product")) == 1


def test_an_attention_that_sees_two_marks_is_nobodys() -> None:
    build, x = start()
    first = build.mark(x, SPEC, FRAMES, TOKENS)
    second = build.mark(x, SiteSpec(Rule(2)), FRAMES, TOKENS)
    gm = build.module(build.attend(build.add(first, second)))
    with pytest.raises(PlanMismatchError, match=r"blocks\.0\.attn1.*not rewritten"):
        swap_attention(gm, build.names, "auto")


def test_a_mark_without_attention_is_an_error_with_the_sites_name() -> None:
    build, x = start()
    gm = build.module(build.linear(build.mark(x, SPEC, FRAMES, TOKENS)))
    with pytest.raises(PlanMismatchError, match=r"blocks\.0\.attn1"):
        swap_attention(gm, build.names, "auto")


def test_a_mark_behind_another_attention_does_not_count() -> None:
    build, x = start()
    inner = build.attend(build.mark(x, SPEC, FRAMES, TOKENS))
    gm = build.module(build.attend(inner))
    swap_attention(gm, build.names, "auto")
    (op,) = calls(gm, "tile_attention")
    (dense,) = calls(gm, "scaled_dot_product")
    assert list(gm.graph.nodes).index(op) < list(gm.graph.nodes).index(dense)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"is_causal": True}, "causal"), ({"dropout_p": 0.1}, "dropout 0.1")],
    ids=["causal", "dropout"],
)
def test_what_the_operator_cannot_keep_is_refused(kwargs: dict, message: str) -> None:
    build, x = start()
    gm = build.module(build.attend(build.mark(x, SPEC, FRAMES, TOKENS), **kwargs))
    with pytest.raises(PlanMismatchError, match=message):
        swap_attention(gm, build.names, "auto")


def test_a_query_dependent_mask_is_refused() -> None:
    build, x = start()
    mask = build.input("l_mask_", 1, 1, VIDEO, VIDEO)
    gm = build.module(build.attend(build.mark(x, SPEC, FRAMES, TOKENS), attn_mask=mask))
    with pytest.raises(PlanMismatchError, match="hide different keys"):
        swap_attention(gm, build.names, "auto")


@pytest.mark.parametrize(
    ("prefix", "suffix", "text", "expected"),
    [(7, 0, 7, (7, 0)), (7, 0, 9, (9, 0)), (0, 7, 9, (0, 9)), (3, 4, 7, (3, 4))],
    ids=["prefix", "longer-prefix", "longer-suffix", "both"],
)
def test_text_goes_where_it_was_in_calibration(
    prefix: int, suffix: int, text: int, expected: tuple[int, int]
) -> None:
    build, x = start(VIDEO + text)
    spec = SiteSpec(Rule(1), prefix, suffix)
    gm = build.module(build.attend(build.mark(x, spec, FRAMES, TOKENS)))
    swap_attention(gm, build.names, "auto")
    (op,) = calls(gm, "tile_attention")
    assert op.args[8:10] == expected


@pytest.mark.parametrize(
    ("prefix", "suffix", "text"),
    [(0, 0, 7), (3, 4, 8), (7, 0, -1)],
    ids=["text-where-none-was", "text-on-both-sides-changed", "less-than-the-video"],
)
def test_a_sequence_that_does_not_fit_is_an_error(prefix: int, suffix: int, text: int) -> None:
    build, x = start(VIDEO + text)
    spec = SiteSpec(Rule(1), prefix, suffix)
    gm = build.module(build.attend(build.mark(x, spec, FRAMES, TOKENS)))
    with pytest.raises(LayoutError, match=r"blocks\.0\.attn1.*sequence of"):
        swap_attention(gm, build.names, "auto")


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (SiteSpec(Rule(1), min_tokens=100), "24 tokens, the plan is for at least 100"),
        (SiteSpec(Rule(4)), "keeps every tile of 4 frames"),
    ],
    ids=["too-short", "full-mask"],
)
def test_a_site_that_would_not_gain_stays_dense_and_says_why(spec: SiteSpec, reason: str) -> None:
    build, x = start()
    gm = build.module(build.attend(build.mark(x, spec, FRAMES, TOKENS)))
    (outcome,) = swap_attention(gm, build.names, "auto")
    assert outcome.density == 1.0
    assert reason in outcome.reason
    assert not calls(gm, "tile_attention")
    assert not calls(gm, "mark")


def test_a_spec_survives_its_string() -> None:
    spec = SiteSpec(Rule(3, 2, "balanced", "centred"), 5, 0, 1000)
    assert SiteSpec.decode(spec.encode()) == spec
