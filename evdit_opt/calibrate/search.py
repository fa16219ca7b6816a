"""Choose a rule per site from measured errors: Efficient-vDiT's Algorithm 1 (arXiv 2502.06155).

The paper keeps, per layer, the sparsest mask whose loss stays under a threshold r. Its loss is not
normalised, so r differs about 50-fold between its two models; ours is relative (see ``error.py``).
"""

from collections import Counter
from collections.abc import Mapping, Sequence

from evdit_opt.calibrate.site_record import CandidateError
from evdit_opt.masks import Rule

__all__ = [
    "Choice",
    "Errors",
    "choose_rules",
    "choose_uniform",
    "mean_density",
    "threshold_for_density",
]

Errors = Mapping[str, Sequence[CandidateError]]
Choice = dict[str, CandidateError | None]  # None: the site stays dense


def choose_rules(errors: Errors, threshold: float, max_distinct_rules: int = 6) -> Choice:
    """The sparsest candidate of every site whose error is at most ``threshold``.

    Args:
        errors: candidates per site name.
        threshold: bound r on ``CandidateError.output``, relative.
        max_distinct_rules: different rules a plan may hold. One compiled graph is made per distinct
            rule when blocks are compiled one by one, and Dynamo gives up after 8.

    Returns:
        The chosen candidate per site; None where no candidate is good enough.
    """
    choice: Choice = {
        site: min(
            (c for c in candidates if c.output <= threshold),
            key=lambda c: (c.density, c.output),
            default=None,
        )
        for site, candidates in errors.items()
    }
    while len(_used(choice)) > max_distinct_rules:
        _drop_rarest_rule(choice, errors, threshold)
    return choice


def threshold_for_density(errors: Errors, density: float, max_distinct_rules: int = 6) -> float:
    """The smallest threshold whose choice has a mean density of at most ``density``.

    If even the loosest threshold stays denser, that one is returned.
    """
    levels = sorted({c.output for candidates in errors.values() for c in candidates})
    low, high = 0, len(levels) - 1
    while low < high:
        middle = (low + high) // 2
        if mean_density(choose_rules(errors, levels[middle], max_distinct_rules)) <= density:
            high = middle
        else:
            low = middle + 1
    return levels[low]


def choose_uniform(errors: Errors, density: float) -> Choice:
    """The densest single rule, the same at every site, with a mean density of at most ``density``.

    The strong baseline of the paper's Table 7. Ties go to the smaller mean error. Every site
    stays dense if no rule, measured at every site, is sparse enough.
    """
    by_rule: dict[Rule, Choice] = {}
    for site, candidates in errors.items():
        for candidate in candidates:
            by_rule.setdefault(candidate.rule, {})[site] = candidate
    uniform = [
        choice
        for choice in by_rule.values()
        if len(choice) == len(errors) and mean_density(choice) <= density + 1e-9
    ]
    return max(
        uniform,
        key=lambda choice: (mean_density(choice), -mean_error(choice)),
        default=dict.fromkeys(errors),
    )


def mean_error(choice: Choice) -> float:
    """Mean over sites of the relative output error; a dense site has none."""
    return sum(0.0 if c is None else c.output for c in choice.values()) / len(choice)


def mean_density(choice: Choice) -> float:
    """Mean over sites of the kept share of token pairs; a dense site counts 1."""
    return sum(1.0 if c is None else c.density for c in choice.values()) / len(choice)


def _used(choice: Choice) -> Counter[Rule]:
    return Counter(c.rule for c in choice.values() if c is not None)


def _drop_rarest_rule(choice: Choice, errors: Errors, threshold: float) -> None:
    """Move the sites of the least used rule to the sparsest good rule that stays in use."""
    used = _used(choice)
    rarest = min(used, key=lambda rule: (used[rule], rule.describe()))
    remaining = set(used) - {rarest}
    for site, chosen in choice.items():
        if chosen is None or chosen.rule != rarest:
            continue
        choice[site] = min(
            (c for c in errors[site] if c.rule in remaining and c.output <= threshold),
            key=lambda c: (c.density, c.output),
            default=None,
        )
