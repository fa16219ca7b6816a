"""Choose a rule per site from measured errors: Efficient-vDiT's Algorithm 1 (arXiv 2502.06155).

The paper keeps, per layer, the sparsest mask whose loss stays under a threshold r. Its loss is not
normalised, so r differs about 50-fold between its two models; ours is relative (see ``error.py``).
"""

from collections import Counter
from collections.abc import Mapping, Sequence

from evdit_opt.calibrate.prices import Prices
from evdit_opt.calibrate.site_record import CandidateError
from evdit_opt.masks import Rule

__all__ = [
    "Choice",
    "Errors",
    "choose_rules",
    "choose_uniform",
    "mean_price",
    "threshold_for_budget",
]

Errors = Mapping[str, Sequence[CandidateError]]
Choice = dict[str, CandidateError | None]  # None: the site stays dense


def choose_rules(
    errors: Errors, prices: Prices, threshold: float, max_distinct_rules: int = 6
) -> Choice:
    """The cheapest candidate of every site whose error is at most ``threshold``.

    A candidate that is no cheaper than dense attention is none.

    Args:
        errors: candidates per site name.
        prices: what each costs.
        threshold: bound r on ``CandidateError.output``, relative.
        max_distinct_rules: different rules a plan may hold. One compiled graph is made per distinct
            rule when blocks are compiled one by one, and Dynamo gives up after 8.

    Returns:
        The chosen candidate per site; None where no candidate is good enough.
    """
    good = {
        site: [
            c
            for c in candidates
            if c.output <= threshold and prices.sparse(site, c.rule) < prices.dense[site]
        ]
        for site, candidates in errors.items()
    }
    choice: Choice = {site: _cheapest(site, own, prices) for site, own in good.items()}
    while len(_used(choice)) > max_distinct_rules:
        _drop_rarest_rule(choice, good, prices)
    return choice


def threshold_for_budget(
    errors: Errors, prices: Prices, budget: float, max_distinct_rules: int = 6
) -> float:
    """The smallest threshold whose choice has a mean price of at most ``budget``.

    If even the loosest threshold stays dearer, that one is returned; 0 if there are no candidates.
    """
    levels = sorted({c.output for candidates in errors.values() for c in candidates}) or [0.0]
    low, high = 0, len(levels) - 1
    while low < high:
        middle = (low + high) // 2
        choice = choose_rules(errors, prices, levels[middle], max_distinct_rules)
        if mean_price(choice, prices) <= budget:
            high = middle
        else:
            low = middle + 1
    return levels[low]


def choose_uniform(errors: Errors, prices: Prices, budget: float) -> Choice:
    """The dearest single rule, the same at every site, with a mean price of at most ``budget``.

    The strong baseline of the paper's Table 7. Ties go to the smaller mean error. Every site
    stays dense if no rule, measured at every site, is cheap enough.
    """
    by_rule: dict[Rule, Choice] = {}
    for site, candidates in errors.items():
        for candidate in candidates:
            by_rule.setdefault(candidate.rule, {})[site] = candidate
    uniform = [
        choice
        for choice in by_rule.values()
        if len(choice) == len(errors) and mean_price(choice, prices) <= budget + 1e-9
    ]
    return max(
        uniform,
        key=lambda choice: (mean_price(choice, prices), -mean_error(choice)),
        default=dict.fromkeys(errors),
    )


def mean_error(choice: Choice) -> float:
    """Mean over sites of the relative output error; a dense site has none."""
    return sum(0.0 if c is None else c.output for c in choice.values()) / len(choice)


def mean_price(choice: Choice, prices: Prices) -> float:
    """Mean over sites of what is paid per step."""
    total = sum(prices.sparse(site, c.rule if c else None) for site, c in choice.items())
    return total / len(choice)


def _used(choice: Choice) -> Counter[Rule]:
    return Counter(c.rule for c in choice.values() if c is not None)


def _cheapest(
    site: str, candidates: Sequence[CandidateError], prices: Prices
) -> CandidateError | None:
    return min(candidates, key=lambda c: (prices.sparse(site, c.rule), c.output), default=None)


def _drop_rarest_rule(choice: Choice, good: Errors, prices: Prices) -> None:
    """Move the sites of the least used rule to the cheapest good rule that stays in use."""
    used = _used(choice)
    rarest = min(used, key=lambda rule: (used[rule], rule.describe()))
    remaining = set(used) - {rarest}
    for site, chosen in choice.items():
        if chosen is not None and chosen.rule == rarest:
            kept = [c for c in good[site] if c.rule in remaining]
            choice[site] = _cheapest(site, kept, prices)
