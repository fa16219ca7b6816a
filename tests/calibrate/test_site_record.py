"""What calibration keeps of a site: against the operator, and against residuals held in full."""

import pytest
import torch

from evdit_opt.calibrate import site_record
from evdit_opt.calibrate.site_record import SiteRecord
from evdit_opt.calibrate.stage import dense_attention, sparse_attention
from evdit_opt.grid import TokenLayout, VideoGrid
from evdit_opt.masks import CACHED, Rule

LAYOUT = TokenLayout(VideoGrid(5, 3, 4), prefix=2, suffix=3)
RULES = (Rule(1), Rule(2, weighting="balanced"), Rule(1, 1))
REUSED = (CACHED, Rule(0), Rule(0, 1))
STEPS = 4


def calls(steps: int = STEPS) -> list[tuple[torch.Tensor, ...]]:
    """q, k, v that move a little from step to step."""
    torch.manual_seed(0)
    now = torch.randn(3, 2, 3, LAYOUT.seq_len, 8)
    moves = torch.randn(steps, *now.shape) * 0.2
    return [tuple(now + moves[: step + 1].sum(0)) for step in range(steps)]


def output(rule: Rule | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    out = dense_attention(q, k, v, None, None)
    if rule is not None:
        out = sparse_attention(rule, LAYOUT, q, k, v, None, None, "reference")
    video = out[:, :, LAYOUT.prefix : LAYOUT.prefix + LAYOUT.grid.tokens]
    return video.unflatten(2, (LAYOUT.grid.frames, -1)).double()


def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at every position and keep every number."""
    monkeypatch.setattr(site_record, "POSITIONS", 10**6)
    monkeypatch.setattr(site_record, "SKETCH", 10**9)


def test_errors_are_those_of_the_operator(monkeypatch):
    whole(monkeypatch)
    site = SiteRecord(LAYOUT, RULES)
    for q, k, v in calls():
        site.add(q, k, v)
    for found, rule in zip(site.errors(), RULES, strict=True):
        dense = torch.stack([output(None, *call) for call in calls()])
        error = torch.stack([output(rule, *call) for call in calls()]) - dense
        assert found.density == rule.mask(5).token_density(LAYOUT)
        assert found.output == pytest.approx(float(error.norm() / dense.norm()), rel=1e-4)
        flicker = error.diff(dim=3).norm() / dense.diff(dim=3).norm()
        assert found.temporal == pytest.approx(float(flicker), rel=1e-4)


def test_errors_of_heads_add_up_to_those_of_the_site(monkeypatch):
    whole(monkeypatch)
    site = SiteRecord(LAYOUT, RULES, for_heads=(Rule(0),))
    for q, k, v in calls():
        site.add(q, k, v)
    found = site.head_errors()
    assert found.rules == (*RULES, Rule(0))
    assert found.densities == tuple(rule.density(LAYOUT) for rule in found.rules)
    sums = found.squares.sum(0).sqrt().tolist()
    for own, total in zip(site.errors(), sums, strict=False):
        assert [own.output, own.temporal] == pytest.approx(total, rel=1e-12)
    dense = torch.stack([output(None, *call) for call in calls()])
    for place, rule in enumerate(found.rules):
        error = torch.stack([output(rule, *call) for call in calls()]) - dense
        wrong = error.square().sum((0, 1, 3, 4, 5)) / dense.square().sum()
        assert torch.allclose(found.squares[:, place, 0], wrong, rtol=1e-4)


def test_heads_that_share_keys_or_are_alone_are_not_taken_apart():
    q, k, v = calls()[0]
    shared, alone = SiteRecord(LAYOUT, RULES), SiteRecord(LAYOUT, RULES)
    shared.add(torch.cat([q, q], 1), k, v)
    alone.add(q[:, :1], k[:, :1], v[:, :1])
    for site in (shared, alone):
        assert site.head_errors() is None
        assert len(site.errors()) == len(RULES)
    again = SiteRecord(LAYOUT, RULES)
    again.load_state(shared.state())
    assert again.head_errors() is None


def test_one_run_measures_rules_in_half_of_its_steps_and_the_next_in_the_others(monkeypatch):
    whole(monkeypatch)
    first, then = calls(2 * STEPS)[:STEPS], calls(2 * STEPS)[STEPS:]
    site, right = SiteRecord(LAYOUT, RULES, REUSED), SiteRecord(LAYOUT, RULES)
    for run in (first, then):
        for step, call in enumerate(run):
            site.add(*call, step=step)
        site.end_run()
    for call in (*first[::2], *then[1::2]):
        right.add(*call)
    for got, wanted in zip(site.errors(), right.errors(), strict=True):
        assert got.rule == wanted.rule
        assert got.output == pytest.approx(wanted.output, rel=1e-5)
        assert got.temporal == pytest.approx(wanted.temporal, rel=1e-5)


def test_drift_is_the_distance_of_residuals(monkeypatch):
    whole(monkeypatch)
    site = SiteRecord(LAYOUT, RULES, REUSED)
    for branch in ("cond", "uncond"):
        for step, call in enumerate(calls()):
            site.add(*call, generation=branch, step=step)
    site.end_run()
    dense = [output(None, *call) for call in calls()]
    for found, rule in zip(site.reuse_errors(), REUSED, strict=True):
        keeps = [0.0 if rule.keeps_nothing else output(rule, *call) for call in calls()]
        residuals = [d - s for d, s in zip(dense, keeps, strict=True)]
        for s in range(STEPS):
            for t in range(s, STEPS):
                moved = residuals[t] - residuals[s]
                relative = float((moved.norm() / dense[t].norm()) ** 2)
                assert found.output[s, t] == pytest.approx(relative, rel=1e-3, abs=1e-9)
                change = moved.diff(dim=2).norm() / dense[t].diff(dim=2).norm()
                assert found.temporal[s, t] == pytest.approx(float(change**2), rel=1e-3, abs=1e-9)


def test_a_sample_of_numbers_says_about_the_same(monkeypatch):
    layout = TokenLayout(VideoGrid(6, 16, 16))
    torch.manual_seed(1)
    moves = [torch.randn(3, 1, 4, layout.seq_len, 16) for _ in range(3)]
    found = []
    for sampled in (True, False):
        if not sampled:
            whole(monkeypatch)
        site = SiteRecord(layout, (), (CACHED, Rule(0)))
        for step in range(3):
            site.add(*(moves[0] + 0.3 * step * moves[1]), generation=0, step=step)
        site.end_run()
        found.append(torch.stack([own.output for own in site.reuse_errors()]))
    # 2048 numbers: a norm is known to about sqrt(2 / 2048) = 3%, its square to 6%; four times that.
    assert torch.allclose(*found, rtol=0.25, atol=1e-6)


def test_broken_runs_and_repeated_calls_offer_no_reuse():
    broken = SiteRecord(LAYOUT, (), REUSED)
    for step in (0, 2):  # a step was never seen
        broken.add(*calls()[step], generation=0, step=step)
    broken.end_run()
    assert broken.reuse_errors() == ()
    twice = SiteRecord(LAYOUT, (), REUSED)
    for step in (0, 0, 1):  # the module attends once per batch element
        twice.add(*calls()[step], generation=0, step=step)
    twice.end_run()
    assert twice.reuse_errors() == ()
