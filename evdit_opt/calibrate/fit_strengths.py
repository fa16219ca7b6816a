"""Give every site of a balanced plan the strength that fits it best.

Masks are chosen first, by their balanced errors: a search over masks and strengths at once prefers
masks with little weight, whose video flickers. Then a strength is chosen by both errors of a site,
their product: by that of the output alone, clips are closer in PSNR and flicker more
(docs/notes/weighting.md has the figures).
"""

from collections import Counter

from evdit_opt.calibrate.search import Choice, Errors
from evdit_opt.calibrate.site_record import CandidateError
from evdit_opt.calibrate.strengths import unfitted

__all__ = ["fit_strengths", "one_strength"]


def fit_strengths(choice: Choice, errors: Errors, max_distinct_rules: int) -> Choice:
    """The same masks, each with the strength of the least error at its site.

    Args:
        choice: of balanced rules, ``max_distinct_rules`` different ones at most.
        errors: per site, of all strengths; 0 and 1 are called "none" and "balanced".
        max_distinct_rules: different rules a plan may hold. While there are more, the sites of the
            rarest one take another strength that is in use with its mask.
    """
    options = {
        site: [c for c in errors[site] if unfitted(c.rule) == unfitted(chosen.rule)]
        for site, chosen in choice.items()
        if chosen is not None
    }
    found = {site: min(own, key=_error) for site, own in options.items()}
    while len(used := Counter(c.rule for c in found.values())) > max_distinct_rules:
        strengths = Counter(unfitted(rule) for rule in used)
        spare = [rule for rule in used if strengths[unfitted(rule)] > 1]
        rarest = min(spare, key=lambda rule: (used[rule], rule.describe()))
        for site, chosen in found.items():
            if chosen.rule == rarest:
                others = [c for c in options[site] if c.rule in used and c.rule != rarest]
                found[site] = min(others, key=_error)
    return {site: found.get(site) for site in choice}


def one_strength(errors: Errors, choice: Choice) -> Errors:
    """Of candidates that differ in strength only, the chosen one, or that of the least error."""
    shown = {}
    for site, own in errors.items():
        best = {unfitted(c.rule): c for c in sorted(own, key=_error, reverse=True)}
        chosen = choice[site]
        if chosen is not None:
            best[unfitted(chosen.rule)] = chosen
        shown[site] = tuple(sorted(best.values(), key=lambda c: c.density))
    return shown


def _error(candidate: CandidateError) -> float:
    return candidate.output * candidate.temporal
