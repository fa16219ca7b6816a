"""Marks from module names; whole models are in tests/test_backend.py."""

import pytest

from evdit_opt.errors import LayoutError, PlanMismatchError
from evdit_opt.masks import Rule
from evdit_opt.passes.mark_planned_sites import mark_planned_sites
from evdit_opt.passes.swap_attention import match_marks
from tests.models.toy_dit import GRID, make_plan, toy
from tests.passes.graph_builder import GraphBuilder, calls

SITE = "blocks.0.attn1"
PLAN = make_plan(toy(), {SITE: Rule(1), "blocks.1.attn1": None})


def start() -> tuple[GraphBuilder, object, object]:
    build = GraphBuilder()
    latent = (GRID.frames, 2 * GRID.height, 2 * GRID.width)
    build.input("l_hidden_states_", 1, 4, *latent)
    build.layer = SITE
    tokens = build.input("l_x_", 1, GRID.tokens, 16), build.input("l_text_", 1, GRID.tokens, 16)
    return build, *tokens


def test_only_the_planned_self_attention_is_marked() -> None:
    build, x, text = start()
    own = build.attend(x)
    cross = build.attend(x, text)
    build.layer = "blocks.1.attn1"
    gm = build.module(own, cross, build.attend(own))
    mark_planned_sites(gm, PLAN, None)
    ((mark, (call,)),) = match_marks(gm.graph)
    assert mark.args[2:4] == (GRID.frames, GRID.tokens_per_frame)
    assert call is calls(gm, "scaled_dot_product")[0]
    gm.graph.lint()


def test_a_planned_site_that_is_not_there_is_an_error() -> None:
    build, x, text = start()
    gm = build.module(build.attend(x, text))
    with pytest.raises(PlanMismatchError, match=r"blocks\.0\.attn1.*apply_plan"):
        mark_planned_sites(gm, PLAN, None)


def test_two_videos_need_the_callers_word() -> None:
    build, x, _ = start()
    gm = build.module(build.attend(x))
    gm.graph.find_nodes(op="placeholder")[0].target = "l_other_"
    with gm.graph.inserting_before():
        second = gm.graph.placeholder("l_another_")
    second.meta = dict(gm.graph.find_nodes(op="placeholder")[1].meta)
    with pytest.raises(LayoutError, match="l_other_"):
        mark_planned_sites(gm, PLAN, None)
    mark_planned_sites(gm, PLAN, GRID)
    assert len(list(match_marks(gm.graph))) == 1
