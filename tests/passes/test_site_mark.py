"""Marks in graphs: what they say, that they never run, and that they leave no trace."""

from operator import getitem

import pytest
import torch
from torch import fx

from evdit_opt.errors import PlanMismatchError
from evdit_opt.masks import Rule
from evdit_opt.passes.site_mark import MARK, MARK_QKV, SiteSpec, facts_of, remove_mark

FACTS = (SiteSpec(Rule()).encode(), 2, 1, None, "sparse", None, None, None, None)


@pytest.mark.parametrize(
    "spec",
    [
        SiteSpec(Rule()),
        SiteSpec(Rule(0, 3, "none", "paper"), 226, 0, 4096),
        SiteSpec(Rule(3, 2, "balanced", "centred"), 5, 77, 1000),
        SiteSpec(Rule(3, 2, "fitted", "centred", 1 / 3), 5, 77, 1000),
    ],
    ids=["default", "window", "balanced", "fitted"],
)
def test_a_spec_survives_its_string(spec: SiteSpec) -> None:
    assert SiteSpec.decode(spec.encode()) == spec


def test_a_mark_that_runs_is_an_error() -> None:
    with pytest.raises(PlanMismatchError, match="a site mark was left in it"):
        MARK(torch.ones(1, 2, 3), *FACTS)
    with pytest.raises(PlanMismatchError, match="a site mark was left in it"):
        MARK_QKV(*[torch.ones(1, 2, 3, 4)] * 3, *FACTS)


def test_both_kinds_say_the_same_and_are_taken_out_again() -> None:
    graph = fx.Graph()
    q, k, v = (graph.placeholder(name) for name in "qkv")
    one = graph.call_function(MARK, (q, *FACTS))
    three = graph.call_function(MARK_QKV, (one, k, v, *FACTS))
    parts = [graph.call_function(getitem, (three, number)) for number in range(3)]
    graph.output(graph.call_function(torch.cat, (parts,)))
    assert facts_of(one) == facts_of(three) == FACTS
    remove_mark(three)
    remove_mark(one)
    graph.lint()
    assert [node.op for node in graph.nodes] == ["placeholder"] * 3 + ["call_function", "output"]
    tensors = [torch.full((1,), float(number)) for number in range(3)]
    assert fx.GraphModule({}, graph)(*tensors).tolist() == [0.0, 1.0, 2.0]
