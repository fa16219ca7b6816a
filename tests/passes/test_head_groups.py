"""Two rules at one attention, against dense masks per head in float64."""

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from evdit_opt.errors import PlanMismatchError
from evdit_opt.grid import TokenLayout, VideoGrid
from evdit_opt.masks import Rule
from evdit_opt.passes.decide_site import decide
from evdit_opt.passes.graph import Attention
from evdit_opt.passes.head_groups import attend_in_groups
from evdit_opt.passes.site_mark import SiteSpec
from evdit_opt.passes.swap_attention import swap_attention
from evdit_opt.second_rule import SecondRule
from tests.passes.graph_builder import GraphBuilder, calls
from tests.tolerance import assert_close_to_fp64

FRAMES, TOKENS = 4, 6
RULES = (Rule(1), Rule(0, 1), Rule(2, weighting="balanced"), Rule(0), Rule(4))  # the last: all


@st.composite
def specs(draw: st.DrawFn) -> SiteSpec:
    """Two of the rules, and any split of two to six heads; text before the video."""
    first, other = draw(st.permutations(RULES))[:2]
    total = draw(st.integers(2, 6))
    heads = draw(st.sets(st.integers(0, total - 1), min_size=1, max_size=total - 1))
    second = SecondRule(rule=other, heads=tuple(sorted(heads)), total=total)
    return SiteSpec(first, prefix=draw(st.sampled_from([0, 3])), second=second)


def bias(spec: SiteSpec) -> Tensor:
    """``[heads, seq, seq]``, float64."""
    assert spec.second is not None
    layout = TokenLayout(VideoGrid(FRAMES, 2, 3), prefix=spec.prefix)
    rules = [
        spec.second.rule if head in spec.second.heads else spec.rule
        for head in range(spec.second.total)
    ]
    return torch.stack([rule.mask(FRAMES).expand(layout) for rule in rules]).double()


def qkv(spec: SiteSpec, seed: int = 0) -> list[Tensor]:
    assert spec.second is not None
    torch.manual_seed(seed)
    length = spec.prefix + FRAMES * TOKENS
    return [torch.randn(2, spec.second.total, length, 8) for _ in range(3)]


def graph(spec: SiteSpec, padding: Tensor | None) -> fx.GraphModule:
    """An attention of the site's own, lowered."""
    assert spec.second is not None
    build = GraphBuilder()
    build.layer = "blocks.0.attn1"
    heads, length = spec.second.total, spec.prefix + FRAMES * TOKENS
    x = build.input("x", 2, length, heads * 3 * 8)
    marked = build.mark(x, spec, FRAMES, TOKENS)
    split = build.call(torch.unflatten, marked, 2, (3, heads, 8))
    q, k, v = (
        build.call(torch.transpose, build.call(torch.select, split, 2, n), 1, 2) for n in range(3)
    )
    more = {}
    if padding is not None:
        more["attn_mask"] = build.input("padding", *padding.shape, dtype=padding.dtype)
    gm = build.module(build.call(F.scaled_dot_product_attention, q, k, v, **more))
    swap_attention(gm, build.names, "decomposed")
    return gm


