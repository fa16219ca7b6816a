"""Decisions about tensors; those about nodes of a graph are tested in test_swap_attention.py."""

import pytest
import torch

from evdit_opt.errors import LayoutError, PlanMismatchError
from evdit_opt.masks import Rule
from evdit_opt.passes.decide_site import decide, text_around
from evdit_opt.passes.graph import Attention
from evdit_opt.passes.site_mark import SiteSpec


def attention(seq: int, **kwargs: object) -> Attention:
    x = torch.empty(1, 2, seq, 8)
    return Attention(x, x, x, **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prefix", "suffix", "seq", "text"),
    [(0, 0, 24, (0, 0)), (5, 0, 31, (7, 0)), (0, 5, 27, (0, 3)), (5, 2, 31, (5, 2))],
)
def test_text_lies_where_it_lay_in_calibration(prefix, suffix, seq, text) -> None:
    spec = SiteSpec(Rule(1), prefix, suffix)
    decision = decide(attention(seq), spec, 4, 6, "site")
    assert text_around(seq, 4, 6, spec, "site") == text
    assert decision.reason == ""
    assert decision.mask == Rule(1).mask(4)


@pytest.mark.parametrize(("prefix", "suffix", "seq"), [(0, 0, 25), (5, 0, 23), (5, 2, 30)])
def test_other_text_is_an_error(prefix, suffix, seq) -> None:
    with pytest.raises(LayoutError, match=f"at here .* a sequence of {seq}"):
        text_around(seq, 4, 6, SiteSpec(Rule(1), prefix, suffix), "here")


def test_what_stays_dense_says_why() -> None:
    short = decide(attention(24), SiteSpec(Rule(1), min_tokens=25), 4, 6, "site")
    assert short.reason == "24 tokens, the plan is for at least 25"
    full = decide(attention(24), SiteSpec(Rule(4)), 4, 6, "site")
    assert full.reason == "rule 4 references keeps every tile of 4 frames"
    outcome = full.outcome("site", SiteSpec(Rule(4)), "scope")
    assert (outcome.density, outcome.reason, outcome.way) == (1.0, full.reason, "scope")


def test_what_cannot_be_sparse_is_an_error() -> None:
    with pytest.raises(PlanMismatchError, match=r"at here .* causal"):
        decide(attention(24, is_causal=True), SiteSpec(Rule(1)), 4, 6, "here")
    with pytest.raises(PlanMismatchError, match=r"of here .* call the whole model"):
        decide(attention(24), SiteSpec(Rule(1)), 0, 0, "here")
