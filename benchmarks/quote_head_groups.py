"""Put what a rule per head gains into its page.

python -m benchmarks.head_groups
python -m benchmarks.head_groups --steps 8 --output benchmarks/results/cpu/head_groups_8_steps.json
python -m benchmarks.quote_head_groups
"""

import json
from typing import Any

from benchmarks.head_groups import OUTPUT
from benchmarks.quote_damage import ROOT, quote

EIGHT = OUTPUT.with_name("head_groups_8_steps.json")
PAGE = ROOT / "docs/notes/head_groups.md"


def predicted_table(report: dict[str, Any]) -> str:
    """Damage on prompts that rules were not chosen on, and what finer choices take off it."""
    lines = [
        "| | density | one rule | per site | two per site | per head |",
        "|---|---|---|---|---|---|",
    ]
    for kind, densities in report["predicted"].items():
        for density, row in densities.items():
            site = row["site"]["damage"]
            cells = [f"{row['model']['damage']:.3f}", f"{site:.3f}"]
            for by in ("two groups", "head"):
                damage = row[by]["damage"]
                cells.append(f"{damage:.3f} ({damage / site - 1:+.0%})")
            lines.append(f"| {kind} | {density} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def runs_table(report: dict[str, Any]) -> str:
    """Whole runs."""
    lines = [
        "| | density | a rule per | PSNR dB | to a rule per site, paired | flicker / dense |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["runs"]:
        gain = ""
        if "gain_db" in row:
            gain = f"{row['gain_db']:+.2f} &plusmn; {row['gain_db_stderr']:.2f}"
        lines.append(
            f"| {row['kind']} | {row['density']} | {row['a_rule_per']} | {row['psnr_db']:.2f} | "
            f"{gain} | {row['flicker_ratio']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def quoted() -> str:
    """The page as it should be."""
    report, eight = (json.loads((ROOT / path).read_text("utf-8")) for path in (OUTPUT, EIGHT))
    page = quote(PAGE.read_text("utf-8"), "predicted", predicted_table(report))
    page = quote(page, "runs", runs_table(report))
    return quote(page, "eight", runs_table(eight))


if __name__ == "__main__":
    PAGE.write_text(quoted(), encoding="utf-8")
