"""How much faster the model could get: Amdahl's bound by the share of attention."""

from collections.abc import Iterator

from evdit_opt.inspection.attention_share import AttentionShare
from evdit_opt.page.html import Html, tag
from evdit_opt.plan import Plan

__all__ = ["upper_bound"]


def upper_bound(plan: Plan, share: AttentionShare | None) -> Iterator[Html]:
    """The bound at no attention at all, at this plan's density, and what was reached."""
    if share is None:
        return
    yield tag("h2", "Upper bound")
    at_density = 1.0 / (1.0 - share.share * (1.0 - plan.density))
    found = [
        ("no attention", f"{share.max_speedup:.2f}x", "if the sites' attention cost nothing"),
        ("this plan", f"{at_density:.2f}x", f"if {plan.density:.0%} of it cost {plan.density:.0%}"),
    ]
    for name, speed in (("predicted", plan.predicted), ("measured", plan.speed)):
        if speed is not None:
            found.append((name, f"{speed.speedup:.2f}x", speed.device))
    cards = [
        tag("div", tag("dt", name), tag("dd", value, tag("small", detail)))
        for name, value, detail in found
    ]
    yield tag("dl", *cards, class_="figures")
    caches = any(rule.keeps_nothing for rule in plan.rules.values())
    spared = " A layer that returns its last output also spares the projections before it." * caches
    yield tag(
        "p",
        f"Attention of the sites takes {share.share:.1%} of a forward of the denoiser: "
        f"{share.dense_ms:.4g} ms with it, {share.without_ms:.4g} ms without, on {share.device}, "
        f"{share.dtype}, {share.threads} threads; {share.method}.{spared}",
        class_="quiet",
    )
