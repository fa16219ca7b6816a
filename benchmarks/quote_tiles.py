"""Put what ``evdit measure`` found in TinyWan into its page: no number there is typed by hand.

evdit measure tinywan --prompts prompts.txt --steps 20 --out tiles
cp tiles/measure.json benchmarks/results/cpu/tinywan_tiles.json
cp tiles/measure.png docs/tinywan/tiles.png
python benchmarks/quote_tiles.py
"""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/attention_tiles.md"
RESULTS = ROOT / "benchmarks/results/cpu/tinywan_tiles.json"
BLOCK = re.compile(r"(<!-- tiles: .*? -->\n).*?(<!-- /tiles -->)", re.DOTALL)


def tiles_table(report: dict[str, Any]) -> str:
    """The page's table for the content of a ``measure.json``."""
    grid, versions = report["grid"], report["versions"]
    lines = ["| layer | own frame | if even | alike | 90% keys | prompts | steps | guidance |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for site in report["sites"]:
        held = site["sets"][0]
        caught = [
            f"{held[name]['caught']:.2f} ({held[name]['iou']:.2f})"
            for name in ("prompts", "timesteps", "branches")
        ]
        breaks = f" (breaks: {', '.join(site['breaks'])})" if site["breaks"] else ""
        lines.append(
            f"| `{site['name']}`{breaks} | {site['in_frame']:.2f} | {site['even']:.2f} | "
            f"{site['similarity']:.2f} | {held['keys']:.2f} | {' | '.join(caught)} |"
        )
    heads = [head["in_frame"] for site in report["sites"] for head in site["heads"]]
    lines += [
        "",
        f"{report['model']} of TinyWan, {grid['frames']} latent frames of {grid['height']} x "
        f"{grid['width']} tokens, {report['prompts']} prompts, {report['steps']} steps, guidance "
        f"2, torch {versions['torch']}, CPU. By head, the share on the own frame is "
        f"{min(heads):.2f} to {max(heads):.2f}.",
    ]
    return "\n".join(lines) + "\n"


def quote(page: str, report: dict[str, Any]) -> str:
    """The page with its block made anew."""
    return BLOCK.sub(lambda found: found[1] + tiles_table(report) + found[2], page)


def main() -> None:
    report = json.loads(RESULTS.read_text(encoding="utf-8"))
    PAGE.write_text(quote(PAGE.read_text(encoding="utf-8"), report), encoding="utf-8")


if __name__ == "__main__":
    main()