@settings(max_examples=40, deadline=None)
@given(specs(), st.sampled_from([None, "shared", "per head"]))
def test_the_lowered_graph_and_its_gradients_are_those_of_dense_masks(
    spec: SiteSpec, hidden: str | None
) -> None:
    assert spec.second is not None
    tensors = qkv(spec)
    length = tensors[0].shape[2]
    padding = None
    if hidden is not None:
        padding = torch.ones(2, spec.second.total if hidden == "per head" else 1, 1, length) > 0
        padding[:, ::2, :, -1] = False  # one key hidden from all, or from every other head
    gm = graph(spec, padding)
    x = torch.stack([t.transpose(1, 2) for t in tensors], 2).flatten(2).requires_grad_()
    (out,) = gm(x) if padding is None else gm(x, padding)
    weight = torch.randn(out.shape)

    def expected(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        own = x.detach().to(dtype).requires_grad_()
        q, k, v = own.unflatten(2, (3, -1, 8)).permute(2, 0, 3, 1, 4)
        mask = bias(spec).to(dtype).expand(2, -1, -1, -1)
        if padding is not None:
            mask = mask.masked_fill(~padding, float("-inf"))
        right = F.scaled_dot_product_attention(q, k, v, mask)
        (gradient,) = torch.autograd.grad(right, own, weight.to(dtype))
        return right.detach(), gradient

    (exact, exact_gradient), (eager, eager_gradient) = map(expected, (torch.float64, torch.float32))
    (gradient,) = torch.autograd.grad(out, x, weight)
    assert_close_to_fp64(out.detach(), exact, eager, "output")
    assert_close_to_fp64(gradient, exact_gradient, eager_gradient, "gradient")


@settings(max_examples=60, deadline=None)
@given(specs())
def test_heads_go_to_their_group_and_come_back_in_order(spec: SiteSpec) -> None:
    assert spec.second is not None
    q, k, v = qkv(spec)
    seen: dict[bool, Attention] = {}

    def attend(own: Attention, group: bool) -> Tensor:
        seen[group] = own
        return own.q + 2 * own.k + 3 * own.v

    out = attend_in_groups(Attention(q, k, v), spec.second.heads, attend)
    assert torch.equal(out, q + 2 * k + 3 * v)
    assert torch.equal(seen[True].q, q[:, list(spec.second.heads)])


def test_one_call_per_group_and_plain_attention_where_nothing_is_dropped() -> None:
    second = SecondRule(rule=Rule(0, 1), heads=(1,), total=3)
    gm = graph(SiteSpec(Rule(1), second=second), None)
    assert [op.args[4] for op in calls(gm, "tile_attention")] == [
        list(rule.mask(FRAMES).segments()[0]) for rule in (Rule(1), Rule(0, 1))
    ]
    gm = graph(SiteSpec(Rule(4), second=second), None)
    assert len(calls(gm, "tile_attention")) == len(calls(gm, "scaled_dot_product")) == 1
    gm.graph.lint()


def decided(rule: Rule, second: SecondRule, keys: int | None = None, heads: int = 4) -> Any:
    q, k = torch.empty(1, heads, 24, 8), torch.empty(1, keys or heads, 24, 8)
    return decide(Attention(q, k, k), SiteSpec(rule, second=second), FRAMES, TOKENS, "here")


def test_what_becomes_of_two_rules_at_this_length() -> None:
    second = SecondRule(rule=Rule(0, 1), heads=(0,), total=4)
    found = decided(Rule(1), second)
    spec = SiteSpec(Rule(1), second=second)
    outcome = found.outcome("here", spec, "mark")
    masks = [rule.mask(FRAMES).density for rule in (Rule(1), Rule(0, 1))]
    assert outcome.density == pytest.approx((3 * masks[0] + masks[1]) / 4, rel=1e-12)
    assert (outcome.second, outcome.reason) == (second, "")
    # Both rules keep all of so few frames: dense, and it says so. Both the same: one call.
    everything = decided(Rule(4), SecondRule(rule=Rule(5), heads=(0,), total=4))
    assert "keeps every tile" in everything.reason
    same = decided(Rule(0, 1), SecondRule(rule=Rule(0, 1, spacing="centred"), heads=(0,), total=4))
    assert (same.second, same.reason) == (None, "")
    half = decided(Rule(4), second)
    assert half.reason == ""
    assert half.mask.is_dense


@pytest.mark.parametrize(("heads", "keys"), [(3, 3), (5, 5), (4, 2)], ids=["few", "many", "gqa"])
def test_other_heads_than_the_plans_are_an_error(heads: int, keys: int) -> None:
    second = SecondRule(rule=Rule(0, 1), heads=(3,), total=4)
    with pytest.raises(
        PlanMismatchError, match=f"at here 4 heads .* got {heads} heads with {keys}"
    ):
        decided(Rule(1), second, keys=keys, heads=heads)


def test_the_graph_holds_no_constants() -> None:
    second = SecondRule(rule=Rule(0, 1), heads=(0, 2), total=4)
    gm = graph(SiteSpec(Rule(1), second=second), None)
    assert not gm.graph.find_nodes(op="get_attr")
    assert not calls(gm, "tensor")
    assert calls(gm, str(operator.getitem))
