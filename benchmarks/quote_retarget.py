"""Put what plans lose at other sizes into their page: no number there is typed by hand.

python -m benchmarks.retarget && python benchmarks/quote_retarget.py
"""

import json
import math
import re
from pathlib import Path
from statistics import mean, stdev
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/retarget.md"
RESULTS = ROOT / "benchmarks/results/cpu/retarget.json"
BLOCK = re.compile(r"(<!-- retarget: .*? -->\n).*?(<!-- /retarget -->)", re.DOTALL)

BAR = 0.5
"""dB that a retargeted plan may lose."""


def losses_table(report: dict[str, Any]) -> str:
    """The page's table for the content of a ``retarget.json``."""
    lines = [
        "| size | latent grid | density | calibrated there | retargeted | loss | demo's plan |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    missed, same = [], []
    for row in report["rows"]:
        there, moved, demo = (row[what]["psnr_db"] for what in ("there", "retargeted", "demo"))
        lost = [a - b for a, b in zip(there, moved, strict=True)]
        error = stdev(lost) / math.sqrt(len(lost))
        lines.append(
            f"| {row['size']} | {' x '.join(map(str, row['grid']))} | "
            f"{row['retargeted']['density']:.3f} | {mean(there):.1f} dB | {mean(moved):.1f} dB | "
            f"{mean(lost):.1f} ± {error:.1f} dB | {mean(demo):.1f} dB |"
        )
        if row["there"]["plan"] == row["retargeted"]["plan"]:
            same.append(row["size"])
        if mean(lost) > BAR:
            missed.append(f"{row['size']} by {mean(lost) - BAR:.1f} dB")
    verdict = "kept at every size in the table" if not missed else f"missed at {', '.join(missed)}"
    lines += [
        "",
        f"PSNR to the dense clips of the same seeds, {report['clips']} held-out clips of "
        f"{report['steps']} steps, guidance 2, CPU; loss: paired by clip, ± standard error. The "
        f"bar of {BAR} dB is {verdict}.",
        *[f"At {size} the same plan was found there: no loss by construction." for size in same],
    ]
    return "\n".join(lines) + "\n"


def quote(page: str, report: dict[str, Any]) -> str:
    """The page with its block made anew."""
    return BLOCK.sub(lambda found: found[1] + losses_table(report) + found[2], page)


def main() -> None:
    report = json.loads(RESULTS.read_text(encoding="utf-8"))
    PAGE.write_text(quote(PAGE.read_text(encoding="utf-8"), report), encoding="utf-8")


if __name__ == "__main__":
    main()
