"""Quality by what is computed: every plan that calibration ran, and the one it chose."""

import math
from collections.abc import Iterator, Sequence

from evdit_opt.page.html import Html, tag
from evdit_opt.plan import Plan, TrialRecord

__all__ = ["frontier"]

WIDTH, HEIGHT, MARGIN = 320, 160, 26
MAX_POINTS = 200


def frontier(plan: Plan) -> Iterator[Html]:
    """A drawing and a table of the plans that were run, the chosen one first; nothing without."""
    trials = plan.calibration.trials
    tried = (*trials, *plan.calibration.explored)
    if not tried:
        return
    chosen = "None was chosen: all layers stay dense."
    if trials:
        chosen = (
            "The first was chosen: errors of the video and of its change over time count alike."
        )
    elif plan.rules:
        chosen = "The one that was chosen was run on held-out clips only."
    yield tag("h2", "Plans that were tried")
    yield tag(
        "p",
        "Whole calibration runs against dense runs of the same seeds, by what they compute. "
        + chosen,
        class_="quiet",
    )
    yield _drawing(tried[:MAX_POINTS], chosen=bool(trials))
    columns = ("", "plan", "computed", "PSNR", "error", "frame to frame")
    head = tag("tr", *(tag("th", text) for text in columns))
    rows = [
        tag(
            "tr",
            tag("td", str(n + 1)),
            tag("td", tag("strong", trial.name) if n == 0 and trials else trial.name),
            tag("td", f"{trial.density:.1%}"),
            tag("td", "-" if trial.psnr is None else f"{trial.psnr:.1f} dB"),
            tag("td", f"{trial.output:.3f}"),
            tag("td", f"{trial.temporal:.3f}"),
        )
        for n, trial in enumerate(tried)
    ]
    yield tag("div", tag("table", head, *rows), class_="wide")


def _drawing(tried: Sequence[TrialRecord], chosen: bool) -> Html:
    """A dot per plan: across what is computed, up the quality."""
    in_db = all(trial.psnr is not None for trial in tried)
    quality = [trial.psnr or 0.0 if in_db else -_logarithm(trial.score) for trial in tried]
    low, high = _range(quality)
    left, right = _range([trial.density for trial in tried])
    dots = []
    for n, (trial, value) in enumerate(zip(tried, quality, strict=True)):
        x = MARGIN + (WIDTH - 2 * MARGIN) * (trial.density - left) / (right - left)
        y = HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * (value - low) / (high - low)
        first = n == 0 and chosen
        told = f"{n + 1}: {trial.name}, {trial.density:.1%} computed"
        dot = tag(
            "circle", tag("title", told), cx=f"{x:.1f}", cy=f"{y:.1f}", r=5 if first else 3.5,
            class_="dot-chosen" if first else "dot",
        )  # fmt: skip
        dots += [dot, tag("text", str(n + 1), x=f"{x + 7:.1f}", y=f"{y + 3.5:.1f}")]
    bottom, axis = HEIGHT - MARGIN + 14, "PSNR in dB" if in_db else "error, logarithmic"
    ends = (low, high) if in_db else (math.exp(-low), math.exp(-high))
    unit = ".1f" if in_db else ".3g"
    texts = [
        tag("text", f"{left:.0%}", x=MARGIN, y=bottom),
        tag("text", f"{right:.0%} computed", x=WIDTH - MARGIN, y=bottom, text_anchor="end"),
        tag("text", f"{ends[1]:{unit}}", x=2, y=MARGIN + 4),
        tag("text", f"{ends[0]:{unit}}", x=2, y=HEIGHT - MARGIN),
        tag("text", axis, x=2, y=10),
    ]
    corner = f"M{MARGIN} {MARGIN - 8}V{HEIGHT - MARGIN + 3}H{WIDTH - MARGIN + 8}"
    return tag(
        "svg", tag("path", d=corner, class_="axis"), *texts, *dots, class_="chart", role="img",
        viewBox=f"0 0 {WIDTH} {HEIGHT}", aria_label="quality by what is computed",
    )  # fmt: skip


def _logarithm(value: float) -> float:
    return math.log(max(value, 1e-9))


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The ends of an axis, with room where all values are about the same."""
    low, high = min(values), max(values)
    room = max(0.05 * (high - low), 0.02 * max(abs(low), abs(high)), 1e-3)
    return low - room, high + room
