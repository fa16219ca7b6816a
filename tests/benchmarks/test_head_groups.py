"""A rule per head: what errors add up to, which choice is best, what attention then computes."""

import json

import pytest
import torch

from benchmarks import two_rules
from benchmarks.head_choice import (
    choose,
    choose_uniform,
    damages,
    reusing_costs,
    site_choices,
    squares,
)
from benchmarks.head_groups import FREEDOM
from benchmarks.head_record import HeadErrors, products
from benchmarks.head_runs import mixed_attention
from benchmarks.quote_head_groups import PAGE, quoted
from evdit_opt.calibrate.damage import TEMPORAL
from evdit_opt.grid import TokenLayout, VideoGrid
from evdit_opt.masks import CACHED, Rule


def errors_of(each: torch.Tensor, dense: torch.Tensor) -> HeadErrors:
    """One step; errors ``[heads, rules, 1, frames, positions, channels]``."""
    change = dense.diff(dim=1)
    scale = torch.stack([dense.square().sum(), change.square().sum()])
    return HeadErrors(products(each)[:, None], scale[:, None])


def test_errors_of_heads_add_up_before_they_are_squared() -> None:
    generator = torch.Generator().manual_seed(0)
    each = torch.randn(3, 2, 1, 4, 5, 6, generator=generator, dtype=torch.float64)
    each[1, 0] = -each[0, 1]  # these two cancel
    each[2, 0] = 0.0
    dense = torch.randn(1, 4, 5, 6, generator=generator, dtype=torch.float64)
    found = squares(errors_of(each, dense))
    assert found.shape == (2, 1, 3, 3, 3)
    for rules in ((0, 0, 0), (0, 1, 1), (1, 1, 0)):
        sum_of = sum(each[head, rule] for head, rule in enumerate(rules))
        assert isinstance(sum_of, torch.Tensor)
        expected = sum_of.square().sum() / dense.square().sum()
        torch.testing.assert_close(found[0, 0][rules], expected)
        expected = sum_of.diff(dim=1).square().sum() / dense.diff(dim=1).square().sum()
        torch.testing.assert_close(found[1, 0][rules], expected)
    assert found[0, 0, 1, 0, 0] < 1e-12 < found[0, 0, 1, 2, 0]
    assert found[0, 0, 2, 2, 2] == 0.0  # all dense
    mean = (found[0, 0] + TEMPORAL * found[1, 0]).sqrt()
    torch.testing.assert_close(damages(errors_of(each, dense)), mean)


COSTS = (0.1, 0.5, 1.0)
# Two heads; the first hardly minds what it does not see, the second does.
EASY, HARD = torch.tensor([0.1, 0.05, 0.0]), torch.tensor([0.8, 0.4, 0.0])
DAMAGE = EASY[:, None] + HARD


@pytest.mark.parametrize(
    ("by", "density", "rules"),
    [
        ("site", 0.55, (1, 1)),
        ("head", 0.55, (0, 2)),
        ("head", 0.30, (0, 1)),
        ("site", 0.30, (0, 0)),
        ("site", 1.0, (2, 2)),
    ],
)
def test_the_best_choice_at_a_density(by: str, density: float, rules: tuple[int, int]) -> None:
    found = choose({"a": site_choices(DAMAGE, COSTS, FREEDOM[by])}, density)
    assert found is not None
    assert found["a"].rules == rules
    assert found["a"].cost == pytest.approx(sum(COSTS[rule] for rule in rules) / 2)
    assert found["a"].damage == pytest.approx(DAMAGE[rules].item())


def test_density_is_spent_where_it_helps_most() -> None:
    """Two sites, the second a tenth as sensitive: it takes the sparsest rules."""
    options = {
        "a": site_choices(DAMAGE, COSTS, None),
        "b": site_choices(DAMAGE / 10, COSTS, None),
    }
    found = choose(options, (0.1 + 0.55) / 2)
    assert found is not None
    assert (found["a"].rules, found["b"].rules) == ((0, 2), (0, 0))
    assert choose(options, 0.09) is None


def test_two_groups_have_two_rules() -> None:
    damage = torch.zeros(3, 3, 3)
    damage += torch.tensor([3.0, 2.0, 0.0])[:, None, None]
    damage += torch.tensor([1.5, 1.0, 0.0])[:, None]
    damage += torch.tensor([0.1, 0.0, 0.0])
    density = (0.1 + 0.5 + 1.0) / 3
    found = {by: choose({"a": site_choices(damage, COSTS, most)}, density)
             for by, most in FREEDOM.items() if by != "model"}  # fmt: skip
    rules = {by: one["a"].rules for by, one in found.items() if one is not None}
    assert rules == {"site": (1, 1, 1), "two groups": (2, 0, 0), "head": (2, 1, 0)}


def test_one_rule_for_all_sites_is_the_best_of_all_that_are_cheap_enough() -> None:
    damage = {"a": DAMAGE, "b": DAMAGE.roll((1, 1), (0, 1))}  # in all: 0.9, 1.35, 0.45
    for density, rule in ((0.4, 0), (0.6, 0), (1.0, 2)):
        found = choose_uniform(damage, COSTS, density)
        assert found is not None
        assert {one.rules for one in found.values()} == {(rule, rule)}
        assert {one.cost for one in found.values()} == {COSTS[rule]}
    assert choose_uniform(damage, COSTS, 0.05) is None


def test_a_refresh_computes_the_mask_beside_the_dense_attention() -> None:
    assert reusing_costs([0.0, 0.2], every=4, steps=10) == pytest.approx([0.3, 0.5, 1.0])


def test_every_head_sees_its_own_rule() -> None:
    layout = TokenLayout(VideoGrid(5, 2, 3))
    generator = torch.Generator().manual_seed(1)
    q, k, v = torch.randn(3, 2, 4, layout.seq_len, 8, generator=generator)
    rules = (Rule(1), None, Rule(2, 1, "balanced"), Rule(1))
    out = mixed_attention(rules, layout, q, k, v, None, None)
    bias = torch.stack(
        [
            torch.zeros(layout.seq_len, layout.seq_len)
            if rule is None
            else rule.mask(5).expand(layout)
            for rule in rules
        ]
    ).double()
    logits = q.double() @ k.double().transpose(2, 3) * 8**-0.5
    exact = (logits + bias).softmax(-1) @ v.double()
    eager = (logits.float() + bias.float()).softmax(-1) @ v
    allowed = 2 * (eager - exact).abs().max().item() + 1e-7
    assert (out - exact).abs().max().item() <= allowed
    cached = mixed_attention((CACHED, *rules[1:]), layout, q, k, v, None, None)
    assert cached[:, 0].eq(0).all()
    assert torch.equal(cached[:, 1:], out[:, 1:])


def test_the_page_quotes_the_committed_results() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert quoted() == page
    assert page.count("| reuse | 0.4 | head | ") == 2


def test_the_page_quotes_what_two_rules_gain() -> None:
    page = two_rules.PAGE.read_text()
    found = [json.loads(path.read_text()) for path in two_rules.RESULTS if path.exists()]
    assert sum(len(result["runs"]) for result in found) >= 4
    assert two_rules.quote(page, found) == page
