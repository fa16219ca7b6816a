"""A plan to test with, and hypothesis strategies for any other."""

from dataclasses import replace

from hypothesis import strategies as st

from evdit_opt.grid import VideoGrid
from evdit_opt.masks import MAX_FRAMES, MAX_STRENGTH, Rule
from evdit_opt.passes.grid_source import GridSource
from evdit_opt.plan import (
    CalibrationRecord,
    Plan,
    ReuseRecord,
    RuleEvidence,
    SecondRule,
    SiteLayout,
    SitePlan,
    SpeedRecord,
    TrendPoint,
    TrialRecord,
)
from evdit_opt.plan_records import call_record
from evdit_opt.quality import Measured, QualityReport

EVIDENCE = (
    RuleEvidence(rule="1:7", density=0.34375, output=0.21, temporal=0.4),
    RuleEvidence(rule="2:6", density=0.53125, output=0.08, temporal=0.2),
)
PLAN = Plan(
    model_class="WanTransformer3DModel",
    model_config_hash="6ac1",
    sites=(
        SitePlan(
            name="blocks.0.attn1",
            rule=Rule(2, weighting="balanced"),
            reason="sparsest within the threshold",
            layout=SiteLayout(),
            density=0.53125,
            errors=EVIDENCE,
        ),
        SitePlan(
            name="blocks.1.attn1",
            rule=None,
            reason="no candidate within the threshold",
            layout=SiteLayout(suffix=77),
            density=1.0,
        ),
    ),
    grid=VideoGrid(8, 4, 5),
    grid_source=GridSource(kind="patch", input="hidden_states", patch=(1, 2, 2), dims=(2, 3, 4)),
    min_tokens=64,
    fullgraph=True,
    calibration=CalibrationRecord(
        prompts_hash="9f86d0",
        prompt_count=6,
        steps=8,
        seed=3,
        threshold=0.1,
        trials=(TrialRecord(name="searched, balanced", density=0.77, output=0.1, temporal=0.3),),
        held_out_error=0.11,
    ),
    reuse=ReuseRecord(
        sites=("blocks.0.attn1",),
        timestep="timestep",
        refresh_at=(1000.0, 800.5, 20.0),
        trend=(TrendPoint(level=700.0, damping=0.9), TrendPoint(level=15.5, damping=0.4)),
    ),
    quality=QualityReport(
        clips=2,
        psnr=Measured(mean=31.5, stderr=0.4),
        ssim=Measured(mean=0.93, stderr=0.01),
        flicker_ratio=Measured(mean=1.1, stderr=None),
        motion_consistency=Measured(mean=0.97, stderr=0.002),
    ),
    speed=SpeedRecord(dense_ms=12.0, optimized_ms=5.0, device="cpu"),
    predicted=SpeedRecord(dense_ms=12.0, optimized_ms=4.8, device="cpu"),
    versions=(("diffusers", "0.42.1"), ("torch", "2.13.0")),
)
TEXT = PLAN.to_json()
SPLIT = replace(
    PLAN,
    sites=(
        replace(
            PLAN.sites[0],
            second=SecondRule(rule=Rule(0, window=1), heads=(0, 2, 3), total=12),
        ),
        *PLAN.sites[1:],
    ),
    reuse=None,
)

words = st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=20)
fractions = st.floats(0, 1, allow_nan=False)
spanned = {
    "references": st.integers(0, MAX_FRAMES),
    "window": st.integers(0, MAX_FRAMES),
    "spacing": st.sampled_from(["paper", "centred"]),
}
rules = st.builds(Rule, weighting=st.sampled_from(["none", "balanced"]), **spanned) | st.builds(
    Rule, weighting=st.just("fitted"), strength=st.floats(0, MAX_STRENGTH), **spanned
)
layouts = st.builds(SiteLayout, prefix=st.integers(0, 600), suffix=st.integers(0, 600))
evidence = st.builds(
    RuleEvidence, rule=words, density=fractions, output=st.floats(0, 9), temporal=fractions
)
evidences = st.lists(evidence, max_size=3).map(tuple)
sparse_sites = st.builds(
    SitePlan,
    name=words,
    rule=rules,
    reason=words,
    layout=layouts,
    density=fractions,
    errors=evidences,
    way=st.sampled_from(["mark", "scope"]),
    error=st.none() | st.floats(0, 9),
)
second_rules = st.integers(2, 40).flatmap(
    lambda total: st.builds(
        SecondRule,
        rule=rules,
        heads=st.sets(st.integers(0, total - 1), min_size=1, max_size=total - 1).map(
            lambda heads: tuple(sorted(heads))
        ),
        total=st.just(total),
    )
)
split_sites = st.builds(
    lambda site, second: replace(site, second=None if second.rule == site.rule else second),
    sparse_sites,
    second_rules,
)
dense_sites = st.builds(
    SitePlan,
    name=words,
    rule=st.none(),
    reason=words,
    layout=layouts,
    density=st.just(1.0),
    errors=evidences,
    way=st.sampled_from(["mark", "scope"]),
)
trials = st.builds(
    TrialRecord,
    name=words,
    density=fractions,
    output=fractions,
    temporal=fractions,
    psnr=st.none() | st.floats(-9, 100),
)
measured = st.builds(Measured, mean=st.floats(-9, 99), stderr=st.none() | fractions)
plans = st.builds(
    Plan,
    model_class=words,
    model_config_hash=words,
    sites=st.lists(
        sparse_sites | split_sites | dense_sites,
        min_size=1,
        max_size=5,
        unique_by=lambda site: site.name,
    ).map(tuple),
    grid=st.builds(VideoGrid, *[st.integers(1, 512)] * 3),
    grid_source=st.just(PLAN.grid_source),
    min_tokens=st.integers(0, 2**31 - 1),
    fullgraph=st.booleans(),
    calibration=st.builds(
        CalibrationRecord,
        prompts_hash=words,
        prompt_count=st.integers(1, 99),
        steps=st.integers(1, 99),
        seed=st.integers(0, 2**63 - 1),
        threshold=st.floats(0, 9),
        trials=st.lists(trials, max_size=2).map(tuple),
        held_out_error=st.none() | fractions,
        explored=st.lists(trials, max_size=2).map(tuple),
        call=st.dictionaries(
            words, st.none() | st.booleans() | st.floats(0, 9) | st.text(), max_size=3
        ).map(call_record),
    ),
    quality=st.none()
    | st.builds(
        QualityReport,
        clips=st.integers(1, 9),
        psnr=measured,
        ssim=measured,
        flicker_ratio=st.none() | measured,
        motion_consistency=measured,
    ),
    speed=st.none() | st.just(PLAN.speed),
    predicted=st.none() | st.just(PLAN.predicted),
    versions=st.dictionaries(words, words, max_size=4).map(lambda d: tuple(sorted(d.items()))),
    schema_version=st.just(2),
)
