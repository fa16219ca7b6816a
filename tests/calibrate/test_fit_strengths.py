"""Strengths by site: the least error, few rules, and nothing but strengths changed."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from evdit_opt.calibrate.fit_strengths import fit_strengths, one_strength
from evdit_opt.calibrate.site_record import CandidateError
from evdit_opt.calibrate.strengths import STRENGTHS, unfitted
from evdit_opt.masks import Rule

MASKS = (Rule(1), Rule(2, spacing="centred"), Rule(0, 1))
SITES = tuple(f"blocks.{n}" for n in range(4))


def strengths(mask: Rule) -> list[Rule]:
    if mask.references == 0:
        return [mask]
    fitted = [s for s in STRENGTHS if s not in (0.0, 1.0)]
    found = [replace(mask, weighting="fitted", strength=s) for s in fitted]
    return [mask, unfitted(mask, "balanced"), *found]


RULES = [rule for mask in MASKS for rule in strengths(mask)]
CANDIDATES = st.lists(
    st.tuples(st.floats(0.01, 1.0), st.floats(0.01, 1.0)),
    min_size=len(RULES),
    max_size=len(RULES),
).map(
    lambda numbers: tuple(
        CandidateError(rule, rule.mask(8).density, *own)
        for rule, own in zip(RULES, numbers, strict=True)
    )
)
ERRORS = st.fixed_dictionaries(dict.fromkeys(SITES, CANDIDATES))
CHOSEN = st.fixed_dictionaries(dict.fromkeys(SITES, st.sampled_from([None, *MASKS])))


def balanced(errors, chosen):
    """A balanced rule, or none, at every site."""
    rules = {
        site: mask and (mask if mask.references == 0 else unfitted(mask, "balanced"))
        for site, mask in chosen.items()
    }
    return {
        site: next((c for c in errors[site] if c.rule == rule), None)
        for site, rule in rules.items()
    }


@given(ERRORS, CHOSEN, st.integers(3, 5))
@settings(max_examples=30, deadline=None)
def test_masks_stay_and_rules_are_few(errors, chosen, limit):
    fitted = fit_strengths(balanced(errors, chosen), errors, limit)
    assert list(fitted) == list(chosen)
    assert len({c.rule for c in fitted.values() if c}) <= limit
    for site, mask in chosen.items():
        one = fitted[site]
        assert (one and unfitted(one.rule)) == mask
        assert one is None or one in errors[site]


@given(ERRORS, CHOSEN)
@settings(max_examples=30, deadline=None)
def test_every_site_errs_least_where_rules_may_be_many(errors, chosen):
    fitted = fit_strengths(balanced(errors, chosen), errors, 100)
    for site, one in fitted.items():
        if one is not None:
            same = [c for c in errors[site] if unfitted(c.rule) == unfitted(one.rule)]
            assert one.output * one.temporal == min(c.output * c.temporal for c in same)


@given(ERRORS, CHOSEN)
@settings(max_examples=30, deadline=None)
def test_the_evidence_shows_every_mask_once(errors, chosen):
    choice = balanced(errors, chosen)
    for site, shown in one_strength(errors, choice).items():
        assert sorted(map(str, (unfitted(c.rule) for c in shown))) == sorted(map(str, MASKS))
        assert choice[site] is None or choice[site] in shown
        for c in shown:
            same = [other for other in errors[site] if unfitted(other.rule) == unfitted(c.rule)]
            least = min(other.output * other.temporal for other in same)
            assert c == choice[site] or c.output * c.temporal == least


def test_the_rarest_strength_goes_first():
    def candidates(*products):
        return tuple(
            CandidateError(rule, 0.3, one, 1.0)
            for rule, one in zip(strengths(Rule(1)), products, strict=True)
        )

    # none, balanced, 0.25, 0.5, 0.75, 1.5
    errors = {
        "a": candidates(0.9, 0.8, 0.7, 0.1, 0.3, 0.9),
        "b": candidates(0.9, 0.8, 0.7, 0.1, 0.3, 0.9),
        "c": candidates(0.9, 0.5, 0.7, 0.6, 0.1, 0.2),
        "d": candidates(0.9, 0.1, 0.7, 0.6, 0.5, 0.2),
        "e": candidates(0.9, 0.1, 0.7, 0.6, 0.5, 0.2),
    }
    choice = {site: own[1] for site, own in errors.items()}
    fitted = fit_strengths(choice, errors, 2)
    found = {site: (c.rule.weighting, c.rule.strength) for site, c in fitted.items()}
    half, one = ("fitted", 0.5), ("balanced", 1.0)
    assert found == {"a": half, "b": half, "c": one, "d": one, "e": one}
