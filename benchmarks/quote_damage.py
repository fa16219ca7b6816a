"""Put the rank correlation of the damage model into its page.

python benchmarks/damage_model.py && python benchmarks/quote_damage.py
"""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/cpu"
BLOCK = r"(<!-- {}: .*? -->\n).*?(<!-- /{} -->)"


def damage_line(report: dict[str, Any]) -> str:
    """The rank correlations in ``damage_model.json``."""
    found = report["spearman"]
    return (
        f"{found['predicted']:.2f} over {len(report['rows'])} plans of density "
        f"{min(row['density'] for row in report['rows']):.2f} to "
        f"{max(row['density'] for row in report['rows']):.2f}, {report['clips']} clips of "
        f"{report['steps']} steps each. The sum of the sites' errors alone: "
        f"{found['site_error']:.2f}.\n"
    )


def quote(page: str, name: str, text: str) -> str:
    """The page with the block of a name made anew."""
    block = re.compile(BLOCK.format(name, name), re.DOTALL)
    return block.sub(lambda found: found[1] + text + found[2], page)


def quoted() -> dict[Path, str]:
    """Every page as it should be."""
    damage = json.loads((RESULTS / "damage_model.json").read_text("utf-8"))
    pages = {
        ROOT / "docs/notes/damage.md": ("damage", damage_line(damage)),
    }
    return {path: quote(path.read_text("utf-8"), *block) for path, block in pages.items()}


def main() -> None:
    for path, text in quoted().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
