"""Only the sites whose attention no mark reaches are split."""

from evdit_opt.passes.find_split_sites import find_split_sites
from tests.models.branching_dit import branching
from tests.models.toy_dit import toy, toy_inputs, toy_rules

NAMES = tuple(toy_rules(3))


def test_a_branch_between_projections_and_attention_splits_a_site() -> None:
    model = branching(3)
    model.blocks[1].attn1.__class__ = type(toy().blocks[0].attn1)
    assert find_split_sites(model, NAMES, (), toy_inputs()) == {NAMES[0], NAMES[2]}


def test_a_graph_break_between_blocks_splits_none() -> None:
    assert find_split_sites(toy(3, breaks=True), NAMES, (), toy_inputs()) == frozenset()
